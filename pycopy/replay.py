"""``pycopy replay``: the driver on the online server. Wiring, signals, order of things.

    capture ring -> session table -> egress          (what clients send)
    self intercept's ring, or the channel -> table   (what the target answers)

No rule of TCP or of replay is in this file. Start-up goes from the target back to the
traffic (next hop, intercept, capture), so that nothing is captured before it can be
replayed; shutdown goes the other way.
"""

import contextlib
import signal
import time
from collections.abc import Sequence
from functools import partial

from pycopy.command.config import ReplayConfig
from pycopy.command.services import describe, describe_endpoints
from pycopy.egress.egress import Egress
from pycopy.errors import EXIT_FAILED, EXIT_OK, PeerError, PycopyError, UsageError, explain
from pycopy.fastpath.driver import FastPath
from pycopy.host.devices import find_devices
from pycopy.host.nexthop import Hop, NextHops
from pycopy.kernel.abi import CaptureCount, InterceptCount
from pycopy.kernel.attach import Hook
from pycopy.kernel.heartbeat import Heartbeat
from pycopy.process import daemon, memory
from pycopy.process.console import say, while_slow
from pycopy.process.loop import NEVER_NS, READ, Loop
from pycopy.process.signals import Signals
from pycopy.report.ledger import Ledger
from pycopy.report.view import View
from pycopy.responses.base import Answers
from pycopy.responses.elsewhere import ChannelAnswers
from pycopy.responses.here import OwnAnswers
from pycopy.session.fates import Count, Fate
from pycopy.session.rules import MS, SECOND, Rules
from pycopy.session.states import Outcome
from pycopy.session.table import Table
from pycopy.sources.live import Capture, load_captures
from pycopy.tap import Tap, Transport, choose_transport
from pycopy.wire.segment import Segment

#: Records taken from a ring before timers and the other inputs get their turn.
BATCH = 256
#: The same from a ring that fills faster than that: what is lifted meanwhile keeps it from
#: running over.
BUSY_BATCH = 64
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
#: SYNs without any answer for so long are worth a word.
SILENCE_NS = 3 * SECOND


class Replay:
    """One run. Build it, :meth:`start`, :meth:`run`, :meth:`close` (always)."""

    def __init__(self, config: ReplayConfig) -> None:
        self.config = config
        self.ledger = Ledger()
        self._heartbeat = Heartbeat()
        self._loop = Loop(self._heartbeat.beat)
        self._captures: list[Capture] = []
        self._first_syn_ns = 0
        #: Segments not copied in the lapses that have been told of.
        self._lapsed = 0
        #: Nothing has come back so far, and nothing was said about it.
        self._silent = True
        self._hops = NextHops(self._on_hop_change)
        #: Devices by which targets have been reached: index and name.
        self._ways_out: set[tuple[int, str]] = set()
        self._fastpath: FastPath | None = None
        self._egress = Egress(self._hops, self.ledger, config.mtu)
        self._targets = [(each.target_addr, each.target_port) for each in config.services]
        self._answers: Answers = (
            ChannelAnswers(
                config, self._loop, self._targets, self._on_records, self._on_response_ring,
                self._open_or_close, self._on_bye,
            )
            if config.intercepts
            else OwnAnswers(config, self._loop, self._hops, self._targets, self._on_response_ring)
        )  # fmt: skip
        self._housekeeping_at = 0
        self._look_at = 0
        self._changes_seen = 0
        self._woken_ns = 0
        self._draining = False
        self._stopping = False
        self._finished = False
        self._out_of_memory = False
        self._payload_bytes = (config.memory_mb << 20) // PAYLOAD_SHARE
        services = describe(config.services)
        self.view = View(
            self.snapshot, config.interval_s, config.quiet, config.json, f"pycopy replay {services}"
        )
        #: Somebody looks at the ledger while we run: it is kept up to date.
        self._watched = not config.quiet
        self._signals = Signals(
            self._loop,
            self._stop,
            {signal.SIGUSR1: self._print_ledger, signal.SIGHUP: daemon.hang_up(self._stop)},
        )
        self._signals.at_once = True

    # -- start ----------------------------------------------------------------------------

    def start(self) -> None:
        """Resolve, attach, connect; raises PycopyError with everything undone by close()."""
        self._loop.add(self._hops.fileno(), READ, self._hops.on_readable)
        hops = self._hops.resolve_all(addr for addr, _ in self._targets)
        with while_slow("looking for the way to the targets"):
            self._hops.wait_usable(START_TIMEOUT_S)
        for hop in hops:
            self._egress.prepare(hop)
        self.table = Table(
            self._rules(), self.ledger, self._answers.addresses(), self._targets,
            self._egress.path_mss, time.monotonic_ns(),
        )  # fmt: skip
        self._attach()
        # Before anybody hears that it runs: who reads "ready" may end it in order.
        self._signals.at_once = False

    def _attach(self) -> None:
        """With the fast path if this host can have it; if not, say so once, with all that is
        known of the reason."""
        self._heartbeat.open()
        transport = choose_transport(
            self.config.transport == "perf", self.config.ring_bytes, self._heartbeat
        )
        why = self._why_no_fastpath()
        if not why:
            try:
                self._attach_with(FastPath(self.config), transport)
                return
            except (UsageError, PeerError):
                raise  # nothing that would go better without
            except (PycopyError, OSError) as error:
                why = str(explain(error) or error)
            self._undo_attach()
        self.ledger.fastpath = {"state": f"off: {why}"}
        self._attach_with(None, transport)
        if self.config.fastpath:
            say(f"fast path off: {why}")

    def _why_no_fastpath(self) -> str:
        if not self.config.fastpath:
            return "--no-fastpath"
        if self.config.hook == "xdp":
            return "the XDP hook cannot send copies"
        return self._answers.may_stay_in_kernel()

    def _attach_with(self, fastpath: FastPath | None, transport: Transport) -> None:
        self._fastpath = fastpath
        if fastpath is not None:
            fastpath.start(self.table, self.table.rules, self.ledger, self._hops, self._egress)
        # Loading takes its time on a busy machine: an intercept must not wait for it.
        self._load_captures(transport)
        self._answers.start(self.table, fastpath, transport)
        self._capture()
        self._answers.catch_up()

    def _undo_attach(self) -> None:
        for tap in (*self._captures, *self._answers.taps):
            self._loop.remove(tap.ring.fileno())
        for tap in self._captures:
            tap.close()
        self._captures = []
        self._answers.close()
        self.table.keeper = None
        if self._fastpath is not None:
            self._fastpath.close()
            self._fastpath = None

    def _on_hop_change(self, hop: Hop) -> None:
        if hop.usable and (way := (hop.ifindex, hop.ifname)) not in self._ways_out:
            # A look at all devices and targets, so not for each target that comes this way.
            self._ways_out.add(way)
            self._answers.on_hop_change()
        if self._fastpath is not None:
            self._fastpath.on_hop_change(hop)

    def _rules(self) -> Rules:
        config = self.config
        return Rules(
            wait_for_response=config.wait_for_response,
            only_full_sessions=config.only_full_sessions,
            sample_percent=config.sample_percent,
            ramp=config.ramp,
            response_idle_ns=config.response_idle_s * SECOND,
            idle_ns=config.session_idle_s * SECOND,
            max_sessions=config.max_sessions,
        )

    def _load_captures(self, transport: Transport) -> None:
        config = self.config
        services = [(each.online_addr, each.online_port) for each in config.services]
        devices = find_devices(config.interfaces)
        hook = Hook.XDP if config.hook == "xdp" else Hook.TC_INGRESS
        self._captures = load_captures(
            devices, services, hook, config.filter, transport, config.forwarded,
            self._fastpath.kernel.maps if self._fastpath else None, (config.worker, config.workers),
        )  # fmt: skip

    def _capture(self) -> None:
        self._heartbeat.begin()
        for tap in self._captures:
            tap.begin()
            self._loop.add(tap.ring.fileno(), READ, partial(self._on_capture_ring, tap))
            for attachment in tap.attachments:
                if attachment.reason:
                    say(f"{attachment.ifname}: {attachment.how}, since {attachment.reason}")

    def banner(self) -> str:
        """What is copied, from where, to where, how it is answered."""
        return f"ready: {self.copying()}; {self._answers.describe()}; {self.carrying()}"

    def copying(self) -> str:
        """The banner's first half."""
        config = self.config
        where = ", ".join(each.ifname for tap in self._captures for each in tap.attachments)
        how = {each.how for tap in self._captures for each in tap.attachments}
        return f"copying {describe(config.services)} from {where} ({', '.join(sorted(how))})"

    def carrying(self) -> str:
        """Who does the work: the banner's last part."""
        if self._fastpath is None:
            return "fast path off"
        return "fast path on" if not self._fastpath.why_closed else "fast path off for now"

    # -- input ----------------------------------------------------------------------------

    def _on_capture_ring(self, tap: Tap, _events: int) -> None:
        now_ns = time.monotonic_ns()
        on_client, ring = self.table.on_client, tap.ring
        ring.lift(self._payload_bytes)
        for segment, payload in ring.drain(BUSY_BATCH if ring.lifted_bytes else BATCH):
            on_client(segment, payload, now_ns)
        if ring.lifted_bytes:
            self._loop.again(ring.fileno())

    def _on_response_ring(self, tap: Tap, _events: int) -> None:
        now_ns = time.monotonic_ns()
        on_target = self.table.on_target
        for segment, _ in tap.drain(BATCH):
            on_target(segment, now_ns)

    def _on_records(self, records: list[Segment]) -> None:
        now_ns = time.monotonic_ns()
        self.ledger.by_channel += len(records)
        on_target = self.table.on_target
        for segment in records:
            on_target(segment, now_ns)

    def _on_bye(self) -> None:
        """An intercept is about to leave: the last moment at which answers are swallowed.

        The target forgets the copies, or it would go on answering them, to real clients.
        """
        now_ns = time.monotonic_ns()
        if self._fastpath is not None:
            self._fastpath.stop(now_ns)
        self.table.end_all(now_ns, Outcome.INTERCEPT_ENDED, Fate.REFUSED_NO_INTERCEPT)
        self._egress.flush(self.table.outbox)

    def _open_or_close(self) -> None:
        """Say whether sessions may be opened now, and whether anything may be sent."""
        if self._out_of_memory:
            self.table.closed_for = Fate.REFUSED_MEMORY_LIMIT
        elif self._answers.cut_off:
            self.table.closed_for = Fate.REFUSED_NO_INTERCEPT
        else:
            self.table.closed_for = None
        if self._fastpath is not None:
            self._fastpath.set_closed(self.table.closed_for is not None)
            self._fastpath.set_cut_off(self._answers.cut_off)

    # -- the loop -------------------------------------------------------------------------

    def _stop(self) -> None:
        self._stopping = True

    def run(self) -> None:
        """Copy until told to stop, then drain."""
        while not self._stopping:
            self._turn()
        self._draining = True
        for tap in self._captures:
            tap.detach()
        if self._fastpath is not None:
            self._fastpath.stop(time.monotonic_ns())
        until_ns = time.monotonic_ns() + DRAIN_NS
        now_ns = look_ns = time.monotonic_ns()
        settled_ns = now_ns + SETTLE_NS
        busy = 0
        while now_ns < until_ns:
            if now_ns >= look_ns:
                look_ns = now_ns + BUSY_NS
                busy = self.table.busy()
            if busy or any(tap.ring.pending_bytes() for tap in self._captures):
                settled_ns = now_ns + SETTLE_NS
            elif now_ns >= settled_ns:
                break
            self._turn(now_ns + SETTLE_NS // 4)
            now_ns = time.monotonic_ns()

    def _turn(self, until_ns: int = NEVER_NS) -> None:
        """Wait for what comes next, but not beyond ``until_ns``, and handle it."""
        table = self.table
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
        answers_ns = self._answers.deadline_ns
        hops_ns = self._hops.deadline_ns
        fast_ns = self._fastpath.deadline_ns if self._fastpath else NEVER_NS
        # The clock again: timers and sending may have taken the time that is left.
        rest_ns = self._woken_ns + COALESCE_NS - time.monotonic_ns()
        if rest_ns > 0:
            time.sleep(rest_ns / 1e9)
        self._loop.wait(
            min(until_ns, self._housekeeping_at, table_ns, answers_ns, hops_ns, fast_ns)
        )
        self._woken_ns = now_ns = time.monotonic_ns()
        if now_ns >= answers_ns:
            self._answers.on_timer(now_ns)
        if now_ns >= hops_ns:
            self._hops.tick(now_ns)
        if self._fastpath is not None and now_ns >= fast_ns:
            self._fastpath.on_timer(now_ns)
        self._send()
        if self._fastpath is not None and not self._draining and not self._pending():
            self._fastpath.after_turn(self._pending)

    def _pending(self) -> bool:
        """Whether a record is unread."""
        return any(tap.ring.pending_bytes() for tap in (*self._captures, *self._answers.taps))

    def _send(self) -> None:
        """Claims first: an intercept must know whose the answer is before it comes."""
        self._answers.flush()
        outbox = self.table.outbox
        if outbox and self._answers.cut_off:
            # Lost on the way, for the sessions: TCP repairs it once the intercept is back.
            errors = self.ledger.send_errors
            errors[NO_INTERCEPT] = errors.get(NO_INTERCEPT, 0) + len(outbox)
            outbox.clear()
        elif outbox:
            self._egress.flush(outbox)

    def _housekeep(self) -> None:
        if self._watched or self._silent:
            self._refresh_counters()
            self._notice_silence()
        if not self._draining:
            self._answers.forget_released()
            now_ns, changes = time.monotonic_ns(), self._hops.changes
            if changes != self._changes_seen or now_ns >= self._look_at:
                self._look_at, self._changes_seen = now_ns + LOOK_NS, changes
                self._watch_host()
        self._notice_lapse()
        limit_mb = self.config.memory_mb
        self._out_of_memory = bool(limit_mb) and memory.own_bytes() > limit_mb << 20
        if self._out_of_memory:
            self.table.shed(self._payload_bytes, time.monotonic_ns())
        self._open_or_close()

    def _notice_lapse(self) -> None:
        """We stood still for so long that the programs stopped copying."""
        missed_ns = self._heartbeat.take_lapse()
        if missed_ns:
            self._refresh_counters()
            lapsed = self.ledger.kernel_capture[CaptureCount.LAPSED]
            say(
                f"this process stood still for {missed_ns / SECOND:.1f} s (stopped, or without a"
                f" CPU): {lapsed - self._lapsed} segments were not copied meanwhile; going on"
            )
            self._lapsed = lapsed

    def _notice_silence(self) -> None:
        """Nothing at all comes back: the commonest fault, and the ledger balances all the same."""
        counts, now_ns = self.ledger.counts, time.monotonic_ns()
        if not self._silent:
            return
        if counts[Count.RESPONSES]:
            self._silent = False
        elif not counts[Count.SENT_SYN]:
            self._first_syn_ns = now_ns
        elif now_ns - self._first_syn_ns >= SILENCE_NS:
            self._silent = False
            targets = describe_endpoints(self._targets)
            say(f"no answer yet from {targets} to {counts[Count.SENT_SYN]} SYNs")
            say(f"  {self._answers.hints}")

    def _watch_host(self) -> None:
        """Addresses and devices come and go while we run."""
        for tap in self._captures:
            for ifname in tap.lose_dead():
                say(f"pycopy: {ifname} is gone; nothing is captured there any more")
        if not any(tap.attachments for tap in self._captures):
            raise PycopyError(
                "every interface that was captured is gone",
                "start pycopy again once it is back",
            )
        for tap in self._captures:
            tap.name_local_addresses()
        self._answers.watch()

    def _refresh_counters(self) -> None:
        ledger = self.ledger
        ledger.kernel_capture = _sum(self._captures, len(CaptureCount))
        if self._answers.taps:
            ledger.kernel_intercept = _sum(self._answers.taps, len(InterceptCount))
        rings = [*self._captures, *self._answers.taps]
        ledger.ring_pending_bytes = sum(tap.ring.pending_bytes() for tap in rings)
        ledger.active = len(self.table.by_target)
        if self._fastpath is not None:
            self._fastpath.refresh()
        ledger.intercept_dropped = self._answers.dropped

    # -- end ------------------------------------------------------------------------------

    def finish(self) -> None:
        """Reset what is still open, detach, settle the ledger."""
        for tap in self._captures:
            tap.detach()
        self.table.end_all(time.monotonic_ns())
        self._send()
        for answers in self._answers.taps:
            answers.detach()
        self._count_rest()
        self._refresh_counters()
        self._finished = True

    def _count_rest(self) -> None:
        """What is left in the rings when the run ends still gets its fate."""
        self.table.closed_for = Fate.DROPPED_RUN_ENDED
        for taps, take in (
            (self._captures, self._on_capture_ring),
            (self._answers.taps, self._on_response_ring),
        ):
            for tap in taps:
                while tap.ring.pending_bytes():
                    take(tap, READ)
        self.table.outbox.clear()

    def snapshot(self) -> dict[str, dict[str, int | float | str]]:
        """For the view: the ledger, and whether it balances."""
        sections = self.ledger.snapshot()
        sections["process"] = {"rss_mb": memory.rss_bytes() >> 20}
        if self._finished:
            sections["segments"]["balanced"] = "no" if self.ledger.balance() else "yes"
        return sections

    def _print_ledger(self) -> None:
        self._refresh_counters()
        self.view.summary()

    def close(self) -> None:
        """Undo everything, in reverse order; safe after a failed start."""
        with contextlib.ExitStack() as last_first:
            for close in (
                self._loop.close, self._signals.close, self._hops.close, self._egress.close,
                self._answers.close,
                *(tap.close for tap in self._captures),
                *([self._fastpath.close] if self._fastpath else []),
                self._heartbeat.close,
            ):  # fmt: skip
                last_first.callback(close)
            for tap in (*self._captures, *self._answers.taps):
                last_first.callback(self._loop.remove, tap.ring.fileno())


def _sum(taps: Sequence[Tap], number: int) -> list[int]:
    totals = [0] * number
    for tap in taps:
        totals = [total + count for total, count in zip(totals, tap.counters(number), strict=True)]
    return totals


def run(config: ReplayConfig) -> int:
    """Run until stopped; return the exit status. Raises PycopyError when start-up fails."""
    replay = Replay(config)
    failure = None
    try:
        replay.start()
        say(replay.banner())
        daemon.ready()
        replay.view.start()
        try:
            replay.run()
        except PycopyError as error:
            failure = error  # accounts first
        replay.finish()
        replay.view.stop()
        replay.view.summary()
        wrong = replay.ledger.balance()
        for sentence in wrong:
            say(f"pycopy: the ledger does not balance: {sentence}")
        if failure is not None:
            raise failure
        return EXIT_FAILED if wrong else EXIT_OK
    finally:
        replay.view.stop()
        replay.close()
