"""The fast path as replay drives it: set up, kept informed, given time, and wound up.

The driver calls :meth:`FastPath.on_timer` when ``deadline_ns`` is due and
:meth:`FastPath.after_turn` when it has nothing unread and nothing unsent. Everything that
is counted in the kernel is added to the ledger here, so that it shows nowhere who did it.
"""

from collections.abc import Callable, Iterable, Sequence

from pycopy.command.config import ReplayConfig
from pycopy.egress.egress import Egress
from pycopy.fastpath.handover import Logged, adopt
from pycopy.fastpath.kernel import KernelSessions, active
from pycopy.host.nexthop import Hop, NextHops
from pycopy.kernel.abi import FastCount, Left
from pycopy.report.ledger import Ledger
from pycopy.session.fates import Count, Fate, ResponseFate
from pycopy.session.fields import KernelSession
from pycopy.session.rules import MS, SECOND
from pycopy.session.states import Outcome
from pycopy.session.table import Table
from pycopy.wire.address import family_of

#: How often the kernel's sessions are looked at: what an acknowledgement or a timeout may
#: come late. Waking up for it is most of what a healthy run costs this process.
TICK_NS = 40 * MS
#: The same while a request is held, which may leave because time has passed.
HOLDING_NS = 20 * MS
#: The same while none of them has anything pending.
REST_NS = 100 * MS
#: How often all of them are looked at, for the long limits.
SWEEP_NS = 5 * SECOND

#: Kernel counter by counter: where it stands in the ledger.
_COUNTS = {
    FastCount.CLIENT: Count.CAPTURED,
    FastCount.SYN: Count.SYN,
    FastCount.PAYLOAD: Count.PAYLOAD,
    FastCount.PAYLOAD_BYTES: Count.PAYLOAD_BYTES,
    FastCount.RESPONSES: Count.RESPONSES,
    FastCount.RESPONSE_PAYLOAD: Count.RESPONSE_PAYLOAD,
    FastCount.RESPONSE_FIN: Count.RESPONSE_FIN,
    FastCount.OPENED: Count.SESSIONS,
    FastCount.ESTABLISHED: Count.ESTABLISHED,
    FastCount.OUT_SEGMENTS: Count.SENT_SEGMENTS,
    FastCount.OUT_PAYLOAD: Count.SENT_PAYLOAD,
    FastCount.OUT_SYN: Count.SENT_SYN,
    FastCount.OUT_FIN: Count.SENT_FIN,
    FastCount.OUT_ACK: Count.SENT_ACK,
    FastCount.RELEASED_BY_QUIET: Count.RELEASED_BY_QUIET,
}
_FATES = {
    FastCount.SENT_AT_ONCE: Fate.SENT,
    FastCount.RELEASED: Fate.SENT,
    FastCount.HELD: Fate.HELD,
    FastCount.STEERED: Fate.STEERED,
    FastCount.DUPLICATE: Fate.DUPLICATE,
}
_RESPONSES = {
    FastCount.RESPONSES_STEERED: ResponseFate.STEERED,
    FastCount.RESPONSES_DUPLICATE: ResponseFate.DUPLICATE,
}

#: What a device refused to send, in the ledger, beside the names of errno.
NOT_SENT = "IN_KERNEL"


def add_to(ledger: Ledger, grown: Sequence[int]) -> None:
    """Add what the kernel has counted (``enum pycopy_fast_count``) to the ledger."""
    for fast, count in _COUNTS.items():
        ledger.counts[count] += grown[fast]
    for fast, fate in _FATES.items():
        ledger.fates[fate] += grown[fast]
    ledger.fates[Fate.HELD] -= grown[FastCount.RELEASED]
    for fast, response in _RESPONSES.items():
        ledger.responses[response] += grown[fast]
    ledger.outcomes[Outcome.CLOSED] += grown[FastCount.CLOSED]
    for bucket in range(len(ledger.hold)):
        ledger.hold[bucket] += grown[FastCount.HOLD_TIME + bucket]
    if grown[FastCount.OUT_FAILED]:
        errors = ledger.send_errors
        errors[NOT_SENT] = errors.get(NOT_SENT, 0) + grown[FastCount.OUT_FAILED]


class FastPath:
    """One run's, over a ``kernel`` that is not loaded yet, and which is the caller's to close.

    ``families``: of which IP versions responses can come to the kernel at all;
    ``why_not_relayed``: why they do not now. Raises PycopyError.
    """

    def __init__(
        self, config: ReplayConfig, kernel: KernelSessions, table: Table, ledger: Ledger,
        hops: NextHops, egress: Egress, families: frozenset[int], why_not_relayed: str,
    ) -> None:  # fmt: skip
        self._kernel, self._table, self._ledger = kernel, table, ledger
        self._hops, self._egress = hops, egress
        #: By target: the services that go there, each with its port, and what the programs were
        #: told of the way; they share it.
        self._services_of: dict[bytes, list[tuple[int, int]]] = {}
        for index, service in enumerate(config.services):
            its = self._services_of.setdefault(service.target_addr, [])
            its.append((index, service.target_port))
        self._told: dict[bytes, tuple[object, ...]] = {}
        #: Sampling is user space's: the kernel opens nothing then.
        self._samples = config.sample_percent < 100 or config.ramp
        self._refusing = False
        self._silenced = False
        self._why_not_relayed = why_not_relayed
        self._families = families
        self._sweep_at = 0
        self._seen: list[int] = kernel.counters()
        self.deadline_ns = 0
        kernel.configure(table.rules)
        self._tell_relayed()
        self.on_hop_change()
        kernel.load(14)

    def refuse(self, refusing: bool) -> None:
        """Whether no sessions may be opened now."""
        self._refusing = refusing
        self._close_if_need_be()

    def set_relayed(self, why_not: str) -> None:
        """Why responses do not come straight to the kernel, where a session is better off here;
        empty: they do."""
        self._why_not_relayed = why_not
        self._tell_relayed()

    def _tell_relayed(self) -> None:
        self._kernel.accept(frozenset() if self._why_not_relayed else self._families)
        self._close_if_need_be()

    def _close_if_need_be(self) -> None:
        """At once; it is opened again only when all is read."""
        if self.why_closed:
            self._kernel.set_closed(True)

    @property
    def why_closed(self) -> str:
        """Why the kernel opens no session now; empty: it does."""
        if self._samples:
            return "-r and -g choose clients in user space"
        if self._refusing:
            return "no session may be opened now"
        return self._why_not_relayed

    def set_silenced(self, silenced: bool) -> None:
        """Whether nothing may be sent, since its response could reach a real client."""
        if silenced != self._silenced:
            self._silenced = silenced
            self.on_hop_change()

    def on_hop_change(self, changed: Hop | None = None) -> None:
        """Tell the programs where frames to a target go now; None: to all of them."""
        if changed is None:
            for target in self._services_of:
                self._tell_way(self._hops.resolve(target))
        elif changed.destination in self._services_of:
            self._tell_way(changed)

    def _tell_way(self, hop: Hop) -> None:
        """Thousands of services may go there: only what is new is written."""
        target = hop.destination
        family, mss = family_of(target), self._egress.path_mss(target)
        allowed = family in self._families and not self._silenced
        way = (hop.ifindex, hop.usable, hop.l2, hop.source, mss, allowed)
        if self._told.get(target) == way:
            return
        for index, port in self._services_of[target]:
            self._kernel.set_hop(index, hop, family, port, mss, allowed)
        self._told[target] = way

    def on_timer(self, now_ns: int) -> None:
        """Let time pass for the kernel's sessions, and take over what needs judgement."""
        if now_ns >= self._sweep_at:
            self._sweep_at = now_ns + SWEEP_NS
            self._kernel.sweep()
        self._adopt(self._kernel.on_timer(), now_ns)
        self.deadline_ns = now_ns + self._pause_ns()

    def _adopt(self, found: Iterable[tuple[KernelSession, list[Logged]]], now_ns: int) -> None:
        table = self._table
        table.adopt_all([adopt(table, *each, now_ns) for each in found], now_ns)

    def _pause_ns(self) -> int:
        if self._kernel.holding:
            return HOLDING_NS
        return TICK_NS if self._kernel.pending else REST_NS

    def after_turn(self, is_unread: Callable[[], bool]) -> None:
        """Nothing captured is unread, nothing is unsent."""
        self._table.give_back()
        # Not earlier: a SYN that is unread must not be overtaken by the next one.
        self._kernel.set_closed(bool(self.why_closed))
        self._kernel.forget_disowned(is_unread)

    def forget_released(self) -> None:
        """Once a second: swallow late segments no longer of what was over before the last call."""
        self._kernel.forget_released()

    def refresh(self) -> None:
        """Bring the ledger up to date."""
        ledger, now = self._ledger, self._kernel.counters()
        grown = [new - old for new, old in zip(now, self._seen, strict=True)]
        self._seen = now
        add_to(ledger, grown)
        ledger.active += active(now)
        ledger.fastpath = self._section(now)

    def _section(self, now: list[int]) -> dict[str, int | float | str]:
        """The line of the view: what share stayed in the kernel, and why sessions left it."""
        counts = self._ledger.counts
        kernel = now[FastCount.CLIENT] + now[FastCount.RESPONSES]
        everything = counts[Count.CAPTURED] + counts[Count.RESPONSES]
        section: dict[str, int | float | str] = {
            "state": f"off: {self.why_closed}" if self.why_closed else "on",
            "kernel_segments": kernel,
            "user_segments": everything - kernel,
            "kernel_percent": round(100 * kernel / everything, 2) if everything else 0.0,
            "sessions_taken": now[FastCount.TAKEN],
            "sessions_given": now[FastCount.GIVEN],
        }
        for left in Left:
            if now[FastCount.LEFT + left]:
                section[f"left_{left.name.lower()}"] = now[FastCount.LEFT + left]
        return section

    def stop(self, now_ns: int) -> None:
        """Every session is user space's from here on: the run ends, or they must."""
        self._kernel.set_closed(True)
        self._adopt(self._kernel.fetch_all(), now_ns)
