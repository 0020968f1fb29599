"""All sessions of a run: lookup, opening and closing, timers.

Still sans-IO: the driver feeds it segments and the time and takes :attr:`Table.outbox`
away. A session is found by two keys of 36 bytes (abi.KEY): its connection online and the
one to the target. Who may be copied at all is admission.py's business.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush

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
    KernelSession,
    Segment,
)
from pycopy.inet import family_of
from pycopy.ledger import Count, Fate, Ledger, ResponseFate
from pycopy.seq import MASK
from pycopy.session.addresses import Addresses, IsFree
from pycopy.session.admission import Admission
from pycopy.session.arrival import MAX_WSCALE, MIN_MSS
from pycopy.session.handover import Kernel, Logged, adopt, describe, may_give
from pycopy.session.rules import MS, SECOND, Rules
from pycopy.session.session import Emission, Session, drop
from pycopy.session.states import Outcome, State
from pycopy.session.views import NEVER, NO_POSITION, Online, Target

#: How often the long limits of all sessions are looked at, and how many in one turn: a
#: hundred thousand at once would hold up the traffic.
SWEEP_NS = 5 * SECOND
SWEEP_STEP_NS = 10 * MS
SWEEP_SESSIONS = 1000

#: Stale entries that the timer queue may hold before it is cleaned.
STALE_TIMERS = 4096

#: Response bytes that a client joined mid-stream is taken to have received before.
JOINED_AT = 1 << 24

#: The MSS of a client that named none: the path decides.
NO_LIMIT = 0xFFFF

_ALL_OPTIONS = OPT_MSS | OPT_WSCALE | OPT_SACK_PERM | OPT_TIMESTAMPS

#: Outcomes that leave the client in the middle of something: not to be joined there.
_MID_REQUEST = frozenset(
    {Outcome.GAP, Outcome.QUEUE_FULL, Outcome.TARGET_SILENT, Outcome.INTERCEPT_ENDED}
)


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
        #: One object for each MSS in use: a hundred thousand idle sessions have few.
        self._sizes: dict[int, int] = {}
        self._admission = Admission(rules, start_ns)
        #: Who keeps the healthy sessions; None: all are here.
        self.kernel: Kernel | None = None
        #: Sessions that have become quiet: the kernel may have them.
        self._calm: dict[Session, None] = {}
        #: (deadline, tie-breaker, session). An entry is stale unless it is the session's
        #: ``scheduled_ns``.
        self._timers: list[tuple[int, int, Session]] = []
        self._timer_number = 0
        self._lingering: deque[tuple[int, Session]] = deque()
        self._sweep_at = start_ns + SWEEP_NS
        self._sweep: Iterator[Session] | None = None

    # -- segments -------------------------------------------------------------------------

    def on_client(self, seg: Segment, payload: bytes, now_ns: int) -> None:
        """Take in one captured client segment; it gets exactly one fate, now or later."""
        counts = self.ledger.counts
        counts[Count.CAPTURED] += 1
        if payload:
            counts[Count.PAYLOAD] += 1
            counts[Count.PAYLOAD_BYTES] += len(payload)
        session = self.by_online.get(seg.key)
        if session is None and self.kernel is not None:
            session = self._adopt(self.kernel.fetch_online(seg.key), now_ns)
        if seg.tcp_flags & SYN:
            counts[Count.SYN] += 1
            self._on_syn(session, seg, payload, now_ns)
        elif session is not None:
            session.on_client_segment(seg, payload, now_ns)
            self._look_whether_calm(session)
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
        if session is None and self.kernel is not None:
            session = self._adopt(self.kernel.fetch_target(seg.key), now_ns)
        if session is None:
            ledger.responses[ResponseFate.UNKNOWN] += 1
        else:
            ledger.responses[session.on_target_segment(seg, now_ns)] += 1
            self._look_whether_calm(session)

    # -- sessions that come from the kernel, and go back ------------------------------------

    def _adopt(
        self, found: tuple[KernelSession, list[Logged]] | None, now_ns: int
    ) -> Session | None:
        if found is None:
            return None
        session = adopt(self, *found, now_ns)
        self.by_online.setdefault(session.key, session)
        self.by_target[session.target_key] = session
        # Whatever became of the segment that brought it here: its own clock is to be set.
        session.deadline_ns = now_ns
        self.schedule(session)
        return session

    def adopt_all(self, found: Iterable[tuple[KernelSession, list[Logged]]], now_ns: int) -> None:
        """Go on with what the kernel has handed over without a segment to go with it."""
        for each in found:
            session = self._adopt(each, now_ns)
            assert session is not None
            session.on_sweep(now_ns)
            if session.outcome is None:
                session.on_timer(now_ns)
                self._look_whether_calm(session)

    def _look_whether_calm(self, session: Session) -> None:
        if self.kernel is not None and may_give(session):
            self._calm[session] = None

    def give_back(self) -> None:
        """Let the kernel have what is quiet. Call it when nothing captured is left unread, and
        what was to be sent is sent.
        """
        calm, self._calm = self._calm, {}
        for session in calm:
            key, target_key = session.key, session.target_key
            mine = self.by_target.get(target_key) is session is self.by_online.get(key)
            if not mine or not may_give(session) or self.kernel is None:
                continue
            if self.kernel.give(describe(session)):
                del self.by_online[key], self.by_target[target_key]
                session.scheduled_ns = NEVER

    # -- opening --------------------------------------------------------------------------

    def _on_syn(self, session: Session | None, seg: Segment, payload: bytes, now_ns: int) -> None:
        fates = self.ledger.fates
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
            return
        mss = max(seg.mss or NO_LIMIT, MIN_MSS)
        session = self._connect(
            seg.key, seg.service, Online(seg.seq), 1, mss,
            min(seg.wscale, MAX_WSCALE), seg.options, now_ns, self._is_free,
        )  # fmt: skip
        if session is None:
            fates[Fate.REFUSED_NO_ADDRESS] += 1
            return
        session.open(now_ns)
        if payload:
            # RFC 9293 3.4: data on a SYN follows it in the stream; we send it after the handshake.
            data = seg._replace(seq=(seg.seq + 1) & MASK, tcp_flags=seg.tcp_flags & ~SYN)
            session.on_client_segment(data, payload, now_ns)
        else:
            fates[Fate.SENT] += 1

    def _on_unknown(self, seg: Segment, payload: bytes, now_ns: int) -> None:
        """A segment of a connection that has no session: join it, or say why not."""
        fates = self.ledger.fates
        refusal = self._admission.refuse_midstream(seg, now_ns)
        if refusal is not None:
            fates[refusal] += 1
            return
        online = Online((seg.seq - 1) & MASK)
        # Counting begins here, with room below for what is captured late.
        online.irs, online.rcv_nxt = (seg.ack - 1 - JOINED_AT) & MASK, 1 + JOINED_AT
        session = None
        refusal = self._limit()
        if refusal is None:
            session = self._connect(
                seg.key, seg.service, online, 1, NO_LIMIT,
                self.rules.join_wscale, _ALL_OPTIONS, now_ns, self._is_free,
            )  # fmt: skip
        if session is None:
            self._admission.watch(seg.key, seg.ack)
            fates[refusal or Fate.REFUSED_NO_ADDRESS] += 1
            return
        session.target.need_base = JOINED_AT
        self.ledger.counts[Count.MID_STREAM] += 1
        session.open(now_ns)
        session.on_client_segment(seg, payload, now_ns)

    def _limit(self) -> Fate | None:
        """Why no session may be opened now, whoever the client is."""
        if self.closed_for is not None:
            return self.closed_for
        sessions = len(self.by_target)
        if self.kernel is not None:
            sessions += self.kernel.now_active()
        return Fate.REFUSED_SESSION_LIMIT if sessions >= self.rules.max_sessions else None

    def _connect(
        self, key: bytes, service: int, online: Online, start: int, mss: int,
        wscale: int, options: int, now_ns: int, is_free: IsFree,
    ) -> Session | None:  # fmt: skip
        """Make a session whose first byte is position ``start``; None: no address is free."""
        target_addr, target_port = self._services[service]
        client_addr, _, client_port, _ = KEY.unpack(key)
        target_key = self._addresses.allocate(
            client_addr, client_port, target_addr, target_port, is_free
        )
        if target_key is None:
            return None
        mss = min(mss, self._path_mss(target_addr))
        mss = self._sizes.setdefault(mss, mss)
        target = Target(online.iss, start, mss, self.rules.rto_initial_ns)
        target.options = options
        target.rcv_wscale = wscale
        family = family_of(target_addr)
        session = Session(self, key, target_key, family, service, online, target, now_ns)
        # The client may have begun another connection while this one is being reopened.
        self.by_online.setdefault(key, session)
        self.by_target[target_key] = session
        if self.kernel is not None:
            self.kernel.own_online(key)
        self._admission.over(key)
        self.ledger.counts[Count.SESSIONS] += 1
        self.on_claim(target_key)
        return session

    def _is_free(self, target_key: bytes) -> bool:
        """True if no session uses ``target_key``; one that only lingers gives way."""
        session = self.by_target.get(target_key)
        if session is not None:
            if session.outcome is None and session.state is not State.TIME_WAIT:
                return False
            session.expire()
        return self.kernel is None or self.kernel.claim(target_key)

    def _is_unused(self, target_key: bytes) -> bool:
        """True if not even a lingering session had ``target_key``.

        A reopened connection goes on with the same sequence numbers: what was delayed of the
        one before would fit in (RFC 9293 3.4.3), so it needs another port.
        """
        if target_key in self.by_target:
            return False
        return self.kernel is None or self.kernel.claim(target_key)

    def _supersede(self, session: Session, now_ns: int) -> None:
        """The client uses its port for a new connection while we still hold the old one."""
        if session.online.fin_pos != NO_POSITION:
            self.detach(session)  # it was closed; let it finish on its own
        else:
            session.cut_off(Outcome.SUPERSEDED, Fate.DROPPED_SUPERSEDED, now_ns)

    # -- what sessions ask of their host -----------------------------------------------------

    def schedule(self, session: Session) -> None:
        """Wake ``session`` at its deadline."""
        session.scheduled_ns = session.deadline_ns
        self._timer_number += 1
        heappush(self._timers, (session.deadline_ns, self._timer_number, session))
        if len(self._timers) > 2 * len(self.by_target) + STALE_TIMERS:
            self._timers = [each for each in self._timers if each[0] == each[2].scheduled_ns]
            heapify(self._timers)

    def reopen(self, session: Session, online: Online, now_ns: int) -> None:
        """Send ``online``, what is left of the client's stream, over a new connection."""
        if not online.queue and not online.early:
            self._watch(session.key, online)
            return
        old, refusal, successor = session.target, self._limit(), None
        start = online.queue[0].pos if online.queue else online.snd_nxt
        if refusal is None:
            # What the first connection negotiated is what this target can do.
            successor = self._connect(
                session.key, session.service, online, start, old.mss,
                old.rcv_wscale, old.options, now_ns, self._is_unused,
            )  # fmt: skip
        if successor is None:
            drop((*online.queue, *online.early), refusal or Fate.REFUSED_NO_ADDRESS, self.ledger)
            self._watch(session.key, online)
            return
        self.ledger.counts[Count.REOPENED] += 1
        successor.ripen()
        successor.target.need_base = online.queue[0].need
        if online.early:
            successor.gap_at = now_ns + self.rules.gap_ns
        successor.open(now_ns)

    def _watch(self, key: bytes, online: Online) -> None:
        """The client goes on; join it again when its next request begins."""
        self._admission.watch(key, (online.rcv_nxt + (online.irs or 0)) & MASK)

    def detach(self, session: Session) -> None:
        """The client's segments are no longer this session's."""
        if self.by_online.get(session.key) is session:
            del self.by_online[session.key]
            if self.kernel is not None:
                self.kernel.disown_online(session.key)

    def linger(self, session: Session, until_ns: int) -> None:
        """Hand it the target's segments until then, and call ``expire``."""
        self._lingering.append((until_ns, session))

    def ended(self, session: Session, outcome: Outcome) -> None:
        """Count its outcome; its client is unknown from now on."""
        self.ledger.outcomes[outcome] += 1
        session.scheduled_ns = NEVER
        if self.by_online.get(session.key) is session:
            self.detach(session)
            online = session.online
            self._admission.ended(session.key, (online.iss + online.snd_nxt) & MASK)
            if outcome in _MID_REQUEST and session.online.fin_pos == NO_POSITION:
                self._watch(session.key, session.online)

    def forget(self, session: Session) -> None:
        """There is nothing more to be done for it."""
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
            due_ns, _, session = heappop(timers)
            if due_ns != session.scheduled_ns:
                continue
            session.scheduled_ns = NEVER
            if session.deadline_ns <= now_ns:
                session.on_timer(now_ns)
                self._look_whether_calm(session)
            elif session.deadline_ns < NEVER:
                self.schedule(session)
            timers = self._timers
        lingering = self._lingering
        while lingering and lingering[0][0] <= now_ns:
            session = lingering.popleft()[1]
            if self.by_target.get(session.target_key) is session:
                session.expire()
        if now_ns >= self._sweep_at:
            self._sweep_some(now_ns)

    def _sweep_some(self, now_ns: int) -> None:
        """Look at the long limits of some sessions, and come back for more."""
        if self._sweep is None:
            self._sweep = iter(list(self.by_target.values()))
        for _ in range(SWEEP_SESSIONS):
            session = next(self._sweep, None)
            if session is None:
                self._sweep = None
                self._sweep_at = now_ns + SWEEP_NS
                return
            if session.outcome is None and self.by_target.get(session.target_key) is session:
                session.on_sweep(now_ns)
        self._sweep_at = now_ns + SWEEP_STEP_NS

    def busy(self) -> int:
        """Sessions that still have something to bring to the target."""
        return sum(
            1
            for session in self.by_target.values()
            if session.online.queue or session.target.flight or session.online.early
        )

    def shed(self, limit_bytes: int, now_ns: int) -> None:
        """Hold no more than ``limit_bytes`` in all: end whole sessions, the largest first."""
        holders = [each for each in self.by_target.values() if each.online.held_bytes]
        held_bytes = sum(each.online.held_bytes for each in holders)
        holders.sort(key=lambda each: each.online.held_bytes)
        while held_bytes > limit_bytes:
            session = holders.pop()
            held_bytes -= session.online.held_bytes
            session.end(Outcome.QUEUE_FULL, Fate.DROPPED_QUEUE_FULL, now_ns)

    def end_all(
        self, now_ns: int, outcome: Outcome = Outcome.RUN_ENDED,
        fate: Fate = Fate.DROPPED_RUN_ENDED,
    ) -> None:  # fmt: skip
        """Nothing can be answered any more: reset what is open, so that the target is left with
        nothing half done."""
        for session in list(self.by_target.values()):
            if session.outcome is None and session.state is not State.TIME_WAIT:
                if session.state is State.SYN_SENT:
                    # Where the SYN has arrived this is acceptable (RFC 9293 3.10.7.4).
                    session.emit_raw(RST, (session.target.iss + 1) & MASK, 0, b"", now_ns)
                session.end(outcome, fate, now_ns)
            session.expire()
