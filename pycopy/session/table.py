"""All sessions of a run: lookup, admission, limits, timers.

Still sans-IO: the driver feeds it segments and the time and takes :attr:`Table.outbox`
away. A session is found by two keys of 36 bytes (abi.KEY): its connection online and the
one to the target.
"""

from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from zlib import crc32

from pycopy.abi import (
    ACK,
    FIN,
    KEY,
    OPT_MSS,
    OPT_SACK_PERM,
    OPT_TIMESTAMPS,
    OPT_WSCALE,
    RST,
    SYN,
    Segment,
)
from pycopy.ledger import Count, Fate, Ledger, ResponseFate
from pycopy.seq import MASK
from pycopy.session.addresses import Addresses
from pycopy.session.rules import SECOND, Rules
from pycopy.session.session import Emission, Session
from pycopy.session.states import FIN_IN_FLIGHT, Outcome, State
from pycopy.session.views import NEVER, Online, Target

#: How often the long limits are looked at.
SWEEP_NS = 5 * SECOND

#: Mid-stream connections watched for the beginning of a request.
WATCHED_MAX = 65_536

_ALL_OPTIONS = OPT_MSS | OPT_WSCALE | OPT_SACK_PERM | OPT_TIMESTAMPS


class Table:
    """See the module. ``services[i]`` is (target address, 16 bytes; target port)."""

    def __init__(
        self, rules: Rules, ledger: Ledger, addresses: Addresses,
        services: Sequence[tuple[bytes, int]], path_mss: Callable[[bytes], int], start_ns: int,
    ) -> None:  # fmt: skip
        self.rules = rules
        self.ledger = ledger
        self.outbox: list[Emission] = []
        self.by_online: dict[bytes, Session] = {}
        self.by_target: dict[bytes, Session] = {}
        #: Told of the key towards the target when a session opens and ends.
        self.on_claim: Callable[[bytes], None] = lambda key: None
        self.on_release: Callable[[bytes], None] = lambda key: None
        #: Why no session may be opened now; None: they may.
        self.closed_for: Fate | None = None
        self._addresses = addresses
        self._services = services
        self._path_mss = path_mss
        self._start_ns = start_ns
        self._timers: list[tuple[int, int, Session]] = []
        self._timer_number = 0
        self._lingering: deque[tuple[int, Session]] = deque()
        self._sweep_at = start_ns + SWEEP_NS
        #: Mid-stream connections not yet joined, and the ack they were first seen with.
        self._watched: dict[bytes, int] = {}
        #: With -g: connections that began before their client's turn came.
        self._left_out: set[bytes] = set()

    # -- segments -------------------------------------------------------------------------

    def on_client(self, seg: Segment, payload: bytes, now_ns: int) -> None:
        """Take in one captured client segment; it gets exactly one fate, now or later."""
        counts = self.ledger.counts
        counts[Count.CAPTURED] += 1
        if payload:
            counts[Count.PAYLOAD] += 1
            counts[Count.PAYLOAD_BYTES] += len(payload)
        session = self.by_online.get(seg.key)
        if seg.tcp_flags & SYN:
            counts[Count.SYN] += 1
            self._on_syn(session, seg, payload, now_ns)
        elif session is not None:
            session.on_client_segment(seg, payload, now_ns)
        else:
            self._on_unknown(seg, payload, now_ns)

    def on_target(self, seg: Segment, now_ns: int) -> None:
        """Take in one response, from the ring or from an intercept."""
        ledger = self.ledger
        counts = ledger.counts
        counts[Count.RESPONSES] += 1
        flags = seg.tcp_flags
        if seg.seg_len:
            counts[Count.RESPONSE_PAYLOAD] += 1
        if flags & (FIN | RST):
            counts[Count.RESPONSE_FIN if flags & FIN else Count.RESPONSE_RST] += 1
        session = self.by_target.get(seg.key)
        if session is None:
            ledger.responses[ResponseFate.UNKNOWN] += 1
        else:
            ledger.responses[session.on_target_segment(seg, now_ns)] += 1

    # -- admission ------------------------------------------------------------------------

    def _on_syn(
        self, session: Session | None, seg: Segment, payload: bytes, now_ns: int
    ) -> None:
        fates = self.ledger.fates
        if seg.tcp_flags & ACK:
            fates[Fate.STRAY] += 1
            return
        if session is not None:
            if session.online.iss == seg.seq:
                fates[Fate.DUPLICATE] += 1
                return
            self._supersede(session, now_ns)
        refusal = self._refusal(seg.key, now_ns)
        if refusal is not None:
            if refusal is Fate.SAMPLED_OUT and self.rules.ramp:
                self._left_out.add(seg.key)
            fates[refusal] += 1
            return
        self._left_out.discard(seg.key)
        self._watched.pop(seg.key, None)
        online = Online(seg.seq)
        session = self._open(seg, online, 1, seg.mss, seg.wscale, seg.options, now_ns)
        if session is None:
            fates[Fate.REFUSED_NO_ADDRESS] += 1
        elif payload:
            # RFC 9293 3.4: data on a SYN follows it in the stream; we send it after the handshake.
            data = seg._replace(seq=(seg.seq + 1) & MASK, tcp_flags=seg.tcp_flags & ~SYN)
            session.on_client_segment(data, payload, now_ns)
        else:
            fates[Fate.SENT] += 1

    def _on_unknown(self, seg: Segment, payload: bytes, now_ns: int) -> None:
        """A segment of a connection that has no session: join it, or say why not."""
        fates = self.ledger.fates
        key = seg.key
        if not payload:
            if seg.tcp_flags & (FIN | RST):
                self._watched.pop(key, None)
                self._left_out.discard(key)
            fates[Fate.STRAY] += 1
            return
        if self.rules.only_full_sessions:
            fates[Fate.REFUSED_MID_STREAM] += 1
            return
        refusal = Fate.SAMPLED_OUT if key in self._left_out else self._refusal(key, now_ns)
        if refusal is None and not self._at_boundary(seg, now_ns):
            refusal = Fate.REFUSED_MID_STREAM
        if refusal is not None:
            fates[refusal] += 1
            return
        online = Online((seg.seq - 1) & MASK)
        session = self._open(seg, online, 1, 0, self.rules.join_wscale, _ALL_OPTIONS, now_ns)
        if session is None:
            fates[Fate.REFUSED_NO_ADDRESS] += 1
            return
        self.ledger.counts[Count.MID_STREAM] += 1
        session.on_client_segment(seg, payload, now_ns)

    def _at_boundary(self, seg: Segment, now_ns: int) -> bool:
        """A request begins here if the client received something since its last segment,
        or was silent since we began to look."""
        first_ack = self._watched.get(seg.key)
        if first_ack is None:
            if now_ns - self._start_ns >= self.rules.join_quiet_ns:
                return True
            if len(self._watched) >= WATCHED_MAX:
                self._watched.clear()
            self._watched[seg.key] = seg.ack
            return False
        if seg.ack == first_ack:
            return False
        del self._watched[seg.key]
        return True

    def _refusal(self, key: bytes, now_ns: int) -> Fate | None:
        """Why no session may be opened for the client of ``key``, or None."""
        rules = self.rules
        share = rules.sample_percent
        if rules.ramp:
            share = min(share, 1 + (now_ns - self._start_ns) // SECOND)
        if share < 100 and crc32(key[:16]) % 100 >= share:
            return Fate.SAMPLED_OUT
        if self.closed_for is not None:
            return self.closed_for
        if len(self.by_target) >= rules.max_sessions:
            return Fate.REFUSED_SESSION_LIMIT
        return None

    def _open(
        self, seg: Segment, online: Online, start: int, mss: int, wscale: int, options: int,
        now_ns: int,
    ) -> Session | None:  # fmt: skip
        return self._connect(
            seg.key, seg.family, seg.service, online, start, mss, wscale, options, now_ns
        )

    def _connect(
        self, key: bytes, family: int, service: int, online: Online, start: int, mss: int,
        wscale: int, options: int, now_ns: int,
    ) -> Session | None:  # fmt: skip
        """Open a session whose first byte is position ``start``; None: no address is free."""
        target_addr, target_port = self._services[service]
        client_addr, _, client_port, _ = KEY.unpack(key)
        target_key = self._addresses.allocate(
            client_addr, client_port, target_addr, target_port, self._is_free
        )
        if target_key is None:
            return None
        limit = self._path_mss(target_addr)
        target = Target(online.iss, start, min(mss or limit, limit), self.rules.rto_initial_ns)
        target.options = options
        target.rcv_wscale = wscale
        session = Session(self, key, target_key, family, service, online, target, now_ns)
        self.by_online[key] = session
        self.by_target[target_key] = session
        self.ledger.counts[Count.SESSIONS] += 1
        self.on_claim(target_key)
        session.open(now_ns)
        return session

    def _is_free(self, target_key: bytes) -> bool:
        """True if no session uses ``target_key``; one that only lingers gives way."""
        session = self.by_target.get(target_key)
        if session is None:
            return True
        if session.state is State.TIME_WAIT:
            session.expire()
            return True
        return False

    def _supersede(self, session: Session, now_ns: int) -> None:
        """The client uses its port for a new connection while we still hold the old one."""
        if session.online.fin_pos >= 0 or session.state in FIN_IN_FLIGHT:
            del self.by_online[session.key]  # it was closed; let it finish on its own
        else:
            session.end(Outcome.SUPERSEDED, Fate.DROPPED_SUPERSEDED, now_ns)

    # -- what sessions ask of their host -----------------------------------------------------

    def schedule(self, session: Session) -> None:
        """Wake ``session`` at its deadline. Stale entries are skipped when they come up."""
        session.scheduled_ns = session.deadline_ns
        self._timer_number += 1
        heappush(self._timers, (session.deadline_ns, self._timer_number, session))

    def linger(self, session: Session, until_ns: int) -> None:
        """Keep ``session`` in TIME_WAIT until then."""
        self._lingering.append((until_ns, session))

    def reopen(self, session: Session, now_ns: int) -> None:
        """The target closed early: what the client still sends goes over a new connection."""
        online, old = session.online, session.target
        first = online.queue[0]
        session.online = Online(online.iss)
        session.online.fin_pos = 0
        if session.state is State.CLOSED:
            session.end(session.lost_to, Fate.DROPPED_TARGET_RESET, now_ns)
        else:
            session.close(now_ns)
        successor = self._connect(
            session.key, session.family, session.service, online, first.pos, old.mss,
            old.rcv_wscale, old.options, now_ns,
        )  # fmt: skip
        if successor is None:
            self._drop(online, Fate.REFUSED_NO_ADDRESS)
            return
        successor.target.need_base = first.need
        successor.gap_at = session.gap_at
        session.gap_at = NEVER
        self.ledger.counts[Count.REOPENED] += 1

    def _drop(self, online: Online, fate: Fate) -> None:
        dropped = sum(chunk.records for chunk in online.queue) + len(online.early)
        self.ledger.fates[Fate.HELD] -= dropped
        self.ledger.fates[fate] += dropped

    def ended(self, session: Session) -> None:
        """Forget ``session``."""
        if session.outcome is not None:
            self.ledger.outcomes[session.outcome] += 1
        if self.by_online.get(session.key) is session:
            del self.by_online[session.key]
            if session.outcome is Outcome.GAP:
                # The client goes on; join it again when its next request begins.
                self._watched[session.key] = (
                    session.online.rcv_nxt + (session.online.irs or 0)
                ) & MASK
        if self.by_target.get(session.target_key) is session:
            del self.by_target[session.target_key]
        self.on_release(session.target_key)

    # -- time -----------------------------------------------------------------------------

    def deadline_ns(self) -> int:
        """When :meth:`on_time` has something to do."""
        deadline_ns = self._sweep_at
        if self._timers:
            deadline_ns = min(deadline_ns, self._timers[0][0])
        if self._lingering:
            deadline_ns = min(deadline_ns, self._lingering[0][0])
        return deadline_ns

    def on_time(self, now_ns: int) -> None:
        """Run every timer that is due."""
        timers = self._timers
        while timers and timers[0][0] <= now_ns:
            _, _, session = heappop(timers)
            session.scheduled_ns = NEVER
            if session.outcome is not None:
                continue
            if session.deadline_ns <= now_ns:
                session.on_timer(now_ns)
            elif session.deadline_ns < NEVER:
                self.schedule(session)
        lingering = self._lingering
        while lingering and lingering[0][0] <= now_ns:
            session = lingering.popleft()[1]
            if session.outcome is None:
                session.expire()
        if now_ns >= self._sweep_at:
            self._sweep_at = now_ns + SWEEP_NS
            for session in list(self.by_target.values()):
                if session.outcome is None:
                    session.on_sweep(now_ns)

    def busy(self) -> int:
        """Sessions that still have something to bring to the target."""
        return sum(
            1
            for session in self.by_target.values()
            if session.online.queue or session.target.flight or session.online.early
        )

    def end_all(self, now_ns: int) -> None:
        """The run ends: reset what is open, so that the target is left with nothing half done."""
        for session in list(self.by_target.values()):
            session.end(Outcome.RUN_ENDED, Fate.DROPPED_RUN_ENDED, now_ns)
