"""Retransmission: when to repeat what (RFC 6298, 5681, 6582 and 6675, each cut to our size).

Works on :class:`~pycopy.session.views.Target` only: it decides, departure.py sends. The
congestion window is a standard one, since the path to the target is not the client's
path and the client's own pacing may be too fast for it.
"""

from collections.abc import Iterable

from pycopy.session.rules import Rules
from pycopy.session.views import NO_POSITION, Target

#: RFC 5681 3.2.
DUP_ACK_THRESHOLD = 3


def sample_rtt(target: Target, rules: Rules, rtt_ns: int) -> None:
    """RFC 6298 2: smooth a round trip that was measured unambiguously."""
    if target.srtt_ns == 0:
        target.srtt_ns = rtt_ns
        target.rttvar_ns = rtt_ns // 2
    else:
        target.rttvar_ns += (abs(target.srtt_ns - rtt_ns) - target.rttvar_ns) // 4
        target.srtt_ns += (rtt_ns - target.srtt_ns) // 8
    rto_ns = target.srtt_ns + 4 * target.rttvar_ns
    target.rto_ns = min(max(rto_ns, rules.rto_min_ns), rules.rto_max_ns)


def sacked_bytes(target: Target) -> int:
    """Bytes above ``snd_una`` that the target reported as received."""
    return sum(end - start for start, end in target.sacked)


def in_flight_bytes(target: Target) -> int:
    """RFC 6675 4 "pipe", without its loss estimate."""
    flight_bytes = target.snd_nxt - target.snd_una
    return flight_bytes - sacked_bytes(target) if target.sacked else flight_bytes


def note_sack(target: Target, blocks: Iterable[tuple[int, int]]) -> None:
    """Merge SACK blocks (positions) that lie within what we sent (RFC 2018, RFC 6675 3)."""
    una, nxt = target.snd_una, target.snd_nxt
    ranges = list(target.sacked)
    ranges += [(start, end) for start, end in blocks if una < start < end <= nxt]
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    target.sacked = tuple(merged)


def on_new_ack(target: Target, acked_bytes: int) -> None:
    """``snd_una`` has moved: grow the window, or go on with or leave recovery."""
    target.dup_acks = 0
    una, smss = target.snd_una, target.smss
    if target.sacked:
        target.sacked = tuple((max(s, una), e) for s, e in target.sacked if e > una)
    if target.recovery_end != NO_POSITION:
        if una >= target.recovery_end:
            target.recovery_end = NO_POSITION
            # RFC 6582 3.2 step 3 (1): no burst of all that recovery held back.
            target.cwnd = min(target.ssthresh, max(in_flight_bytes(target), smss) + smss)
            return
        # RFC 6582 3.2: a partial ACK shows the next hole right behind it.
        target.resend_next = max(target.resend_next, una)
        target.resend_limit = max(target.resend_limit, una + smss)
    elif 2 * (target.snd_nxt - una + acked_bytes) < target.cwnd:
        return  # RFC 9293 3.8.2, RFC 7661: a window that nobody fills proves nothing
    if target.cwnd < target.ssthresh:
        target.cwnd += min(acked_bytes, 2 * smss)  # RFC 5681 3.1, RFC 3465 2.3
    else:
        target.cwnd += max(1, smss * acked_bytes // target.cwnd)


def on_duplicate_ack(target: Target) -> bool:
    """Count it; True when it starts fast retransmit (RFC 5681 3.2, RFC 6675 5)."""
    target.dup_acks += 1
    smss = target.smss
    if target.recovery_end != NO_POSITION:
        if target.sacked:
            target.resend_limit = max(target.resend_limit, target.sacked[-1][1])
        return False
    if target.dup_acks < _threshold(target) and sacked_bytes(target) <= 2 * smss:
        return False
    target.ssthresh = max(in_flight_bytes(target) // 2, 2 * smss)
    target.cwnd = target.ssthresh + DUP_ACK_THRESHOLD * smss
    target.recovery_end = target.snd_nxt
    target.resend_next = target.snd_una
    target.resend_limit = target.sacked[-1][1] if target.sacked else target.snd_una + smss
    return True


def _threshold(target: Target) -> int:
    """RFC 5827 3.1: with less than four segments out, three duplicates can never come."""
    full_sized = -(-(target.snd_nxt - target.snd_una) // target.smss)
    segments = max(len(target.flight), full_sized)
    return segments - 1 if 2 <= segments <= DUP_ACK_THRESHOLD else DUP_ACK_THRESHOLD


def on_timeout(target: Target, rules: Rules) -> None:
    """RFC 5681 3.1 equation 4 and RFC 2018 8: start over, trusting no SACK."""
    target.ssthresh = max(in_flight_bytes(target) // 2, 2 * target.smss)
    target.cwnd = target.smss
    target.dup_acks = 0
    target.sacked = ()
    target.recovery_end = target.snd_nxt
    target.resend_next = target.snd_una
    target.resend_limit = target.snd_nxt
    # RFC 6298 5.5: back off; a valid sample brings the timer down again.
    target.rto_ns = min(2 * target.rto_ns, rules.rto_max_ns)


def next_hole(target: Target) -> tuple[int, int]:
    """Return what to repeat now as positions (start, end); start >= end: nothing.

    Only in recovery. The window counts what was repeated since recovery began: the bytes
    between ``snd_una`` and the hole that the target has not reported.
    """
    una = target.snd_una
    start = max(target.resend_next, una)
    end = min(target.resend_limit, target.recovery_end)
    repeated = start - una
    for left, right in target.sacked:
        if start < left:
            end = min(end, left)
            break
        repeated -= min(start, right) - left
        start = max(start, right)
    return start, min(end, start + target.cwnd - repeated)
