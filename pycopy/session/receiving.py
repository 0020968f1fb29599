"""The target's stream, of which only the extent matters, and when to acknowledge it.

A record of a response may be lost on its way to us (ring, channel) as well as the
response itself. Either way ``rcv_nxt`` stays before the gap and the target repeats what
we do not acknowledge: the original skips holes and can acknowledge bytes that the target
never got to us. Works on :class:`~pycopy.session.views.Target` only.
"""

from pycopy.session.views import NO_POSITION, Ranges, Target

#: What is received beyond so many gaps is not kept: the target has to repeat it.
MAX_RANGES = 64


def receive(target: Target, pos: int, end: int) -> bool:
    """Take in positions ``pos`` to ``end`` (exclusive); True if ``rcv_nxt`` moved."""
    if end <= target.rcv_nxt:
        return False
    if pos > target.rcv_nxt:
        _remember(target, pos, end)
        return False
    target.rcv_nxt = end
    if target.early:
        _close_gap(target)
    return True


def _close_gap(target: Target) -> None:
    """Take in the ranges that the stream has reached."""
    for start, end in sorted(target.early):
        if start <= target.rcv_nxt < end:
            target.rcv_nxt = end
    target.early = tuple(each for each in target.early if each[0] > target.rcv_nxt)


def _remember(target: Target, pos: int, end: int) -> None:
    """Add [pos, end) to the ranges beyond the gap.

    RFC 2018 4: the first SACK block is the one with the segment just received, the others
    repeat those reported most recently.
    """
    others = []
    for start, stop in target.early:
        if stop < pos or start > end:
            others.append((start, stop))
        else:
            pos, end = min(pos, start), max(end, stop)
    if len(others) < MAX_RANGES:
        target.early = ((pos, end), *others)


def must_ack_now(target: Target, early_before: Ranges) -> bool:
    """RFC 5681 4.2: at least every second full-sized segment, at once around a gap or FIN."""
    return bool(
        target.early
        or early_before
        or target.rcv_nxt - target.rcv_acked >= 2 * target.smss
        or target.fin_pos != NO_POSITION
    )
