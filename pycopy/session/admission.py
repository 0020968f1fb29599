"""Which connections are copied: sampling, ramp, limits, and where one may be joined mid-stream.

Knows connection keys and what was seen of connections that have no session; opens none.
All memory is bounded: what was seen longest ago is forgotten first.
"""

from typing import TypeVar
from zlib import crc32

from pycopy.session.fates import Fate
from pycopy.session.rules import SECOND, Rules
from pycopy.wire.segment import FIN, RST, Segment
from pycopy.wire.seq import lt

#: Connections remembered, for each of the three reasons.
REMEMBERED_MAX = 65_536

#: The client's address comes first in a connection key (KEY).
ADDRESS_BYTES = 16

_Value = TypeVar("_Value")


class Admission:
    """Says of a segment without a session why none may be opened for it."""

    def __init__(self, rules: Rules, start_ns: int) -> None:
        self._rules = rules
        self._start_ns = start_ns
        #: Connections to be joined at their next request, and the ack that ends this one.
        self._watched: dict[bytes, int] = {}
        #: With -g: connections that began before their client's turn came.
        self._left_out: dict[bytes, None] = {}
        #: Connections that were copied, and the client's sequence number behind their end.
        self._ended: dict[bytes, int] = {}

    def sampled_out(self, key: bytes, now_ns: int) -> bool:
        """-r and -g: by a stable hash of the client's address."""
        rules = self._rules
        share = rules.sample_percent
        if rules.ramp:
            share = min(share, 1 + (now_ns - self._start_ns) // SECOND)
        if share >= 100:
            return False
        return crc32(key[:ADDRESS_BYTES]) % 100 >= share

    def refuse_new(self, key: bytes, now_ns: int) -> Fate | None:
        """Why the connection that begins with this SYN is not copied, or None."""
        self.over(key)
        if not self.sampled_out(key, now_ns):
            return None
        if self._rules.ramp:
            _remember(self._left_out, key, None)
        return Fate.SAMPLED_OUT

    def refuse_midstream(self, seg: Segment, now_ns: int) -> Fate | None:
        """Why a connection whose SYN was not copied is not joined with this segment, or None."""
        key = seg.key
        if not seg.payload_bytes or seg.tcp_flags & RST:
            if seg.tcp_flags & (FIN | RST):
                self._watched.pop(key, None)
                self._left_out.pop(key, None)
            return Fate.STRAY
        end = self._ended.get(key)
        if end is not None and lt(seg.seq, end):
            return Fate.DUPLICATE  # of a session that is over: the client had no ACK for it
        if self._rules.only_full_sessions:
            return Fate.REFUSED_MID_STREAM
        if key in self._left_out or self.sampled_out(key, now_ns):
            return Fate.SAMPLED_OUT
        return None if self._at_boundary(seg, now_ns) else Fate.REFUSED_MID_STREAM

    def _at_boundary(self, seg: Segment, now_ns: int) -> bool:
        """A request begins here if the client received something since its last segment,
        or was silent since we began to look."""
        ack = self._watched.get(seg.key)
        if ack is not None:
            return seg.ack != ack
        if now_ns - self._start_ns >= self._rules.join_quiet_ns:
            return True
        self.watch(seg.key, seg.ack)
        return False

    def watch(self, key: bytes, ack: int) -> None:
        """A request is under way that cannot be copied whole; ``ack`` is the client's latest."""
        _remember(self._watched, key, ack)

    def ended(self, key: bytes, end: int) -> None:
        """A session is over; ``end`` is the client's sequence number behind its last byte."""
        _remember(self._ended, key, end)

    def over(self, key: bytes) -> None:
        """What was seen of this connection does not matter any more."""
        self._watched.pop(key, None)
        self._left_out.pop(key, None)
        self._ended.pop(key, None)


def _remember(memory: dict[bytes, _Value], key: bytes, value: _Value) -> None:
    if len(memory) >= REMEMBERED_MAX and key not in memory:
        del memory[next(iter(memory))]
    memory[key] = value
