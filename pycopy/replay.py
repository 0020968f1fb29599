"""``pycopy replay``: the driver on the online server. Wiring, signals, order of things.

    capture ring -> session table -> egress            (what clients send)
    self intercept's ring, or the channel -> table     (the target's responses)

No rule of TCP or of replay is in this file. Start-up goes from the target back to the
traffic (next hop, intercept, capture), so that nothing is captured before it can be
replayed; shutdown goes the other way.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterable

from pycopy.command.config import ReplayConfig
from pycopy.command.services import describe, describe_endpoints
from pycopy.egress.egress import Egress
from pycopy.errors import EXIT_FAILED, EXIT_OK, PeerError, PycopyError, UsageError, explain
from pycopy.fastpath.driver import FastPath
from pycopy.fastpath.handover import Keeper
from pycopy.fastpath.kernel import KernelSessions
from pycopy.host.devices import find_devices
from pycopy.host.nexthop import Hop, NextHops
from pycopy.kernel.abi import CaptureCount, InterceptCount
from pycopy.kernel.attach import Hook
from pycopy.kernel.heartbeat import Heartbeat
from pycopy.process import daemon, memory
from pycopy.process.console import say, while_slow
from pycopy.process.life import Life, Phase
from pycopy.process.loop import NEVER_NS, READ, Loop
from pycopy.process.quiet import until_quiet
from pycopy.process.signals import Signals
from pycopy.report.ledger import Ledger
from pycopy.report.notices import Lapses, Silence
from pycopy.report.reporter import Console, Reporter
from pycopy.responses.base import Responses
from pycopy.responses.choose import Choice
from pycopy.session.fates import Fate
from pycopy.session.rules import MS, SECOND, Rules
from pycopy.session.states import Outcome
from pycopy.session.table import Table
from pycopy.sources.live import Captures, load_captures
from pycopy.tap import Tap, Transport, choose_transport, sum_counters
from pycopy.wire.segment import Segment

#: Responses taken from a ring before timers and the other inputs get their turn.
BATCH = 256
#: Shortest time between two turns of the loop: what arrives meanwhile is one batch, which
#: saves a wake-up per segment. It bounds what batching adds to a copy's delay.
COALESCE_NS = 300_000
#: How often the kernel's counters and our own memory are looked at, and the interfaces if the
#: kernel has told of a change.
HOUSEKEEPING_NS = SECOND
#: How often the interfaces are looked at all the same.
LOOK_NS = 10 * SECOND
#: How long a clean end waits for what is held and in flight.
DRAIN_NS = 5 * SECOND
#: How often it looks whether sessions are still busy: that reads them all.
BUSY_NS = 10 * MS
#: After the last session is quiet: time for a captured segment to reach us.
SETTLE_NS = SECOND // 5
START_TIMEOUT_S = 5.0
#: Why segments are not sent, in the ledger, beside the names of errno.
NO_INTERCEPT = "NO_INTERCEPT"
#: This part of -m is for what sessions hold, once it is exceeded, and as much for what is lifted
#: out of the rings: the rest is what sessions are made of.
PAYLOAD_SHARE = 4


class Replay:
    """One run. Build it, :meth:`start`, :meth:`run`, :meth:`finish`, :meth:`close` (always)."""

    def __init__(
        self, config: ReplayConfig, ledger: Ledger, reporter: Reporter,
        ours: Callable[[list[Segment]], list[Segment]] = lambda records: records,
    ) -> None:  # fmt: skip
        """``ours`` tells which of an intercept's records are this run's."""
        self.config = config
        self._life = Life()
        self._ledger = ledger
        self._reporter = reporter
        self._ours = ours
        self._memory = memory.Limit(config.memory_mb)
        self._payload_bytes = (config.memory_mb << 20) // PAYLOAD_SHARE
        self._lapses = Lapses(ledger)
        self._targets = [(each.target_addr, each.target_port) for each in config.services]
        self._housekeeping_at = self._look_at = self._changes_seen = self._woken_ns = 0
        self._busy = self._busy_at = 0
        self._undo = contextlib.ExitStack()
        self._heartbeat = Heartbeat()
        self._loop = Loop(self._heartbeat.beat)
        self._undo.callback(self._loop.close)
        others = {signal.SIGUSR1: self._show, signal.SIGHUP: daemon.hang_up(self.stop)}
        self._signals = Signals(
            self._loop, self.stop, others, starting=True, second_ends=reporter.second_ends
        )
        self._undo.callback(self._signals.close)
        self._hops = NextHops(self._on_hop_change)
        self._undo.callback(self._hops.close)
        self._egress = Egress(self._hops, ledger, config.mtu)
        self._undo.callback(self._egress.close)
        self._attached = self._undo.enter_context(contextlib.ExitStack())
        self._undo.callback(self._heartbeat.close)
        self._fastpath: FastPath | None = None
        self._hop_listeners: list[Callable[[Hop], None]] = []
        reporter.join(self._loop, self.stop)

    # Made by start(), which may do so twice: first with the fast path.
    _responses: Responses
    _table: Table
    _captures: Captures
    _silence: Silence

    # -- start ----------------------------------------------------------------------------

    def start(self) -> None:
        """Resolve, attach, connect; raises PycopyError with everything undone by close()."""
        self._loop.add(self._hops.fileno(), READ, self._hops.on_readable)
        hops = self._hops.resolve_all(addr for addr, _ in self._targets)
        with while_slow("looking for the way to the targets"):
            self._hops.wait_usable(START_TIMEOUT_S)
        for hop in hops:
            self._egress.prepare(hop)
        self._attach()
        self._silence = Silence(
            self._ledger, describe_endpoints(self._targets), self._responses.hints
        )
        self._signals.started()

    def _attach(self) -> None:
        """With the fast path if this host can have it; if not, say so once, with all that is
        known of the reason."""
        config = self.config
        self._heartbeat.open()
        transport = choose_transport(config.transport == "perf", config.ring_bytes, self._heartbeat)
        choice = Choice(config, self, self._loop, self._hops, self._targets)
        why = choice.why_no_fastpath()
        if not why:
            try:
                kernel = KernelSessions(
                    len(config.services), config.max_sessions, config.backlog_bytes
                )
                self._attached.callback(kernel.close)
                self._attach_with(choice, kernel, transport)
                return
            except (UsageError, PeerError):
                raise  # nothing that would go better without
            except (PycopyError, OSError) as error:
                why = str(explain(error) or error)
            self._fastpath = None
            self._hop_listeners.clear()
            self._attached.close()
        self._ledger.fastpath = {"state": f"off: {why}"}
        self._attach_with(choice, None, transport)
        if config.fastpath:
            say(f"fast path off: {why}")

    def _attach_with(
        self, choice: Choice, kernel: KernelSessions | None, transport: Transport
    ) -> None:
        """Make the parts, each of those before it; then put them to use."""
        config, ledger, hops, egress = self.config, self._ledger, self._hops, self._egress
        responses = self._responses = choice.make(transport, kernel)
        self._attached.callback(responses.close)
        # First, so that nothing leaves by a device where responses are not swallowed yet.
        self._hop_listeners.append(responses.on_hop_change)
        self._table = Table(
            _rules(config), ledger, responses.addresses, self._targets, egress.path_mss,
            time.monotonic_ns(), responses, Keeper(kernel) if kernel else None,
        )  # fmt: skip
        if kernel is not None:
            self._fastpath = FastPath(
                config, kernel, self._table, ledger, hops, egress, responses.families,
                responses.why_not_relayed,
            )  # fmt: skip
            self._hop_listeners.append(self._fastpath.on_hop_change)
        # Loading takes its time on a busy machine: an intercept must not wait for it.
        self._captures = self._load_captures(transport, kernel)
        self._attached.callback(self._captures.close)
        responses.start()
        self._heartbeat.begin()
        self._captures.begin()
        responses.catch_up()

    def _load_captures(self, transport: Transport, kernel: KernelSessions | None) -> Captures:
        config = self.config
        services = [(each.online_addr, each.online_port) for each in config.services]
        hook = Hook.XDP if config.hook == "xdp" else Hook.TC_INGRESS
        taps = load_captures(
            find_devices(config.interfaces), services, hook, config.filter, transport,
            config.forwarded, kernel.maps if kernel else None, (config.worker, config.workers),
        )  # fmt: skip
        return Captures(taps, self._loop, self._table.on_client, self._payload_bytes)

    def _on_hop_change(self, hop: Hop) -> None:
        for tell in self._hop_listeners:
            tell(hop)

    def copying(self) -> str:
        """What is copied, and from where: the banner's first part."""
        return f"copying {describe(self.config.services)} from {self._captures.describe()}"

    def responding(self) -> str:
        """Who swallows the responses: the second."""
        return self._responses.describe()

    def carrying(self) -> str:
        """Who does the work: the last."""
        if self._fastpath is None:
            return "fast path off"
        return "fast path on" if not self._fastpath.why_closed else "fast path off for now"

    # -- input ----------------------------------------------------------------------------

    def on_response_ring(self, tap: Tap, _events: int) -> None:
        now_ns = time.monotonic_ns()
        on_target = self._table.on_target
        for segment, _ in tap.drain(BATCH):
            on_target(segment, now_ns)

    def on_records(self, records: list[Segment]) -> None:
        now_ns = time.monotonic_ns()
        records = self._ours(records)
        self._ledger.by_channel += len(records)
        on_target = self._table.on_target
        for segment in records:
            on_target(segment, now_ns)

    def on_taken(self, target_keys: Iterable[bytes]) -> None:
        self._table.on_taken(target_keys, time.monotonic_ns())

    def live_claims(self) -> Iterable[bytes]:
        return tuple(self._table.by_target)

    def on_bye(self) -> None:
        """An intercept is about to leave: the last moment at which responses are swallowed.

        The target forgets the copies, or it would go on answering them, to real clients.
        """
        now_ns = time.monotonic_ns()
        if self._fastpath is not None:
            self._fastpath.stop(now_ns)
        self._table.end_all(now_ns, Outcome.INTERCEPT_ENDED, Fate.REFUSED_NO_INTERCEPT)
        self._egress.flush(self._table.outbox)

    def on_way_change(self) -> None:
        """Say whether sessions may be opened now, by whom, and whether anything may be sent."""
        responses, fastpath = self._responses, self._fastpath
        refusing = None
        if self._memory.exceeded:
            refusing = Fate.REFUSED_MEMORY_LIMIT
        elif responses.silenced:
            refusing = Fate.REFUSED_NO_INTERCEPT
        self._table.refuse(refusing)
        if fastpath is not None:
            fastpath.refuse(refusing is not None)
            fastpath.set_silenced(responses.silenced)
            fastpath.set_relayed(responses.why_not_relayed)

    # -- the loop -------------------------------------------------------------------------

    def stop(self) -> None:
        """Drain, and return from :meth:`run`."""
        self._life.stop()

    def run(self) -> None:
        """Copy until told to stop, then drain. Raises PycopyError when no device is left."""
        self._life.begin()
        while self._life.phase is Phase.RUNNING:
            self._turn()
        self._captures.detach()
        if self._fastpath is not None:
            self._fastpath.stop(time.monotonic_ns())
        until_quiet(self._is_busy, self._turn, DRAIN_NS, SETTLE_NS)

    def _is_busy(self) -> bool:
        """Whether something is still to be sent or acknowledged, or to be read."""
        now_ns = time.monotonic_ns()
        if now_ns >= self._busy_at:
            self._busy_at = now_ns + BUSY_NS
            self._busy = self._table.busy()
        return bool(self._busy) or self._captures.is_unread()

    def _turn(self, until_ns: int = NEVER_NS) -> None:
        """Wait for what comes next, but not beyond ``until_ns``, and handle it."""
        table, fastpath = self._table, self._fastpath
        now_ns = time.monotonic_ns()
        if now_ns >= self._housekeeping_at:
            self._housekeeping_at = now_ns + HOUSEKEEPING_NS
            self._housekeep()
        table_ns = table.deadline_ns()
        if now_ns >= table_ns:
            # First what has come: when we are late, a target must not seem quiet that is not.
            self._loop.wait(0)
            table.on_time(now_ns)
            self._send()
            table_ns = table.deadline_ns()
        responses_ns = self._responses.deadline_ns
        hops_ns = self._hops.deadline_ns
        fast_ns = fastpath.deadline_ns if fastpath else NEVER_NS
        # The clock again: timers and sending may have taken the time that is left.
        rest_ns = self._woken_ns + COALESCE_NS - time.monotonic_ns()
        if rest_ns > 0:
            time.sleep(rest_ns / 1e9)
        self._loop.wait(
            min(until_ns, self._housekeeping_at, table_ns, responses_ns, hops_ns, fast_ns)
        )
        self._woken_ns = now_ns = time.monotonic_ns()
        if now_ns >= responses_ns:
            self._responses.on_timer(now_ns)
        if now_ns >= hops_ns:
            self._hops.tick(now_ns)
        if fastpath is not None and now_ns >= fast_ns:
            fastpath.on_timer(now_ns)
        self._send()
        if fastpath is not None and self._life.phase is Phase.RUNNING and not self._pending():
            fastpath.after_turn(self._pending)

    def _pending(self) -> bool:
        """Whether a record is unread."""
        responses = self._responses.taps
        return self._captures.is_unread() or any(tap.ring.pending_bytes() for tap in responses)

    def _send(self) -> None:
        """Claims first: an intercept must know whose the response is before it comes."""
        self._responses.flush()
        outbox = self._table.outbox
        if outbox and self._responses.silenced:
            # Lost on the way, for the sessions: TCP repairs it once the intercept is back.
            self._egress.drop(outbox, NO_INTERCEPT)
        elif outbox:
            self._egress.flush(outbox)

    def _housekeep(self) -> None:
        now_ns = time.monotonic_ns()
        if self._reporter.watches or self._silence.lasts:
            self._refresh_counters()
            if self._silence.lasts:
                self._silence.look(now_ns)
        if self._life.phase is Phase.RUNNING:
            self._responses.forget_released()
            if self._fastpath is not None:
                self._fastpath.forget_released()
            changes = self._hops.changes
            if changes != self._changes_seen or now_ns >= self._look_at:
                self._look_at, self._changes_seen = now_ns + LOOK_NS, changes
                self._watch_host()
        missed_ns = self._heartbeat.take_lapse()
        if missed_ns:
            self._refresh_counters()
            self._lapses.tell(missed_ns)
        if self._memory.look():
            self._table.shed(self._payload_bytes, time.monotonic_ns())
        self.on_way_change()
        self._reporter.on_second()

    def _watch_host(self) -> None:
        """Addresses and devices come and go while we run."""
        if not self._captures.watch():
            raise PycopyError(
                "every interface that was captured is gone",
                "start pycopy again once it is back",
            )
        self._responses.watch()

    def _refresh_counters(self) -> None:
        ledger, responses = self._ledger, self._responses
        ledger.kernel_capture = sum_counters(self._captures.taps, CaptureCount)
        if responses.taps:
            ledger.kernel_intercept = sum_counters(responses.taps, InterceptCount)
        taps = (*self._captures.taps, *responses.taps)
        ledger.ring_pending_bytes = sum(tap.ring.pending_bytes() for tap in taps)
        ledger.active = len(self._table.by_target)
        if self._fastpath is not None:
            self._fastpath.refresh()
        ledger.intercept_dropped = responses.dropped

    def _show(self) -> None:
        self._refresh_counters()
        self._reporter.show()

    # -- end ------------------------------------------------------------------------------

    def finish(self) -> list[str]:
        """Reset what is still open, detach, settle the ledger; return what does not balance."""
        self._captures.detach()
        self._table.end_all(time.monotonic_ns())
        self._send()
        for tap in self._responses.taps:
            tap.detach()
        self._count_rest()
        self._refresh_counters()
        self._life.enter(Phase.FINISHED)
        self._ledger.settle()
        return self._ledger.balance()

    def _count_rest(self) -> None:
        """What is left in the rings when the run ends still gets its fate."""
        self._table.refuse(Fate.DROPPED_RUN_ENDED)
        self._captures.read_rest()
        for tap in self._responses.taps:
            while tap.ring.pending_bytes():
                self.on_response_ring(tap, READ)
        self._table.outbox.clear()

    def close(self) -> None:
        """Undo everything, in reverse order; safe after a failed start."""
        self._undo.close()


def _rules(config: ReplayConfig) -> Rules:
    return Rules(
        wait_for_response=config.wait_for_response,
        only_full_sessions=config.only_full_sessions,
        sample_percent=config.sample_percent,
        ramp=config.ramp,
        response_idle_ns=config.response_idle_s * SECOND,
        idle_ns=config.session_idle_s * SECOND,
        max_sessions=config.max_sessions,
    )


def run(config: ReplayConfig) -> int:
    """Run until stopped; return the exit status. Raises PycopyError when start-up fails."""
    ledger = Ledger()
    title = f"pycopy replay {describe(config.services)}"
    console = Console(ledger, config.interval_s, config.quiet, config.json, title)
    replay = Replay(config, ledger, console)
    view, failure = console.view, None
    try:
        replay.start()
        say(f"ready: {replay.copying()}; {replay.responding()}; {replay.carrying()}")
        daemon.ready()
        view.start()
        try:
            replay.run()
        except PycopyError as error:
            failure = error  # accounts first
        wrong = replay.finish()
        view.stop()
        view.summary()
        for sentence in wrong:
            say(f"pycopy: the ledger does not balance: {sentence}")
        if failure is not None:
            raise failure
        return EXIT_FAILED if wrong else EXIT_OK
    finally:
        view.stop()
        replay.close()
