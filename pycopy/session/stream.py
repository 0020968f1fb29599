"""The client's stream: captured segments put in order, once each, gaps waited for.

The capture may deliver them reordered, repeated, overlapping or re-cut, and some may be
missing. Works on :class:`~pycopy.session.views.Online` only; knows nothing of the target.
Where two captures of a byte differ, the one that comes first in order wins.
"""

from bisect import bisect_right
from collections.abc import Sequence
from enum import Enum, auto
from operator import attrgetter

from pycopy.session.views import NO_POSITION, Chunk, Online
from pycopy.wire.segment import FIN

_BY_POSITION = attrgetter("pos")

#: No window of a real client is larger (RFC 7323 2.3); beyond it a number is nonsense.
HORIZON_BYTES = 1 << 30


class Offer(Enum):
    """What became of a segment offered to the stream."""

    IN_ORDER = auto()
    EARLY = auto()
    DUPLICATE = auto()
    OUTSIDE = auto()


def offer(online: Online, chunk: Chunk) -> Offer:
    """Put ``chunk`` where it belongs: on the queue, among the early ones, or nowhere."""
    snd_nxt = online.snd_nxt
    if chunk.end <= snd_nxt or online.fin_pos != NO_POSITION:
        return Offer.DUPLICATE
    if chunk.pos > snd_nxt:
        return _keep_early(online, chunk)
    if chunk.pos < snd_nxt:
        chunk.trim_front(snd_nxt)
    online.held_bytes += len(chunk.data)
    _append(online, chunk)
    return Offer.IN_ORDER


def _append(online: Online, chunk: Chunk) -> None:
    if chunk.need < online.queue_need:
        chunk.need = online.queue_need  # a reordered segment: an ACK never moves back
    chunk.boundary = chunk.need > online.queue_need
    online.queue_need = chunk.need
    if chunk.boundary and chunk.data:
        # Sooner than a response could come and a request go. Half leaves room for a handshake
        # that was slower than usual.
        if 2 * (chunk.time_ns - online.asked_ns) < online.rtt_ns:
            online.overlapping = True
        online.asked_ns = chunk.time_ns
    if chunk.flags & FIN:
        online.fin_pos = chunk.end - 1
    online.queue.append(chunk)
    online.snd_nxt = chunk.end


def _keep_early(online: Online, chunk: Chunk) -> Offer:
    if chunk.pos - online.snd_nxt > HORIZON_BYTES:
        return Offer.OUTSIDE
    early = online.early
    place = bisect_right(early, chunk.pos, key=_BY_POSITION)
    if place and chunk.end <= early[place - 1].end:
        return Offer.DUPLICATE
    if not isinstance(early, list):
        online.early = early = []
    early.insert(place, chunk)
    online.held_bytes += len(chunk.data)
    return Offer.EARLY


def ripen(online: Online) -> int:
    """Move early chunks that the stream has reached to the queue; return how many were repeats."""
    early, repeats, ripe = online.early, 0, 0
    while ripe < len(early) and early[ripe].pos <= online.snd_nxt:
        chunk = early[ripe]
        ripe += 1
        online.held_bytes -= len(chunk.data)
        if offer(online, chunk) is Offer.DUPLICATE:
            repeats += 1
    if ripe:
        online.early = early[ripe:] or ()
    return repeats


def offer_reset(online: Online, reset: Chunk) -> Offer:
    """The client sent RST: it goes last, whatever is missing before it.

    RFC 5961 3.2: an older one was not accepted online either.
    """
    if not 0 <= reset.pos - online.snd_nxt <= HORIZON_BYTES:
        return Offer.OUTSIDE
    reset.pos = reset.end = online.snd_nxt
    online.queue.append(reset)
    return Offer.IN_ORDER


def next_request(early: Sequence[Chunk]) -> int:
    """Index of the first chunk of ``early`` that surely begins a request, or their number.

    Surely: what the client sent right before is known, and it received something since.
    """
    for index in range(1, len(early)):
        chunk, before = early[index], early[index - 1]
        if chunk.need > before.need and chunk.pos <= before.end and chunk.data:
            return index
    return len(early)


def resume(online: Online, rest: Sequence[Chunk]) -> Online:
    """Take ``rest`` off ``online`` and return it as a stream of its own, which begins there."""
    successor = Online(online.iss)
    successor.irs, successor.rcv_nxt = online.irs, online.rcv_nxt
    successor.rtt_ns, successor.overlapping = online.rtt_ns, online.overlapping
    successor.early = rest
    if rest:
        successor.snd_nxt = rest[0].pos
    successor.held_bytes = sum(len(chunk.data) for chunk in rest)
    online.held_bytes -= successor.held_bytes
    return successor
