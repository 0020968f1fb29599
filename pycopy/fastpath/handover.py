"""A session changes hands between the kernel (bpf/session.h) and this engine, losing nothing.

Pure translation: 32-bit numbers of ``struct pycopy_session`` to positions that never wrap,
and back. What the kernel had sent without an acknowledgement, and what it held, comes along
as records of its log and becomes the flight and the queue.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from pycopy.kernel.abi import (
    KNOWN_DOUBT,
    KNOWN_FIN,
    KNOWN_IRS,
    KNOWN_NEED,
    KNOWN_OVERLAP,
    KNOWN_SENT,
    LOG_BOUNDARY,
    KernelSession,
    LogRecord,
    Owner,
)
from pycopy.session.session import Host, Session
from pycopy.session.states import State
from pycopy.session.views import NEVER, NO_POSITION, Chunk, Online, Target
from pycopy.wire.segment import PIECE_BYTES, SYN
from pycopy.wire.seq import MASK, diff

Logged = tuple[LogRecord, bytes]

#: Where numbers begin anew. Positions do not: nothing that was said lies before them.
_WRAP = 1 << 32

#: What the TCP header says in ``LogRecord.tcp_flags``.
_FLAGS = 0xFF

#: States in which the target's FIN has arrived.
_TARGET_IS_OVER = frozenset({State.CLOSE_WAIT, State.CLOSING, State.LAST_ACK, State.TIME_WAIT})

#: A session is given to the kernel only in this one: the handshake is over, no close has begun.
GIVEN_IN = State.ESTABLISHED


class Kernel(Protocol):
    """What :class:`Keeper` asks of the maps and programs (kernel.py)."""

    def fetch_online(self, key: bytes) -> tuple[KernelSession, list[Logged]] | None:
        """The session of a connection online, from now on ours; None: the kernel has none."""

    def fetch_target(self, key: bytes) -> tuple[KernelSession, list[Logged]] | None:
        """The same by its connection to the target."""

    def give(self, session: KernelSession) -> bool:
        """The kernel goes on with ``session``; False if it has no room for it."""

    def claim(self, target_key: bytes, over_lingering: bool = False) -> bool: ...

    def release(self, target_key: bytes) -> None: ...

    def own_online(self, online_key: bytes) -> None: ...

    def disown_online(self, online_key: bytes) -> None: ...

    def now_active(self) -> int: ...


class Keeper:
    """The kernel as the engine asks for it (session/keeper.py): sessions go in and come out."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def fetch_online(self, key: bytes, host: Host, now_ns: int) -> Session | None:
        found = self._kernel.fetch_online(key)
        return None if found is None else adopt(host, *found, now_ns)

    def fetch_target(self, key: bytes, host: Host, now_ns: int) -> Session | None:
        found = self._kernel.fetch_target(key)
        return None if found is None else adopt(host, *found, now_ns)

    def may_give(self, session: Session) -> bool:
        return may_give(session)

    def give(self, session: Session) -> bool:
        return may_give(session) and self._kernel.give(describe(session))

    def claim(self, target_key: bytes, over_lingering: bool = False) -> bool:
        return self._kernel.claim(target_key, over_lingering)

    def release(self, target_key: bytes) -> None:
        self._kernel.release(target_key)

    def own_online(self, online_key: bytes) -> None:
        self._kernel.own_online(online_key)

    def disown_online(self, online_key: bytes) -> None:
        self._kernel.disown_online(online_key)

    def now_active(self) -> int:
        return self._kernel.now_active()


def adopt(host: Host, kernel: KernelSession, logged: Sequence[Logged], now_ns: int) -> Session:
    """Return the session that goes on where ``kernel`` stopped.

    ``logged``: the records of the log from the one before ``snd_una`` on, if it is still
    there, in order.
    """
    online = _online(kernel)
    target = _target(kernel, online)
    session = Session(
        host, kernel.online, kernel.target, kernel.family, kernel.service, online, target, now_ns
    )
    session.state = State(kernel.state)
    if session.state in _TARGET_IS_OVER:
        target.fin_pos = target.rcv_nxt - 1
    if session.state is State.SYN_SENT:
        syn = Chunk(target.snd_una, b"", SYN, 0, now_ns)
        syn.end += 1
        syn.sent_ns = kernel.timed_ns
        target.flight = [syn]
    _take_log(session, kernel, logged)
    session.rto_at = kernel.rto_at if target.flight and kernel.rto_at else NEVER
    session.ack_at = kernel.ack_at or NEVER
    session.progress_ns = kernel.progress_ns
    session.last_client_ns = kernel.client_ns
    return session


def _online(kernel: KernelSession) -> Online:
    online = Online(kernel.iss)
    online.snd_nxt = _sent_position(kernel, kernel.online_snd_nxt)
    if kernel.known & KNOWN_IRS:
        online.irs = kernel.online_irs
        online.rcv_nxt = (kernel.online_rcv_nxt - kernel.online_irs) & MASK
    if kernel.known & KNOWN_NEED:
        if _need(kernel, online, kernel.online_need) < 0:
            online.rcv_nxt += _WRAP
        online.queue_need = _need(kernel, online, kernel.online_need)
    if kernel.known & KNOWN_FIN:
        online.fin_pos = online.snd_nxt - 1
    online.overlapping = bool(kernel.known & KNOWN_OVERLAP)
    online.asked_ns, online.rtt_ns = kernel.asked_ns, kernel.client_rtt_ns
    return online


def _sent_position(kernel: KernelSession, number: int) -> int:
    """A sequence number of the client's stream as a position."""
    return ((kernel.snd_una - kernel.iss) & MASK) + diff(number, kernel.snd_una)


def _need(kernel: KernelSession, online: Online, ack: int) -> int:
    """Response bytes that the client had acknowledged with ``ack``."""
    return online.rcv_nxt + diff(ack, kernel.online_rcv_nxt) - 1


def _target(kernel: KernelSession, online: Online) -> Target:
    una = (kernel.snd_una - kernel.iss) & MASK
    target = Target(kernel.iss, una + 1, kernel.mss, kernel.rto_ns)
    target.snd_una = una
    target.snd_nxt = _sent_position(kernel, kernel.snd_nxt)
    target.options = kernel.options
    target.rcv_wscale = kernel.rcv_wscale
    if State(kernel.state) is State.SYN_SENT:
        return target
    target.irs = kernel.irs
    target.snd_wscale = kernel.snd_wscale
    target.smss = kernel.smss
    target.rcv_nxt = (kernel.rcv_nxt - kernel.irs) & MASK
    said = [kernel.rcv_acked]
    if kernel.known & KNOWN_SENT:
        said += kernel.answered, kernel.said_before
    if target.rcv_nxt + min(diff(number, kernel.rcv_nxt) for number in said) < 0:
        target.rcv_nxt += _WRAP
    target.rcv_acked = target.rcv_nxt + diff(kernel.rcv_acked, kernel.rcv_nxt)
    if kernel.known & KNOWN_SENT:
        target.answered = target.rcv_nxt + diff(kernel.answered, kernel.rcv_nxt)
        target.said_before = target.rcv_nxt + diff(kernel.said_before, kernel.rcv_nxt)
        target.asked = _sent_position(kernel, kernel.asked)
    target.stretch = kernel.stretch
    target.ts_recent = kernel.ts_recent
    target.snd_wnd = kernel.snd_wnd
    target.snd_wl1 = target.rcv_nxt + diff(kernel.snd_wl1, kernel.rcv_nxt)
    target.snd_wl2 = una + diff(kernel.snd_wl2, kernel.snd_una)
    if kernel.known & KNOWN_IRS:
        # The kernel counts modulo 2^32: the one near what both servers have said so far.
        lead = online.rcv_nxt - target.rcv_nxt
        target.need_base = lead + diff(kernel.need_base, lead & MASK)
    target.doubtful = bool(kernel.known & KNOWN_DOUBT)
    target.srtt_ns, target.rttvar_ns = kernel.srtt_ns, kernel.rttvar_ns
    target.cwnd, target.ssthresh = kernel.cwnd, kernel.ssthresh
    return target


def _take_log(session: Session, kernel: KernelSession, logged: Sequence[Logged]) -> None:
    """Make flight and queue of what the log has."""
    online, target = session.online, session.target
    last_need = -1
    for record, data in logged:
        pos = _sent_position(kernel, record.seq)
        last_need = max(_need(kernel, online, record.ack), last_need)
        chunk = Chunk(pos, data, record.tcp_flags & _FLAGS, last_need, record.time_ns)
        if chunk.end <= target.snd_una:
            continue  # acknowledged: only there to say what the client had received before
        chunk.boundary = bool(record.tcp_flags & LOG_BOUNDARY)
        if chunk.pos < target.snd_una:
            chunk.trim_front(target.snd_una)
            chunk.boundary = False
        if chunk.pos < target.snd_nxt < chunk.end:
            part = chunk.split(target.snd_nxt - chunk.pos)
            part.resent = True  # when that was is not known: no measure of a round trip
            _fly(session, part)
        if chunk.pos < target.snd_nxt:
            _fly(session, chunk)
        else:
            _hold(session, chunk)


def _fly(session: Session, chunk: Chunk) -> None:
    """What the kernel has sent, in pieces of the size that the engine sends."""
    for piece in _pieces(chunk):
        piece.sent_ns, piece.resent = chunk.time_ns, chunk.resent
        session.target.flight.append(piece)


def _hold(session: Session, chunk: Chunk) -> None:
    for piece in _pieces(chunk):
        session.online.queue.append(piece)
        session.online.held_bytes += len(piece.data)


def _pieces(chunk: Chunk) -> Iterator[Chunk]:
    while len(chunk.data) > PIECE_BYTES:
        yield chunk.split(PIECE_BYTES)
    yield chunk


def may_give(session: Session) -> bool:
    """Whether the kernel could go on from here: nothing is out of the ordinary."""
    online, target = session.online, session.target
    return (
        session.state is GIVEN_IN
        and session.outcome is None
        and online.irs is not None
        and not online.queue
        and not online.early
        and online.fin_pos == NO_POSITION
        and not target.flight
        and not target.early
        and not target.sacked
        and target.snd_una == target.snd_nxt
        and target.recovery_end == NO_POSITION
        and target.fin_pos == NO_POSITION
    )


def describe(session: Session) -> KernelSession:
    """``session`` as the kernel goes on with it; only where :func:`may_give` says so."""
    online, target = session.online, session.target
    irs = online.irs or 0
    sent = (target.iss + target.snd_nxt) & MASK
    rcv_nxt = (target.irs + target.rcv_nxt) & MASK
    client_ack = (irs + online.rcv_nxt) & MASK
    known = KNOWN_IRS
    need = 0
    answered = said_before = 0
    if online.queue_need >= 0:
        known |= KNOWN_NEED
        need = (irs + online.queue_need + 1) & MASK
    if target.asked:
        known |= KNOWN_SENT
        answered = (target.irs + target.answered) & MASK
        said_before = (target.irs + target.said_before) & MASK
    if online.overlapping:
        known |= KNOWN_OVERLAP
    if target.doubtful:
        known |= KNOWN_DOUBT
    return KernelSession(
        lock=0, generation=0, owner=Owner.KERNEL, state=session.state.value,
        family=session.family, options=target.options, snd_wscale=target.snd_wscale,
        rcv_wscale=target.rcv_wscale, held=0, service=session.service,
        mss=target.mss, smss=target.smss, left=0, known=known,
        stretch=target.stretch, iss=target.iss,
        online_irs=irs, online_snd_nxt=sent, online_rcv_nxt=client_ack, online_need=need,
        sent_need=need, asked=(target.iss + target.asked) & MASK,
        irs=target.irs, snd_una=sent, snd_nxt=sent, snd_wnd=target.snd_wnd,
        snd_wl1=(target.irs + target.snd_wl1) & MASK,
        snd_wl2=(target.iss + target.snd_wl2) & MASK, rcv_nxt=rcv_nxt,
        rcv_acked=(target.irs + target.rcv_acked) & MASK, ts_recent=target.ts_recent,
        need_base=target.need_base & MASK, answered=answered, said_before=said_before,
        cwnd=min(target.cwnd, 1 << 30), ssthresh=min(target.ssthresh, 1 << 30),
        timed_end=0, held_sent=0, timed_ns=0, srtt_ns=target.srtt_ns,
        rttvar_ns=target.rttvar_ns, rto_ns=target.rto_ns, rto_at=0,
        ack_at=0 if session.ack_at == NEVER else session.ack_at,
        progress_ns=session.progress_ns, client_ns=session.last_client_ns, log_last=0,
        held_at=0, asked_ns=online.asked_ns, client_rtt_ns=online.rtt_ns,
        online=session.key, target=session.target_key,
    )  # fmt: skip


def unfinished(kernel: KernelSession, record: LogRecord) -> bool:
    """Whether the target has not acknowledged all of ``record`` yet."""
    return diff(record.end, kernel.snd_una) > 0
