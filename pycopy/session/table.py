"""All sessions of a run: lookup, timers, the way into the kernel and back.

Still sans-IO: the driver feeds it segments and the time and takes :attr:`Table.outbox`
away. A session is found by two keys of 36 bytes (KEY): its connection online and the
one to the target. How one begins, and whether it may, is opening.py's business.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush

from pycopy.session.addresses import Addresses
from pycopy.session.connection import Connection, Emission
from pycopy.session.fates import Count, Fate, ResponseFate, Tallies
from pycopy.session.keeper import Keeper
from pycopy.session.opening import Opening
from pycopy.session.owner import Nobody, Owner
from pycopy.session.rules import MS, SECOND, Rules
from pycopy.session.session import Session
from pycopy.session.states import Outcome, State
from pycopy.session.views import NEVER, Online
from pycopy.wire.segment import FIN, KIND_TOO_BIG, RST, SYN, Segment
from pycopy.wire.seq import MASK

#: How often the long limits of all sessions are looked at, and how many in one turn: a
#: hundred thousand at once would hold up the traffic.
SWEEP_NS = 5 * SECOND
SWEEP_STEP_NS = 10 * MS
SWEEP_SESSIONS = 1000

#: Stale entries that the timer queue may hold before it is cleaned.
STALE_TIMERS = 4096


class Table:
    """See the module. ``services[i]`` is (target address, 16 bytes; target port).

    ``owner`` is told of each connection to the target; ``keeper``: who keeps the healthy
    sessions, None: all are here.
    """

    def __init__(
        self, rules: Rules, ledger: Tallies, addresses: Addresses,
        services: Sequence[tuple[bytes, int]], path_mss: Callable[[bytes], int], start_ns: int,
        owner: Owner | None = None, keeper: Keeper | None = None,
    ) -> None:  # fmt: skip
        self.rules = rules
        self.ledger = ledger
        self.owner = owner or Nobody()
        self.keeper = keeper
        self.outbox: list[Emission] = []
        self.by_online: dict[bytes, Session] = {}
        self.by_target: dict[bytes, Session] = {}
        #: Why no session may be opened now; None: they may.
        self.refusing: Fate | None = None
        self._opening = Opening(self, addresses, services, path_mss, start_ns)
        #: Sessions that have become quiet: the kernel may have them.
        self._calm: dict[Session, None] = {}
        #: (deadline, tie-breaker, session). An entry is stale unless it is the session's
        #: ``scheduled_ns``.
        self._timers: list[tuple[int, int, Session]] = []
        self._timer_number = 0
        self._lingering: deque[tuple[int, Connection]] = deque()
        self._sweep_at = start_ns + SWEEP_NS
        self._sweep: Iterator[Session] | None = None

    def refuse(self, why: Fate | None) -> None:
        """What becomes of connections that begin from now on; None: sessions."""
        self.refusing = why

    # -- segments -------------------------------------------------------------------------

    def on_client(self, seg: Segment, payload: bytes, now_ns: int) -> None:
        """Take in one captured client segment; it gets exactly one fate, now or later."""
        counts = self.ledger.counts
        counts[Count.CAPTURED] += 1
        if payload:
            counts[Count.PAYLOAD] += 1
            counts[Count.PAYLOAD_BYTES] += len(payload)
        session = self.by_online.get(seg.key)
        if session is None and self.keeper is not None:
            session = self._adopt(self.keeper.fetch_online(seg.key, self, now_ns), now_ns)
        if seg.tcp_flags & SYN:
            counts[Count.SYN] += 1
            self._opening.on_syn(session, seg, payload, now_ns)
        elif session is not None:
            session.on_client_segment(seg, payload, now_ns)
            self._look_whether_calm(session)
        else:
            self._opening.on_unknown(seg, payload, now_ns)

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
        if session is None and self.keeper is not None:
            session = self._adopt(self.keeper.fetch_target(seg.key, self, now_ns), now_ns)
        if session is None:
            ledger.responses[ResponseFate.UNKNOWN] += 1
        elif seg.kind == KIND_TOO_BIG:
            ledger.responses[session.on_too_big(seg, now_ns)] += 1
        else:
            ledger.responses[session.on_target_segment(seg, now_ns)] += 1
            self._look_whether_calm(session)

    def on_taken(self, target_keys: Iterable[bytes], now_ns: int) -> None:
        """An intercept: another replay has a session at each of these addresses and ports."""
        for target_key in target_keys:
            session = self.by_target.get(target_key)
            if session is not None and session.state is State.SYN_SENT:
                self._opening.change_port(session, now_ns)

    # -- sessions that come from the kernel, and go back ------------------------------------

    def _adopt(self, session: Session | None, now_ns: int) -> Session | None:
        if session is None:
            return None
        self.by_online.setdefault(session.key, session)
        self.by_target[session.target_key] = session
        self.owner.claim(session.target_key)
        # Whatever became of the segment that brought it here: its own clock is to be set.
        session.deadline_ns = now_ns
        self.schedule(session)
        return session

    def adopt_all(self, sessions: Iterable[Session], now_ns: int) -> None:
        """Go on with what the keeper has handed over without a segment to go with it."""
        for session in sessions:
            self._adopt(session, now_ns)
            session.on_sweep(now_ns)
            if session.outcome is None:
                session.on_timer(now_ns)
                self._look_whether_calm(session)

    def _look_whether_calm(self, session: Session) -> None:
        if self.keeper is not None and self.keeper.may_give(session):
            self._calm[session] = None

    def give_back(self) -> None:
        """Let the keeper have what is quiet. Call it when nothing captured is left unread, and
        what was to be sent is sent.
        """
        calm, self._calm = self._calm, {}
        for session in calm:
            key, target_key = session.key, session.target_key
            mine = self.by_target.get(target_key) is session is self.by_online.get(key)
            if mine and self.keeper is not None and self.keeper.give(session):
                del self.by_online[key], self.by_target[target_key]
                session.scheduled_ns = NEVER
                self.owner.give(target_key)

    # -- what sessions ask of their host -----------------------------------------------------

    def schedule(self, session: Session) -> None:
        """Wake ``session`` at its deadline."""
        session.scheduled_ns = session.deadline_ns
        self._timer_number += 1
        heappush(self._timers, (session.deadline_ns, self._timer_number, session))
        if len(self._timers) > 2 * len(self.by_target) + STALE_TIMERS:
            self._timers = [each for each in self._timers if each[0] == each[2].scheduled_ns]
            heapify(self._timers)

    def reopen(self, session: Connection, online: Online, now_ns: int) -> None:
        """Send ``online``, what is left of the client's stream, over a new connection."""
        self._opening.reopen(session, online, now_ns)

    def detach(self, session: Connection) -> None:
        """The client's segments are no longer this session's."""
        if self.by_online.get(session.key) is session:
            del self.by_online[session.key]
            self.disown(session.key)

    def disown(self, key: bytes) -> None:
        """The connection ``key`` has no session here: the kernel may open its next one."""
        if self.keeper is not None:
            self.keeper.disown_online(key)

    def linger(self, session: Connection, until_ns: int) -> None:
        """Hand it the target's segments until then, and call ``expire``."""
        self._lingering.append((until_ns, session))

    def ended(self, session: Connection, outcome: Outcome) -> None:
        """Count its outcome; its client is unknown from now on."""
        self.ledger.outcomes[outcome] += 1
        session.scheduled_ns = NEVER
        if self.by_online.get(session.key) is session:
            self.detach(session)
            self._opening.remember(session, outcome)

    def forget(self, session: Connection) -> None:
        """There is nothing more to be done for it."""
        self.release(session.target_key)

    def release(self, target_key: bytes) -> None:
        """No session has this connection to the target any more."""
        del self.by_target[target_key]
        if self.keeper is not None:
            self.keeper.release(target_key)
        self.owner.release(target_key)

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
            over = lingering.popleft()[1]
            if self.by_target.get(over.target_key) is over:
                over.expire()
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
