"""What can become of a captured segment and of a response, and what else a session counts.

Every captured segment ends in exactly one :class:`Fate`, every response in one
:class:`ResponseFate`. :class:`Tallies` is what the engine writes; report/ledger.py adds what
others count, says whether it balances, and is all that is ever shown.

Tests: tests/unit/test_ledger.py
"""

from enum import IntEnum, auto

from pycopy.session.states import Outcome


class Fate(IntEnum):
    """Where a captured client segment ended. ``HELD`` is a gauge: waiting now, not an end."""

    SENT = 0
    HELD = auto()
    STEERED = auto()  # carried no bytes; told the session something (third handshake ACK)
    DUPLICATE = auto()  # every byte had been captured before
    OUTSIDE_WINDOW = auto()  # far from the stream: online it was not accepted either
    SAMPLED_OUT = auto()  # -r, -g
    REFUSED_MID_STREAM = auto()  # no SYN seen and -O, or not at a request boundary
    REFUSED_SESSION_LIMIT = auto()
    REFUSED_MEMORY_LIMIT = auto()
    REFUSED_NO_ADDRESS = auto()  # no free address and port towards the target
    REFUSED_NO_INTERCEPT = auto()  # no intercept is connected
    STRAY = auto()  # FIN, RST or ACK of a connection that is not being copied
    DROPPED_TARGET_RESET = auto()  # rest of a request whose connection the target reset or closed
    DROPPED_TARGET_REFUSED = auto()
    DROPPED_TARGET_SILENT = auto()
    DROPPED_GAP = auto()  # behind bytes that are missing from the capture
    DROPPED_QUEUE_FULL = auto()
    DROPPED_IDLE = auto()
    DROPPED_CLIENT_RESET = auto()
    DROPPED_SUPERSEDED = auto()  # the client used its port again first
    DROPPED_RUN_ENDED = auto()


class ResponseFate(IntEnum):
    """Where a response of the target ended."""

    STEERED = 0  # moved a session on
    DUPLICATE = auto()  # nothing new in it
    EARLY = auto()  # beyond a gap; remembered
    UNKNOWN = auto()  # no session owns it
    UNACCEPTABLE = auto()  # outside the window, or acknowledges what was never sent


class Count(IntEnum):
    """Everything else worth a number."""

    CAPTURED = 0  # segments read from the ring
    SYN = auto()
    PAYLOAD = auto()
    PAYLOAD_BYTES = auto()
    RESPONSES = auto()  # responses read, from ring or channel
    RESPONSE_PAYLOAD = auto()
    RESPONSE_FIN = auto()
    RESPONSE_RST = auto()
    SESSIONS = auto()  # opened
    MID_STREAM = auto()  # of those, joined without a SYN
    REOPENED = auto()  # of those, because the target closed early
    PORT_TAKEN = auto()  # moved to another port: another replay had theirs at the target
    ESTABLISHED = auto()
    SENT_SEGMENTS = auto()
    SENT_PAYLOAD = auto()
    SENT_SYN = auto()
    SENT_FIN = auto()
    SENT_RST = auto()
    SENT_ACK = auto()
    RETRANSMITTED = auto()
    FAST_RETRANSMITS = auto()
    TIMEOUTS = auto()
    WINDOW_PROBES = auto()
    RELEASED_BY_QUIET = auto()  # the target's response was shorter than the online one
    REPEATED = auto()  # segments sent anew because the target closed without reading them
    PATH_MTU = auto()  # times the path to the target turned out to take less


#: Upper bounds of the hold-time histogram, in microseconds; the last bucket is unbounded.
HOLD_BUCKETS_US = (100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)


class Tallies:
    """The engine's counters: plain lists by IntEnum, one index and one add on the hot path."""

    def __init__(self) -> None:
        self.fates = [0] * len(Fate)
        self.responses = [0] * len(ResponseFate)
        self.counts = [0] * len(Count)
        self.outcomes: dict[Outcome, int] = dict.fromkeys(Outcome, 0)
        self.hold = [0] * (len(HOLD_BUCKETS_US) + 1)

    def held_for(self, hold_ns: int) -> None:
        """Record how long a segment waited between capture and sending."""
        hold_us = hold_ns // 1000
        bucket = 0
        for bound in HOLD_BUCKETS_US:
            if hold_us < bound:
                break
            bucket += 1
        self.hold[bucket] += 1
