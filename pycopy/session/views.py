"""The data of a session: two sequence spaces that are never mixed, and what waits between them.

:class:`Online` is what the client and the online server said, :class:`Target` what we and
the target said. All positions are plain integers counted from the initial sequence number
(the SYN is position 0, the first byte position 1) and never wrap; :func:`unwrap` brings a
32-bit number off the wire into such a space and ``(iss + position) & MASK`` brings it back.
The client's own numbers are kept towards the target, so ``snd_*`` positions mean the same
in both spaces; only what the servers sent differs.

These are structs, not actors: the rules live in stream, release, receiving, recovery.

Tests: tests/unit/test_stream.py, tests/unit/test_receiving.py, tests/unit/test_recovery.py
"""

from collections.abc import Sequence

from pycopy.session.rules import INITIAL_WINDOW, NO_SSTHRESH
from pycopy.wire.segment import FIN
from pycopy.wire.seq import MASK, diff

#: A deadline that never comes (CLOCK_MONOTONIC nanoseconds).
NEVER = 1 << 62
#: One that is long past.
AT_ONCE = 1

#: Positions start here when unwrapped sequence numbers are compared.
NO_POSITION = -1


#: (start, end) of stretches of a stream. Replaced, never changed in place: an idle session
#: shares the empty one.
Ranges = tuple[tuple[int, int], ...]


def unwrap(position: int, origin: int, number: int) -> int:
    """Return the position near ``position`` whose 32-bit number is ``number`` (RFC 9293 3.4)."""
    return position + diff(number, (origin + position) & MASK)


class Chunk:
    """Consecutive bytes of the client's stream: one captured segment, or what is left of it."""

    __slots__ = ("boundary", "data", "end", "flags", "need", "pos", "records", "resent",
                 "sent_ns", "time_ns")  # fmt: skip

    def __init__(self, pos: int, data: bytes, flags: int, need: int, time_ns: int) -> None:
        #: Position of the first byte, and of what follows the last (FIN counts one).
        self.pos = pos
        self.end = pos + len(data) + (flags & FIN)
        self.data = data
        #: FIN, RST and PSH as captured.
        self.flags = flags
        #: Response bytes the client had acknowledged when it sent this (FIN counts one).
        self.need = need
        self.time_ns = time_ns
        #: The client had received something since its segment before: a request begins here.
        self.boundary = False
        #: Captured segments whose fate hangs on this chunk: 1; 0 for a piece cut off its front
        #: and for whatever has its fate already.
        self.records = 1
        self.sent_ns = 0
        self.resent = False

    def trim_front(self, pos: int) -> None:
        """Forget the bytes before ``pos``, which lies inside the data."""
        self.data = self.data[pos - self.pos :]
        self.pos = pos

    def split(self, length: int) -> "Chunk":
        """Cut off and return the first ``length`` bytes; what remains keeps fate and FIN."""
        front = Chunk(self.pos, self.data[:length], 0, self.need, self.time_ns)
        front.boundary = self.boundary
        front.records = 0
        self.boundary = False
        self.trim_front(self.pos + length)
        return front


class Online:
    """What the capture says: the client's stream as far as it is known."""

    __slots__ = (
        "asked_ns", "early", "fin_pos", "held_bytes", "irs", "iss", "overlapping", "queue",
        "queue_need", "rcv_nxt", "rtt_ns", "snd_nxt",
    )  # fmt: skip

    def __init__(self, iss: int) -> None:
        #: The client's initial sequence number (mid-stream: the one before its first byte).
        self.iss = iss
        #: The online server's, learnt from the client's first ACK; None until then.
        self.irs: int | None = None
        #: Next position of the client's stream that has not been captured.
        self.snd_nxt = 1
        #: Highest position of the online server's stream that the client acknowledged.
        self.rcv_nxt = 1
        #: Position of the client's FIN, once it is in order.
        self.fin_pos = NO_POSITION
        #: ``need`` of the last chunk put in order: what makes the next one a boundary.
        self.queue_need = -1
        #: When the last request was captured, before the first one the SYN.
        self.asked_ns = 0
        #: From here to the client and back: from its SYN to the third ACK. 0: not known.
        self.rtt_ns = 0
        #: Its requests do not wait for the responses to those before, as far as we can tell.
        self.overlapping = False
        #: In order and not yet sent.
        self.queue: list[Chunk] = []
        #: Captured beyond a gap, sorted by position; a list once there are any.
        self.early: Sequence[Chunk] = ()
        #: Bytes on both lists.
        self.held_bytes = 0


class Target:
    """Our connection to the target: the transmission control block (RFC 9293 3.3.1)."""

    __slots__ = (
        "answered", "asked", "cwnd", "doubtful", "dup_acks", "early", "fin_pos", "flight", "irs",
        "iss", "mss", "need_base", "options", "rcv_acked", "rcv_nxt", "rcv_wscale", "recovery_end",
        "resend_limit", "resend_next", "rto_ns", "rttvar_ns", "sacked", "said_before", "smss",
        "snd_nxt", "snd_una", "snd_wl1", "snd_wl2", "snd_wnd", "snd_wscale", "srtt_ns", "ssthresh",
        "stretch", "ts_recent",
    )  # fmt: skip

    def __init__(self, iss: int, start: int, mss: int, rto_ns: int) -> None:
        #: ``Online.iss``: the client's sequence numbers are kept towards the target.
        self.iss = iss
        self.irs = 0
        #: Oldest unacknowledged position; the SYN sits one before the first byte to send.
        self.snd_una = start - 1
        self.snd_nxt = start - 1
        #: The target's window in bytes, and the seq and ack of the segment that said so.
        self.snd_wnd = 0
        self.snd_wl1 = 0
        self.snd_wl2 = 0
        self.snd_wscale = 0
        self.rcv_wscale = 0
        #: MSS option of our SYN; then the smaller of both sides' (RFC 9293 3.7.1).
        self.mss = mss
        #: ``mss`` less the options that every segment carries: RFC 5681 counts in these.
        self.smss = mss
        #: abi.OPT_* in use on this connection.
        self.options = 0
        #: Next position expected of the target's stream, and the one last acknowledged.
        self.rcv_nxt = 0
        self.rcv_acked = 0
        #: Full-sized segments that one acknowledgement may do for: receiving.py.
        self.stretch = 0
        #: Position of the target's FIN, once it is known.
        self.fin_pos = NO_POSITION
        #: Ranges received beyond a gap: disjoint (start, end), the latest one first.
        self.early: Ranges = ()
        #: The target's latest TSval in order (RFC 7323 4.3).
        self.ts_recent = 0
        #: Online response bytes that count as none here: release.py.
        self.need_base = 0
        #: So much was forgiven that it may have been a pause, and no shorter response.
        self.doubtful = False
        #: ``rcv_nxt`` when the last request was sent: the target has answered once it moved.
        #: 0: none was sent.
        self.answered = 0
        #: Position behind that request, and ``rcv_nxt`` when the target had not got it yet:
        #: up to there all it said was a response to those before.
        self.asked = 0
        self.said_before = 0
        #: Sent and not acknowledged, in order.
        self.flight: list[Chunk] = []
        #: RFC 6298.
        self.srtt_ns = 0
        self.rttvar_ns = 0
        self.rto_ns = rto_ns
        #: RFC 5681, RFC 6582, RFC 6675: recovery.py.
        self.cwnd = INITIAL_WINDOW * mss
        self.ssthresh = NO_SSTHRESH
        self.dup_acks = 0
        self.recovery_end = NO_POSITION
        self.resend_next = 0
        self.resend_limit = 0
        #: What the target reported beyond ``snd_una``: sorted, disjoint (start, end).
        self.sacked: Ranges = ()
