"""What we send to the target, and when: RFC 9293 3.8, from the queue of the client's stream.

Functions on a :class:`~pycopy.session.connection.Connection`. Which bytes may leave is said by
release.py, which are to be repeated by recovery.py; here they are sent.

Tests: tests/sessions/test_scripts.py
"""

from pycopy.session import losing, recovery, release
from pycopy.session.connection import Connection
from pycopy.session.fates import Count, Fate
from pycopy.session.states import MAY_SEND, Event, Outcome, State
from pycopy.session.views import NEVER, NO_POSITION, Chunk, Target
from pycopy.wire.segment import FIN, PSH, RST, SYN

#: Flags of a captured segment that ours carries as well.
_PASSED_ON = FIN | SYN | PSH


def send(session: Connection, now_ns: int) -> None:
    """Send everything that may be sent now."""
    if session.target.recovery_end != NO_POSITION:
        _resend(session, now_ns)
    session.quiet_at = NEVER
    if session.online.queue:
        _pump(session, now_ns)


def _pump(session: Connection, now_ns: int) -> None:
    """Send from the queue what the release rule and the window allow."""
    queue, target = session.online.queue, session.target
    while queue:
        chunk, state = queue[0], session.state
        if chunk.flags & RST:
            # It would overtake what is in flight, and be the end of it.
            if not target.flight and _released(session, chunk, now_ns):
                _send_reset(session, now_ns)
            return
        if state not in MAY_SEND or not _released(session, chunk, now_ns):
            return
        if target.doubtful and chunk.data and chunk.flags & FIN and state is State.ESTABLISHED:
            # The request may leave, its FIN is a close.
            queue.insert(0, chunk.split(len(chunk.data)))
            chunk = queue[0]
        if state is State.CLOSE_WAIT and _needs_new_connection(target, chunk):
            # What is in flight was sent before the target closed, and may come back.
            if not target.flight:
                _move_on(session, now_ns)
            return
        if not _send_first(session, chunk, now_ns):
            return


def _released(session: Connection, chunk: Chunk, now_ns: int) -> bool:
    """The release rule, see release.py."""
    target, rules = session.target, session.host.rules
    if not rules.wait_for_response:
        return True
    online, since_ns = session.online, session.progress_ns
    counted = release.may_release(target, chunk)
    if not counted:
        quiet_at = release.quiet_deadline_ns(target, rules, since_ns)
    elif release.closes_ahead(target, chunk):
        quiet_at = release.close_deadline_ns(target, rules, since_ns)
    elif not online.overlapping and release.asks_ahead(target, chunk):
        quiet_at = since_ns + rules.quiet_max_ns
    else:
        return True
    if not chunk.data and release.in_doubt(target, chunk):
        quiet_at = max(quiet_at, release.doubt_deadline_ns(chunk, rules, since_ns))
    if quiet_at > now_ns:
        session.quiet_at = quiet_at
        return False
    if not counted:
        release.forgive(target, chunk)
        session.host.ledger.counts[Count.RELEASED_BY_QUIET] += 1
    elif chunk.data:
        online.overlapping = True  # waiting has taught nothing: not again on this connection
    return True


def _needs_new_connection(target: Target, chunk: Chunk) -> bool:
    """The target closed. Did the online server, too, before the client sent this?

    If the client had received exactly what we have, FIN included, it had: the client
    uses the open half, and so do we. Otherwise the target closed early.
    """
    if not (chunk.boundary and chunk.data):
        return False
    return chunk.need - target.need_base != target.rcv_nxt - 1


def _move_on(session: Connection, now_ns: int) -> None:
    """Close our half, too: the client's stream goes on over another connection."""
    online = losing.hand_over(session)
    fin = Chunk(session.target.snd_nxt, b"", FIN, 0, now_ns)
    transmit(session, fin, now_ns)
    session.move(Event.FIN_SENT)
    session.host.reopen(session, online, now_ns)


def _send_first(session: Connection, chunk: Chunk, now_ns: int) -> bool:
    """Send the head of the queue, or the part of it that the window takes."""
    target, online = session.target, session.online
    size = len(chunk.data)
    room = min(
        target.snd_una + target.snd_wnd - target.snd_nxt,
        target.cwnd - recovery.in_flight_bytes(target),
    )
    if size > room:
        if room < target.smss and target.flight:
            return False  # RFC 9293 3.8.6.2.1: no silly window; ACKs are coming
        if room <= 0:
            if session.rto_at == NEVER:
                session.rto_at = now_ns + target.rto_ns  # persist timer (RFC 9293 3.8.6.1)
            return False
        if room > target.smss:
            room -= room % target.smss
        chunk = chunk.split(room)
    else:
        del online.queue[0]
    online.held_bytes -= len(chunk.data)
    if chunk.boundary:
        target.answered = target.said_before = target.rcv_nxt
        target.asked = chunk.end
    if chunk.records:
        ledger = session.host.ledger
        ledger.fates[Fate.HELD] -= 1
        ledger.fates[Fate.SENT] += 1
        ledger.held_for(now_ns - chunk.time_ns)
    transmit(session, chunk, now_ns)
    if chunk.flags & FIN:
        session.move(Event.FIN_SENT)
    return True


def transmit(session: Connection, chunk: Chunk, now_ns: int) -> None:
    """Send a chunk for the first time and watch over it."""
    target = session.target
    chunk.sent_ns = now_ns
    target.snd_nxt = chunk.end
    if not target.flight:
        session.attempts = 0
        session.rto_at = now_ns + target.rto_ns
    target.flight.append(chunk)
    session.emit(chunk.flags & _PASSED_ON, chunk.pos, chunk.data, now_ns)


def _send_reset(session: Connection, now_ns: int) -> None:
    fates = session.host.ledger.fates
    reset = session.online.queue.pop(0)
    fates[Fate.HELD] -= reset.records
    fates[Fate.SENT] += reset.records
    session.end(session.reset_for, Fate.DROPPED_CLIENT_RESET, now_ns)


def _resend(session: Connection, now_ns: int) -> None:
    """Repeat what recovery.py says is missing at the target."""
    target = session.target
    start, end = recovery.next_hole(target)
    for chunk in target.flight:
        if start >= end:
            break
        if chunk.end <= start:
            continue
        while start < end and start < chunk.end:
            stop = min(end, chunk.end)
            chunk.resent = True
            data = chunk.data[start - chunk.pos : stop - chunk.pos]
            flags = chunk.flags & _PASSED_ON if stop == chunk.end else 0
            session.emit(flags, start, data, now_ns)
            session.host.ledger.counts[Count.RETRANSMITTED] += 1
            target.resend_next = stop
            start, end = recovery.next_hole(target)


def repeat(session: Connection, chunk: Chunk, now_ns: int) -> None:
    """Send a chunk in flight again, all of it."""
    chunk.resent = True
    session.emit(chunk.flags & _PASSED_ON, chunk.pos, chunk.data, now_ns)
    session.host.ledger.counts[Count.RETRANSMITTED] += 1


def on_timeout(session: Connection, now_ns: int) -> None:
    """RFC 6298 5, or the persist timer when nothing is in flight."""
    target, rules, counts = session.target, session.host.rules, session.host.ledger.counts
    session.attempts += 1
    if not target.flight:
        # RFC 9293 3.8.6.1: the interval grows; RTO itself is left alone, since nothing was lost.
        wait_ns = min(target.rto_ns << min(session.attempts, 16), rules.rto_max_ns)
        session.rto_at = now_ns + wait_ns
        counts[Count.WINDOW_PROBES] += 1
        session.emit(0, target.snd_una - 1, b"", now_ns)
        return
    limit = rules.syn_retries if session.state is State.SYN_SENT else rules.retries
    if session.attempts > limit:
        losing.lose(session, Outcome.TARGET_SILENT, now_ns)
        return
    if session.state is State.SYN_SENT:
        # If another replay had the port, and we no other one, it may be free by now.
        session.host.owner.claim(session.target_key)
    counts[Count.TIMEOUTS] += 1
    recovery.on_timeout(target, rules)
    session.rto_at = now_ns + target.rto_ns
