"""The connection to the target itself: its state and clocks, what is sent over it, and its end.

What the rules of arrival.py, departure.py, losing.py and pathmtu.py work on. The order in which
they are applied, and the client's side, is session.py's, whose class this is the base of.

Tests: tests/sessions/test_scripts.py
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from pycopy.session.fates import Fate, Tallies
from pycopy.session.owner import Owner
from pycopy.session.rules import MS, Rules
from pycopy.session.states import TRANSITIONS, Event, Outcome, State
from pycopy.session.views import NEVER, Chunk, Online, Target
from pycopy.wire.segment import ACK, RST, SYN
from pycopy.wire.seq import MASK


class Emission(NamedTuple):
    """A segment to send, in the target's numbers; its headers are rewrite.py's business."""

    session: "Connection"
    flags: int
    seq: int
    ack: int
    tsval: int
    data: bytes


class Host(Protocol):
    """What a connection needs of the table it lives in."""

    rules: Rules
    ledger: Tallies
    outbox: list[Emission]
    owner: Owner
    refusing: Fate | None

    def reopen(self, session: "Connection", online: Online, now_ns: int) -> None:
        """Send ``online``, what is left of the client's stream, over a new connection."""

    def detach(self, session: "Connection") -> None:
        """The client's segments are no longer this session's."""

    def ended(self, session: "Connection", outcome: Outcome) -> None:
        """The session has its outcome; the target may still have something to say."""

    def linger(self, session: "Connection", until_ns: int) -> None:
        """Hand it the target's segments until then, and call ``expire``."""

    def forget(self, session: "Connection") -> None:
        """There is nothing more to be done for it."""


class Connection:
    """See the module. ``key`` is the connection online, ``target_key`` the one to the target."""

    __slots__ = (
        "ack_at", "attempts", "deadline_ns", "family", "flow", "gap_at", "hop", "host", "key",
        "last_client_ns", "lost_to", "online", "outcome", "progress_ns", "quiet_at", "reset_for",
        "rto_at", "scheduled_ns", "service", "state", "target", "target_key",
    )  # fmt: skip

    def __init__(
        self, host: Host, key: bytes, target_key: bytes, family: int, service: int,
        online: Online, target: Target, now_ns: int,
    ) -> None:  # fmt: skip
        self.host = host
        self.key = key
        self.target_key = target_key
        self.family = family
        self.service = service
        self.online = online
        self.target = target
        self.state = State.CLOSED
        #: How it ended; None while it lives.
        self.outcome: Outcome | None = None
        #: Why the connection is gone while the client's goes on.
        self.lost_to = Outcome.TARGET_RESET
        #: What a RST at the end of the queue will have ended.
        self.reset_for = Outcome.CLIENT_RESET
        #: Deadlines of the timers, NEVER when not running.
        self.rto_at = self.ack_at = self.quiet_at = self.gap_at = NEVER
        self.deadline_ns = NEVER
        #: The deadline the host has in its queue for us.
        self.scheduled_ns = NEVER
        self.last_client_ns = now_ns
        #: When the target last acknowledged or sent something new. Not when it was last
        #: heard: one that answers every window probe and never reads must not live for ever.
        self.progress_ns = now_ns
        #: Consecutive timeouts without any progress.
        self.attempts = 0
        #: The sender's own: constant header parts and next hop. It makes them when missing.
        self.flow: Any = None
        self.hop: Any = None

    def lower_mtu(self, mtu: int, now_ns: int) -> None:
        """This host itself cannot send larger packets than ``mtu`` on this way."""
        raise NotImplementedError

    # -- what is held -----------------------------------------------------------------------

    def drop_early(self, fate: Fate) -> None:
        """What is beyond a gap will never be sent."""
        online = self.online
        self._drop(online.early, fate)
        online.early = ()

    def drop_queue(self, number: int, fate: Fate) -> None:
        """The first ``number`` chunks in order will never be sent."""
        queue = self.online.queue
        self._drop(queue[:number], fate)
        del queue[:number]

    def _drop(self, chunks: Sequence[Chunk], fate: Fate) -> None:
        drop(chunks, fate, self.host.ledger)
        self.online.held_bytes -= sum(len(chunk.data) for chunk in chunks)

    # -- the end --------------------------------------------------------------------------

    def end(self, outcome: Outcome, fate: Fate, now_ns: int) -> None:
        """Close for good: what is held gets ``fate``, an open connection to the target RST."""
        self.drop_early(fate)
        self.drop_queue(len(self.online.queue), fate)
        state = self.state
        if state is not State.CLOSED:
            if state is not State.SYN_SENT and state is not State.TIME_WAIT:
                self.emit(RST, self.target.snd_nxt, b"", now_ns)
            self.move(Event.ABORT)
        self._finish(outcome)
        # The RST may be lost, or the SYN be answered only now: see arrival.in_closed.
        self.wait(now_ns)

    def wait(self, now_ns: int) -> None:
        """TIME_WAIT, or the like of it after a reset: stay to answer what the target repeats."""
        self.host.linger(self, now_ns + self.host.rules.time_wait_ns)

    def closed(self, now_ns: int) -> None:
        """Both sides have closed, and the target may not be aware of it yet."""
        self._finish(Outcome.CLOSED)
        self.wait(now_ns)

    def expire(self) -> None:
        """The wait is over."""
        if self.state is State.TIME_WAIT:
            self.move(Event.EXPIRED)
            self._finish(Outcome.CLOSED)
        self.host.forget(self)

    def _finish(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.deadline_ns = self.rto_at = NEVER
        self.target.flight = []
        self.host.ended(self, outcome)

    # -- state, output -----------------------------------------------------------------------

    def move(self, event: Event) -> None:
        """Go to the state that TRANSITIONS has for ``event``; KeyError if it has none."""
        self.state = TRANSITIONS[self.state, event]

    def emit(self, flags: int, pos: int, data: bytes, now_ns: int) -> None:
        """Send with the current acknowledgement, which every segment but a SYN carries."""
        target = self.target
        if flags & SYN:
            ack = 0
        else:
            flags |= ACK
            ack = (target.irs + target.rcv_nxt) & MASK
            target.rcv_acked = target.rcv_nxt
            self.ack_at = NEVER
        self.emit_raw(flags, (target.iss + pos) & MASK, ack, data, now_ns)

    def emit_raw(self, flags: int, seq: int, ack: int, data: bytes, now_ns: int) -> None:
        """Put a segment with exactly these 32-bit numbers on the host's outbox."""
        tsval = (now_ns // MS + self.host.rules.timestamp_origin) & MASK
        self.host.outbox.append(tuple.__new__(Emission, (self, flags, seq, ack, tsval, data)))


def drop(chunks: Sequence[Chunk], fate: Fate, ledger: Tallies) -> None:
    """What was held will not be sent. A FIN or RST without data has had its effect already."""
    for chunk in chunks:
        ledger.fates[Fate.HELD] -= chunk.records
        ledger.fates[fate if chunk.data else Fate.STEERED] += chunk.records
