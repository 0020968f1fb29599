"""How a session begins: with the client's SYN, in the middle of its stream, or in place of another.

One :class:`Opening` belongs to a table. It turns a connection online into one to the target:
admission.py says whether, addresses.py from where, and the limits of the run are looked at
here. It also remembers what a connection that has no session is to be known by when its
client goes on.
"""

from collections.abc import Callable, Sequence

from pycopy.session.addresses import Addresses, IsFree, other_port
from pycopy.session.admission import Admission
from pycopy.session.connection import Connection, drop
from pycopy.session.fates import Count, Fate
from pycopy.session.registry import Registry
from pycopy.session.rules import MAX_WSCALE, MIN_MSS
from pycopy.session.session import Session
from pycopy.session.states import Outcome, State
from pycopy.session.views import NO_POSITION, Online, Target
from pycopy.wire.address import family_of
from pycopy.wire.segment import (
    ACK,
    KEY,
    OPT_MSS,
    OPT_SACK_PERM,
    OPT_TIMESTAMPS,
    OPT_WSCALE,
    SYN,
    Segment,
)
from pycopy.wire.seq import MASK

#: Response bytes that a client joined mid-stream is taken to have received before.
JOINED_AT = 1 << 24

#: The MSS of a client that named none: the path decides.
NO_LIMIT = 0xFFFF

_ALL_OPTIONS = OPT_MSS | OPT_WSCALE | OPT_SACK_PERM | OPT_TIMESTAMPS

#: Outcomes that leave the client in the middle of something: not to be joined there.
_MID_REQUEST = frozenset(
    {Outcome.GAP, Outcome.QUEUE_FULL, Outcome.TARGET_SILENT, Outcome.INTERCEPT_ENDED}
)


class Opening:
    """See the module. ``services[i]`` is (target address, 16 bytes; target port)."""

    def __init__(
        self, table: Registry, addresses: Addresses, services: Sequence[tuple[bytes, int]],
        path_mss: Callable[[bytes], int], start_ns: int,
    ) -> None:  # fmt: skip
        self._table = table
        self._addresses = addresses
        self._services = services
        self._path_mss = path_mss
        #: One object for each MSS in use: a hundred thousand idle sessions have few.
        self._sizes: dict[int, int] = {}
        self._admission = Admission(table.rules, start_ns)

    # -- for a captured segment -----------------------------------------------------------

    def on_syn(self, session: Session | None, seg: Segment, payload: bytes, now_ns: int) -> None:
        """The client opens a connection; ``session`` is what its 5-tuple had until now."""
        table = self._table
        fates = table.ledger.fates
        if seg.tcp_flags & ACK:
            fates[Fate.STRAY] += 1
            return
        if session is not None:
            if session.online.iss == seg.seq:
                session.withdraw_reset()
                fates[Fate.DUPLICATE] += 1
                return
            self._supersede(session, now_ns)
        refusal = self._admission.refuse_new(seg.key, now_ns) or self._limit()
        if refusal is not None:
            fates[refusal] += 1
            table.disown(seg.key)
            return
        mss = max(seg.mss or NO_LIMIT, MIN_MSS)
        online = Online(seg.seq)
        online.asked_ns = seg.time_ns
        session = self._connect(
            seg.key, seg.service, online, 1, mss,
            min(seg.wscale, MAX_WSCALE), seg.options, now_ns, self._is_free,
        )  # fmt: skip
        if session is None:
            fates[Fate.REFUSED_NO_ADDRESS] += 1
            table.disown(seg.key)
            return
        session.open(now_ns)
        if payload:
            # RFC 9293 3.4: data on a SYN follows it in the stream; we send it after the handshake.
            data = seg._replace(seq=(seg.seq + 1) & MASK, tcp_flags=seg.tcp_flags & ~SYN)
            session.on_client_segment(data, payload, now_ns)
        else:
            fates[Fate.SENT] += 1

    def on_unknown(self, seg: Segment, payload: bytes, now_ns: int) -> None:
        """A segment of a connection that has no session: join it, or say why not."""
        table = self._table
        fates = table.ledger.fates
        refusal = self._admission.refuse_midstream(seg, now_ns)
        if refusal is not None:
            fates[refusal] += 1
            table.disown(seg.key)
            return
        online = Online((seg.seq - 1) & MASK)
        # Counting begins here, with room below for what is captured late.
        online.irs, online.rcv_nxt = (seg.ack - 1 - JOINED_AT) & MASK, 1 + JOINED_AT
        session = None
        refusal = self._limit()
        if refusal is None:
            session = self._connect(
                seg.key, seg.service, online, 1, NO_LIMIT,
                table.rules.join_wscale, _ALL_OPTIONS, now_ns, self._is_free,
            )  # fmt: skip
        if session is None:
            self._admission.watch(seg.key, seg.ack)
            fates[refusal or Fate.REFUSED_NO_ADDRESS] += 1
            table.disown(seg.key)
            return
        session.target.need_base = JOINED_AT
        table.ledger.counts[Count.MID_STREAM] += 1
        session.open(now_ns)
        session.on_client_segment(seg, payload, now_ns)

    def _supersede(self, session: Session, now_ns: int) -> None:
        """The client uses its port for a new connection while we still hold the old one."""
        if session.online.fin_pos != NO_POSITION:
            self._table.detach(session)  # it was closed; let it finish on its own
        else:
            session.truncate(Outcome.SUPERSEDED, Fate.DROPPED_SUPERSEDED, now_ns)

    # -- for a session that is over while its client goes on ----------------------------------

    def reopen(self, session: Connection, online: Online, now_ns: int) -> None:
        """Send ``online``, what is left of the client's stream, over a new connection."""
        if not online.queue and not online.early:
            self._leave(session, online)
            return
        table, old = self._table, session.target
        refusal, successor = self._limit(), None
        start = online.queue[0].pos if online.queue else online.snd_nxt
        if refusal is None:
            # What the first connection negotiated is what this target can do.
            successor = self._connect(
                session.key, session.service, online, start, old.mss,
                old.rcv_wscale, old.options, now_ns, self._is_unused,
            )  # fmt: skip
        if successor is None:
            drop((*online.queue, *online.early), refusal or Fate.REFUSED_NO_ADDRESS, table.ledger)
            self._leave(session, online)
            return
        table.ledger.counts[Count.REOPENED] += 1
        successor.ripen()
        successor.target.need_base = online.queue[0].need
        if online.early:
            successor.gap_at = now_ns + table.rules.gap_ns
        successor.open(now_ns)

    def change_port(self, session: Session, now_ns: int) -> None:
        """Another replay has this port at the target: begin again from another one.

        It may have that one, too: as often as a SYN is repeated, and in leaps of the client's
        own random number, since ports in use lie side by side.
        """
        table = self._table
        jump = session.target.iss
        target_key = None
        if session.attempts < table.rules.syn_retries:
            ports = self._addresses.ports
            target_key = other_port(session.target_key, jump, ports, self._is_unused)
        if target_key is None:
            return  # if it still repeats its SYN, it asks again each time for the port it has
        table.release(session.target_key)
        table.by_target[target_key] = session
        table.owner.claim(target_key)
        table.ledger.counts[Count.PORT_TAKEN] += 1
        session.change_port(target_key, now_ns)

    def remember(self, session: Connection, outcome: Outcome) -> None:
        """The client of ``session`` is unknown from now on, whatever it still sends."""
        online = session.online
        self._admission.ended(session.key, (online.iss + online.snd_nxt) & MASK)
        if outcome in _MID_REQUEST and online.fin_pos == NO_POSITION:
            self._watch(session.key, online)

    def _leave(self, session: Connection, online: Online) -> None:
        """Nobody takes ``online`` over. What was captured of it so far is not joined anew."""
        end = max(session.online.snd_nxt, online.snd_nxt, *(each.end for each in online.early))
        self._admission.ended(session.key, (online.iss + end) & MASK)
        self._watch(session.key, online)

    def _watch(self, key: bytes, online: Online) -> None:
        """The client goes on; join it again when its next request begins."""
        self._admission.watch(key, (online.rcv_nxt + (online.irs or 0)) & MASK)

    # -- the connection to the target ---------------------------------------------------------

    def _limit(self) -> Fate | None:
        """Why no session may be opened now, whoever the client is."""
        table = self._table
        if table.refusing is not None:
            return table.refusing
        sessions = len(table.by_target)
        if table.keeper is not None:
            sessions += table.keeper.now_active()
        return Fate.REFUSED_SESSION_LIMIT if sessions >= table.rules.max_sessions else None

    def _connect(
        self, key: bytes, service: int, online: Online, start: int, mss: int,
        wscale: int, options: int, now_ns: int, is_free: IsFree,
    ) -> Session | None:  # fmt: skip
        """Make a session whose first byte is position ``start``; None: no address is free."""
        table = self._table
        target_addr, target_port = self._services[service]
        client_addr, _, client_port, _ = KEY.unpack(key)
        target_key = self._addresses.allocate(
            client_addr, client_port, target_addr, target_port, is_free
        )
        if target_key is None:
            return None
        mss = min(mss, self._path_mss(target_addr))
        mss = self._sizes.setdefault(mss, mss)
        target = Target(online.iss, start, mss, table.rules.rto_initial_ns)
        target.options = options
        target.rcv_wscale = wscale
        family = family_of(target_addr)
        session = Session(table, key, target_key, family, service, online, target, now_ns)
        # The client may have begun another connection while this one is being reopened.
        table.by_online.setdefault(key, session)
        table.by_target[target_key] = session
        if table.keeper is not None:
            table.keeper.own_online(key)
        self._admission.over(key)
        table.ledger.counts[Count.SESSIONS] += 1
        table.owner.claim(target_key)
        return session

    def _is_free(self, target_key: bytes) -> bool:
        """True if no session uses ``target_key``; one that only lingers gives way."""
        table = self._table
        session = table.by_target.get(target_key)
        if session is not None:
            if session.outcome is None and session.state is not State.TIME_WAIT:
                return False
            session.expire()
        return table.keeper is None or table.keeper.claim(target_key, over_lingering=True)

    def _is_unused(self, target_key: bytes) -> bool:
        """True if not even a lingering session had ``target_key``.

        A reopened connection goes on with the same sequence numbers: what was delayed of the
        one before would fit in (RFC 9293 3.4.3), so it needs another port.
        """
        table = self._table
        if target_key in table.by_target:
            return False
        return table.keeper is None or table.keeper.claim(target_key)
