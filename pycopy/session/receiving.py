"""The target's stream, of which only the extent matters, and when to acknowledge it.

A record of a response may be lost on its way to us (ring, channel) as well as the
response itself. Either way ``rcv_nxt`` stays before the gap and the target repeats what
we do not acknowledge: the original skips holes and can acknowledge bytes that the target
never got to us. Works on :class:`~pycopy.session.views.Target` only.
"""

from pycopy.session.views import NO_POSITION, Ranges, Target

#: What is received beyond so many gaps is not kept: the target has to repeat it.
MAX_RANGES = 64

#: Longest stretch, in full-sized segments, and how many are not tried after one was in vain.
STRETCH_MAX = 0x7FFF
STRETCH_PAUSE = 32


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


def must_ack_now(target: Target, early_before: Ranges, pushed: bool) -> bool:
    """RFC 5681 4.2: at least every second full-sized segment, at once around a gap or FIN.

    That is a SHOULD, which is not kept where nobody waits for it: what ends in PSH is all
    that the target had to send, and the next request acknowledges it as well. But a sender
    whose window is full pushes, too. So an acknowledgement is stretched over no more than the
    target has been seen to send without one, and whenever one had to come from the timer
    after all (:func:`acknowledge`) there is a pause.
    """
    if target.early or early_before or target.fin_pos != NO_POSITION:
        return True
    unacked = target.rcv_nxt - target.rcv_acked
    if unacked < 2 * target.smss:
        return False
    segments = min(-(-unacked // target.smss), STRETCH_MAX)
    if target.stretch < 0:
        target.stretch += 1
    elif segments > target.stretch:
        target.stretch = segments
    else:
        return not pushed
    return True


def acknowledge(target: Target, late: bool) -> None:
    """An acknowledgement of its own leaves; ``late``: nothing else took it along in time."""
    if late and target.rcv_nxt - target.rcv_acked >= 2 * target.smss:
        target.stretch = -STRETCH_PAUSE
