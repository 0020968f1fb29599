"""A session changes hands between the kernel (bpf/session.h) and this engine, losing nothing.

Pure translation: 32-bit numbers of ``struct pycopy_session`` to positions that never wrap,
and back. What a field is, session/fields.py says; only where the two do not keep the same
thing is there code for one field. What the kernel had sent without an acknowledgement, and what
it held, comes along as records of its log and becomes the flight and the queue.
"""

from collections.abc import Iterator, Sequence, Set
from operator import attrgetter
from typing import Any, Protocol

from pycopy.kernel.abi import LOG_BOUNDARY, LogRecord, Owner
from pycopy.session.fields import FIELDS, KernelSession, Known, Space
from pycopy.session.rules import NO_SSTHRESH
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


#: Spaces whose numbers both executors keep alike.
_ALIKE = frozenset({Space.BITS, Space.COUNT, Space.TIME, Space.DURATION, Space.CONNECTION})


def _declared(owner: str, spaces: Set[Space]) -> list[tuple[int, str, int]]:
    """(index, attribute, bits of ``known`` that it needs) of each field that ``owner`` has.

    ``owner``: "online", "target", or "" for the session itself.
    """
    return [
        (index, field.at.rpartition(".")[2], int(field.present or 0))
        for index, field in enumerate(FIELDS)
        if field.at and field.at.rpartition(".")[0] == owner and field.space in spaces
    ]


#: What adopt() sets.
_OF_SESSION = _declared("", _ALIKE)
_OF_ONLINE = _declared("online", _ALIKE)
_OF_TARGET = _declared("target", _ALIKE)
_DEADLINES = _declared("", {Space.DEADLINE})
_SENT_OF_TARGET = _declared("target", {Space.SENT})
_SAID_OF_TARGET = _declared("target", {Space.TARGET})
_BITS = [(int(bit), *bit.at.rpartition(".")[::2]) for bit in Known if bit.at]

#: And what as_kernel() reads.
_READ = [field.name for field in FIELDS if field.at and field.space in _ALIKE]
_read = attrgetter(*(field.at for field in FIELDS if field.at and field.space in _ALIKE))
_STREAMS = (Space.SENT, Space.ONLINE, Space.TARGET)
_READ_POSITIONS = [
    (field.name, _STREAMS.index(field.space), attrgetter(field.at), int(field.present or 0))
    for field in FIELDS
    if field.at and field.space in _STREAMS
]
_READ_BITS = [(int(bit), attrgetter(bit.at)) for bit in Known if bit.at]
_NOTHING = {field.name: 0 for field in FIELDS}


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
    for index, attribute, _ in _DEADLINES:
        setattr(session, attribute, kernel[index] or NEVER)
    for index, attribute, _ in _OF_SESSION:
        setattr(session, attribute, kernel[index])
    for mask, owner, attribute in _BITS:
        setattr(getattr(session, owner), attribute, bool(kernel.known & mask))
    return session


def _online(kernel: KernelSession) -> Online:
    online = Online(kernel.iss)
    for index, attribute, _ in _OF_ONLINE:
        setattr(online, attribute, kernel[index])
    online.snd_nxt = _sent_position(kernel, kernel.online_snd_nxt)
    if kernel.known & Known.IRS:
        online.irs = kernel.online_irs
        online.rcv_nxt = (kernel.online_rcv_nxt - kernel.online_irs) & MASK
    if kernel.known & Known.NEED:
        if _need(kernel, online, kernel.online_need) < 0:
            online.rcv_nxt += _WRAP
        online.queue_need = _need(kernel, online, kernel.online_need)
    if kernel.known & Known.FIN:
        online.fin_pos = online.snd_nxt - 1
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
    values: tuple[Any, ...] = kernel
    for index, attribute, _ in _OF_TARGET:
        setattr(target, attribute, values[index])
    target.snd_una = una
    target.snd_nxt = _sent_position(kernel, kernel.snd_nxt)
    if State(kernel.state) is State.SYN_SENT:
        return target
    target.rcv_nxt = _target_position(kernel)
    for index, attribute, needs in _SENT_OF_TARGET:
        if kernel.known & needs == needs:
            setattr(target, attribute, una + diff(values[index], kernel.snd_una))
    for index, attribute, needs in _SAID_OF_TARGET:
        if kernel.known & needs == needs:
            setattr(target, attribute, target.rcv_nxt + diff(values[index], kernel.rcv_nxt))
    if kernel.known & Known.IRS:
        # The kernel counts modulo 2^32: the one near what both servers have said so far.
        lead = online.rcv_nxt - target.rcv_nxt
        target.need_base = lead + diff(kernel.need_base, lead & MASK)
    return target


def _target_position(kernel: KernelSession) -> int:
    """``rcv_nxt``, so far on that nothing that was said lies before the first position."""
    position = (kernel.rcv_nxt - kernel.irs) & MASK
    said = [kernel.rcv_acked]
    if kernel.known & Known.SENT:
        said += kernel.answered, kernel.said_before
    if position + min(diff(number, kernel.rcv_nxt) for number in said) < 0:
        position += _WRAP
    return position


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


def as_kernel(session: Session) -> dict[str, Any]:
    """The fields of ``session``, by name, in the kernel's numbers.

    Without those that are the kernel's own, and those whose bit of ``known`` is not set. The
    states of both executors are compared by it: all that is not sampled is equal.
    """
    online, target = session.online, session.target
    irs = online.irs or 0
    known: int = Known.IRS if online.irs is not None else 0
    if online.queue_need >= 0:
        known |= Known.NEED
    if online.fin_pos != NO_POSITION:
        known |= Known.FIN
    if target.asked:
        known |= Known.SENT
    for mask, is_set in _READ_BITS:
        if is_set(session):
            known |= mask
    fields = dict(zip(_READ, _read(session), strict=True))
    firsts = target.iss, irs, target.irs  # of _STREAMS
    for name, stream, position, needs in _READ_POSITIONS:
        if known & needs == needs:
            fields[name] = (firsts[stream] + position(session)) & MASK
    if known & Known.IRS:
        fields["online_irs"] = irs
    if known & Known.NEED:
        fields["online_need"] = (irs + online.queue_need + 1) & MASK
    fields |= dict(
        state=session.state.value, known=known, iss=target.iss,
        need_base=target.need_base & MASK,
        ack_at=0 if session.ack_at == NEVER else session.ack_at,
    )  # fmt: skip
    return fields


def describe(session: Session) -> KernelSession:
    """``session`` as the kernel goes on with it; only where :func:`may_give` says so."""
    fields = _NOTHING | as_kernel(session)
    fields["owner"] = Owner.KERNEL
    fields["sent_need"] = fields["online_need"]
    for window in ("cwnd", "ssthresh"):  # which have no limit here
        fields[window] = min(fields[window], NO_SSTHRESH)
    return KernelSession(**fields)


def unfinished(kernel: KernelSession, record: LogRecord) -> bool:
    """Whether the target has not acknowledged all of ``record`` yet."""
    return diff(record.end, kernel.snd_una) > 0
