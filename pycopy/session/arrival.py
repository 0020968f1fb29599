"""A segment of the target arrives: RFC 9293 3.10.7, state by state, for a client.

Functions on a :class:`~pycopy.session.connection.Connection`; each returns what became of the
segment. They change the target's side only and send nothing but RSTs: what an arrival
sets free is sent at the end of the session's turn.

Tests: tests/sessions/test_scripts.py
"""

from pycopy.session import losing, receiving, recovery, release
from pycopy.session.connection import Connection
from pycopy.session.fates import Count, ResponseFate
from pycopy.session.rules import (
    DEFAULT_MSS,
    INITIAL_WINDOW,
    MAX_WSCALE,
    MIN_MSS,
    MS,
    NO_SSTHRESH,
    TIMESTAMPS_BYTES,
)
from pycopy.session.states import FIN_IN_FLIGHT, MAY_RECEIVE, SAID_ALL, Event, Outcome, State
from pycopy.session.views import AT_ONCE, NEVER, Target, unwrap
from pycopy.wire.segment import ACK, FIN, OPT_TIMESTAMPS, OPT_WSCALE, PSH, RST, SYN, Segment
from pycopy.wire.seq import MASK, diff


def in_closed(session: Connection, seg: Segment, now_ns: int) -> ResponseFate:
    """RFC 9293 3.10.7.1: whatever is not a reset is answered with one."""
    if seg.tcp_flags & (ACK | RST) == ACK:
        session.emit_raw(RST, seg.ack, 0, b"", now_ns)
    return ResponseFate.UNKNOWN


def in_syn_sent(session: Connection, seg: Segment, now_ns: int) -> ResponseFate:
    """RFC 9293 3.10.7.3."""
    target, flags = session.target, seg.tcp_flags
    if not flags & ACK:
        return ResponseFate.UNACCEPTABLE
    acceptable = unwrap(target.snd_una, target.iss, seg.ack) == target.snd_nxt
    if flags & RST:
        if not acceptable:
            return ResponseFate.UNACCEPTABLE
        losing.lose(session, Outcome.TARGET_REFUSED, now_ns)
        return ResponseFate.STEERED
    if not acceptable or not flags & SYN:
        # The target has an old connection here, which may even be in TIME_WAIT with the number
        # we begin with. RFC 9293 3.10.7.3: reset it; and repeat the SYN soon.
        session.emit_raw(RST, seg.ack, 0, b"", now_ns)
        session.rto_at = min(session.rto_at, now_ns + session.host.rules.delayed_ack_ns)
        return ResponseFate.UNACCEPTABLE
    _establish(session, seg, now_ns)
    return ResponseFate.STEERED


def _establish(session: Connection, seg: Segment, now_ns: int) -> None:
    target = session.target
    target.irs = seg.seq
    target.rcv_nxt = 1
    target.options &= seg.options
    if target.options & OPT_WSCALE:
        target.snd_wscale = min(seg.wscale, MAX_WSCALE)
    else:
        target.rcv_wscale = 0
    target.mss = min(target.mss, max(seg.mss or DEFAULT_MSS[session.family], MIN_MSS))
    timestamps = target.options & OPT_TIMESTAMPS
    target.smss = target.mss - TIMESTAMPS_BYTES if timestamps else target.mss
    target.ts_recent = seg.tsval
    _advance(session, target.snd_nxt, seg, now_ns)
    target.cwnd, target.ssthresh = INITIAL_WINDOW * target.smss, NO_SSTHRESH
    target.snd_wnd = seg.wnd  # RFC 7323 2.2: never scaled in a SYN
    target.snd_wl1, target.snd_wl2 = 0, target.snd_una
    session.move(Event.SYN_ACK)
    session.host.ledger.counts[Count.ESTABLISHED] += 1
    session.ack_at = AT_ONCE


def in_synchronized(session: Connection, seg: Segment, now_ns: int) -> ResponseFate:
    """RFC 9293 3.10.7.4."""
    target, flags = session.target, seg.tcp_flags
    pos = unwrap(target.rcv_nxt, target.irs, seg.seq)
    if flags & RST:
        return _on_reset(session, seg, pos, now_ns)
    if flags & SYN:
        session.ack_at = AT_ONCE  # our ACK of the handshake was lost, or RFC 5961 4
        return ResponseFate.DUPLICATE
    if not flags & ACK:
        return ResponseFate.UNACCEPTABLE
    if not _on_ack(session, seg, pos, now_ns):
        session.ack_at = AT_ONCE
        return ResponseFate.UNACCEPTABLE
    if pos <= target.rcv_acked and diff(seg.tsval, target.ts_recent) > 0:
        target.ts_recent = seg.tsval  # RFC 7323 4.3; of no use where the option is not
    if seg.seg_len or flags & FIN:
        return _on_payload(session, seg, pos, now_ns)
    if pos < target.rcv_nxt:
        session.ack_at = AT_ONCE  # keep-alive (RFC 9293 3.8.4) or window probe
    return ResponseFate.STEERED


def _on_reset(session: Connection, seg: Segment, pos: int, now_ns: int) -> ResponseFate:
    """RFC 5961 3.2 wants exactly ``rcv_nxt``. Records may be missing here, so any later
    position will do; older ones answer a segment that is long past.

    More than a FIN is missing: the target has answered what we believe unread. A reset that
    it sends of its own accord says how far it has read.
    """
    target = session.target
    if pos < target.rcv_acked:
        return ResponseFate.UNACCEPTABLE
    if session.state in SAID_ALL and target.snd_nxt - target.snd_una <= 1:
        # Both have sent all they had, at most our FIN is not acknowledged.
        session.move(Event.RESET)
        session.closed(now_ns)
    else:
        read = 0
        if seg.tcp_flags & ACK and pos > target.rcv_nxt + 1:
            read = unwrap(target.snd_una, target.iss, seg.ack)
        losing.lose(session, Outcome.TARGET_RESET, now_ns, read)
    return ResponseFate.STEERED


def _on_ack(session: Connection, seg: Segment, pos: int, now_ns: int) -> bool:
    """False if it acknowledges what was never sent."""
    target = session.target
    ack = unwrap(target.snd_una, target.iss, seg.ack)
    if ack > target.snd_nxt:
        return False
    if ack < target.snd_una:
        return True
    wnd = seg.wnd << target.snd_wscale
    if seg.sack_blocks:
        recovery.note_sack(target, _sack_positions(target, seg))
    if ack > target.snd_una:
        _advance(session, ack, seg, now_ns)
    elif (
        target.flight
        and not seg.seg_len
        and not seg.tcp_flags & FIN
        and (wnd == target.snd_wnd or seg.sack_blocks)
        and recovery.on_duplicate_ack(target)
    ):
        session.host.ledger.counts[Count.FAST_RETRANSMITS] += 1
    # RFC 9293 3.10.7.4: only a segment that is not older may change the window.
    if (pos, ack) >= (target.snd_wl1, target.snd_wl2):
        target.snd_wnd, target.snd_wl1, target.snd_wl2 = wnd, pos, target.snd_una
    return True


def _sack_positions(target: Target, seg: Segment) -> list[tuple[int, int]]:
    una, iss = target.snd_una, target.iss
    edges = [unwrap(una, iss, edge) for edge in memoryview(seg.sack).cast("I")]
    return [(edges[2 * i], edges[2 * i + 1]) for i in range(seg.sack_blocks)]


def _advance(session: Connection, ack: int, seg: Segment, now_ns: int) -> None:
    """The target acknowledged everything before ``ack``."""
    target, flight = session.target, session.target.flight
    acked_bytes = ack - target.snd_una
    # Where all is acknowledged, one object for both: a hundred thousand idle sessions.
    target.snd_una = target.snd_nxt if ack == target.snd_nxt else ack
    done = 0
    repaired = False
    for chunk in flight:
        if chunk.end > ack:
            if chunk.pos < ack:
                chunk.trim_front(ack)
                chunk.boundary = False
            break
        repaired = repaired or chunk.resent
        done += 1
    if done:
        _measure(session, seg, flight[done - 1].sent_ns, repaired, now_ns)
        del flight[:done]
    recovery.on_new_ack(target, acked_bytes)
    session.progress_ns = now_ns
    session.attempts = 0
    session.rto_at = now_ns + target.rto_ns if flight else NEVER
    if not flight and session.state in FIN_IN_FLIGHT:
        session.move(Event.FIN_ACKED)
        if session.state is State.CLOSED:
            session.closed(now_ns)
        elif session.state is State.TIME_WAIT:
            session.wait(now_ns)


def _measure(session: Connection, seg: Segment, sent_ns: int, repaired: bool, now_ns: int) -> None:
    """A round trip is over: of a segment sent once (Karn), else by timestamps (RFC 7323 4.1).

    ``repaired``: some of what is acknowledged was sent again. Then even a segment sent once
    may have waited behind it for long, and its time says nothing about the path.
    """
    target, rules = session.target, session.host.rules
    rtt_ns = now_ns - sent_ns
    if repaired:
        if not target.options & OPT_TIMESTAMPS:
            return
        now_ms = now_ns // MS + rules.timestamp_origin
        # An echo that nobody sent must not become an RTT of weeks.
        rtt_ns = min(((now_ms - seg.tsecr) & MASK) * MS, rtt_ns)
    recovery.sample_rtt(target, rules, max(rtt_ns, 1))


def _on_payload(session: Connection, seg: Segment, pos: int, now_ns: int) -> ResponseFate:
    target = session.target
    if session.state not in MAY_RECEIVE:
        session.ack_at = AT_ONCE  # the target repeats its FIN: our ACK was lost
        return ResponseFate.DUPLICATE
    end = pos + seg.seg_len
    if seg.tcp_flags & FIN:
        target.fin_pos = end
        end += 1
    early_before = target.early
    moved = receiving.receive(target, pos, end)
    pushed = bool(seg.tcp_flags & PSH)
    if not moved or receiving.must_ack_now(target, early_before, pushed):
        session.ack_at = AT_ONCE
    elif session.ack_at == NEVER:
        session.ack_at = now_ns + session.host.rules.delayed_ack_ns
    if not moved:
        early = target.early is not early_before
        return ResponseFate.EARLY if early else ResponseFate.DUPLICATE
    session.progress_ns = now_ns
    if target.snd_una < target.asked:
        target.said_before = target.rcv_nxt
    if release.target_is_over(target):
        session.move(Event.FIN_RECEIVED)
        if session.state is State.TIME_WAIT:
            session.wait(now_ns)
    return ResponseFate.STEERED
