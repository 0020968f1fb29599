"""The target resets, refuses or is silent: what becomes of what was to go over that connection.

Functions on a :class:`~pycopy.session.connection.Connection`. The client's connection goes on
online. What the target is known not to have read goes over another connection (which the
host opens), and so does the client's next request; the rest is lost, with a fate that says
why.

Tests: tests/sessions/test_scripts.py
"""

from pycopy.session.connection import Connection
from pycopy.session.fates import Count, Fate
from pycopy.session.states import Event, Outcome, State
from pycopy.session.views import NEVER, NO_POSITION, Chunk, Online, Target
from pycopy.wire.segment import FIN, RST

_FATES = {
    Outcome.TARGET_RESET: Fate.DROPPED_TARGET_RESET,
    Outcome.TARGET_REFUSED: Fate.DROPPED_TARGET_REFUSED,
    Outcome.TARGET_SILENT: Fate.DROPPED_TARGET_SILENT,
}


def lose(session: Connection, why: Outcome, now_ns: int, read: int = 0) -> None:
    """The target reset, refused or does not answer; it has read what is before ``read``."""
    online, target = session.online, session.target
    if session.state is not State.SYN_SENT and why is Outcome.TARGET_SILENT:
        session.emit(RST, target.snd_nxt, b"", now_ns)
    session.move(Event.RESET)
    session.lost_to = why
    session.rto_at = session.ack_at = session.quiet_at = NEVER
    if why is Outcome.TARGET_RESET:
        again = _take_back(target, read)
        session.host.ledger.counts[Count.REPEATED] += len(again)
        online.held_bytes += sum(len(chunk.data) for chunk in again)
        online.queue[:0] = again
        target.flight = []
    else:
        # Nothing queued now would fare better; try again when the client speaks again.
        target.flight = []
        _drop(session, len(online.queue), now_ns)


def _take_back(target: Target, read: int) -> list[Chunk]:
    """Return what a new connection should carry after the target reset this one.

    ``read``: the target is known to have read what is before that position.

    A server may close a connection that has served before, just as the next request is on
    its way; that request was neither read nor acknowledged, and clients repeat it (RFC
    9112 9.3.1). The first request of a connection is not repeated: a server that resets
    that means it. A greeting before it is service, a FIN alone is not. Where
    acknowledgement, response and FIN were all lost on their way to us, and the target has
    forgotten the connection before they are repeated, nothing tells that it was read; such
    a request is sent twice (``Count.REPEATED`` bounds how many).
    """
    if target.answered > 1 and target.fin_pos != 1:
        for index, chunk in enumerate(target.flight):
            if chunk.boundary and chunk.data and chunk.pos >= read:
                again = target.flight[index:]
                for each in again:
                    each.records = 0
                    each.resent = False
                return again
    return []


def _drop(session: Connection, number: int, now_ns: int) -> None:
    """Drop from the queue; with the client's FIN or RST the session is over."""
    online, fate = session.online, _FATES[session.lost_to]
    over = any(chunk.flags & (FIN | RST) for chunk in online.queue[:number])
    session.drop_queue(number, fate)
    if over or (online.fin_pos != NO_POSITION and not online.queue):
        session.end(session.lost_to, fate, now_ns)


def go_on(session: Connection, now_ns: int) -> None:
    """CLOSED while the client goes on: wait for a request to begin, then open anew."""
    number = 0
    for chunk in session.online.queue:
        if chunk.boundary and chunk.data:
            break
        number += 1
    _drop(session, number, now_ns)
    if session.outcome is None and session.online.queue:
        online = hand_over(session)
        session.end(session.lost_to, _FATES[session.lost_to], now_ns)
        session.host.reopen(session, online, now_ns)


def hand_over(session: Connection) -> Online:
    """Return the client's stream for another session; none of it is the old one's any more."""
    online = session.online
    session.host.detach(session)
    session.online = Online(online.iss)
    session.online.fin_pos = online.snd_nxt
    session.gap_at = NEVER
    return online
