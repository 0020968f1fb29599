"""``pycopy replay``: the driver on the online server. Wiring, signals, order of things.

    capture ring -> session table -> egress          (what clients send)
    self intercept's ring, or the channel -> table   (what the target answers)

No rule of TCP or of replay is in this file. Start-up goes from the target back to the
traffic (next hop, intercept, capture), so that nothing is captured before it can be
replayed; shutdown goes the other way.
"""

import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial

from pycopy import daemon, selfports
from pycopy.abi import CaptureCount, InterceptCount, Segment
from pycopy.attach import Hook
from pycopy.channel import Count as ChannelCount
from pycopy.channel import Hello, InterceptClient
from pycopy.claims import range_of
from pycopy.config import ReplayConfig, endpoint
from pycopy.devices import find_devices
from pycopy.egress import Egress
from pycopy.errors import EXIT_FAILED, EXIT_OK, PycopyError
from pycopy.ledger import Fate, Ledger
from pycopy.loop import READ, Loop
from pycopy.nexthop import NextHops
from pycopy.session.addresses import Addresses, KeptAddresses, PooledAddresses, SelfPorts
from pycopy.session.rules import SECOND, Rules
from pycopy.session.table import Table
from pycopy.signals import Signals
from pycopy.sources import live
from pycopy.sources.live import Tap
from pycopy.view import View

#: Records taken from a ring before timers and the other inputs get their turn.
BATCH = 256
#: The zero-route mode's second ring: 17,000 responses, which are headers only.
RESPONSE_RING_BYTES = 2 << 20
#: Shortest time between two turns of the loop: what arrives meanwhile is one batch, which
#: saves a wake-up per segment. It bounds what batching adds to a copy's delay.
COALESCE_NS = 300_000
#: How often the kernel's counters, the interfaces and our own memory are looked at.
HOUSEKEEPING_NS = SECOND
#: How long a clean end waits for what is held and in flight.
DRAIN_NS = 5 * SECOND
#: After the last session is quiet: time for a captured segment to reach us.
SETTLE_NS = SECOND // 5
START_TIMEOUT_S = 5.0


def say(text: str) -> None:
    """One line to the user, on stderr."""
    print(text, file=sys.stderr, flush=True)


class Replay:
    """One run. Build it, :meth:`start`, :meth:`run`, :meth:`close` (always)."""

    def __init__(self, config: ReplayConfig) -> None:
        self.config = config
        self.ledger = Ledger()
        self._loop = Loop()
        self._captures: list[Tap] = []
        self._intercepts: list[Tap] = []
        self._clients: list[InterceptClient] = []
        self._hops = NextHops(on_change=self._on_hop_change)
        self._egress = Egress(self._hops, self.ledger, config.mtu)
        self._targets = [(each.target_addr, each.target_port) for each in config.services]
        self._self_ports = (0, 0)
        self._housekeeping_at = 0
        self._woken_ns = 0
        self._draining = False
        self._stopping = False
        self._signals = Signals(
            self._loop,
            self._stop,
            {signal.SIGUSR1: self._print_ledger, signal.SIGHUP: daemon.reopen_log},
        )

    # -- start ----------------------------------------------------------------------------

    def start(self) -> None:
        """Resolve, attach, connect; raises PycopyError with everything undone by close()."""
        config = self.config
        self._loop.add(self._hops.fileno(), READ, self._hops.on_readable)
        for target_addr, _ in self._targets:
            self._hops.resolve(target_addr)
        self._hops.wait_usable(START_TIMEOUT_S)
        for target_addr, _ in self._targets:
            self._egress.prepare(self._hops.resolve(target_addr))
        self.table = Table(
            self._rules(), self.ledger, self._addresses(), self._targets,
            self._egress.path_mss, time.monotonic_ns(),
        )  # fmt: skip
        if config.intercepts:
            self._connect_intercepts()
        else:
            self._intercept_self()
        self._capture()

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

    def _addresses(self) -> Addresses:
        config = self.config
        if not config.intercepts:
            self._self_ports = selfports.choose_range(config.self_ports)
            ports = selfports.choose_ports(self._self_ports)
            return SelfPorts(ports, lambda target: self._hops.resolve(target).source)
        if config.client_pool:
            return PooledAddresses(config.client_pool, frozenset(addr for addr, _ in self._targets))
        return KeptAddresses()

    def _intercept_self(self) -> None:
        ifnames = sorted({self._hops.resolve(addr).ifname for addr, _ in self._targets})
        ring_bytes = min(self.config.ring_bytes, RESPONSE_RING_BYTES)
        self._intercepts = live.self_intercept(
            find_devices(ifnames), self._targets, self._self_ports, ring_bytes
        )
        for tap in self._intercepts:
            self._loop.add(tap.ring.fileno(), READ, partial(self._on_response_ring, tap))

    def _connect_intercepts(self) -> None:
        config = self.config
        ranges = tuple(map(range_of, config.client_pool))
        hello = Hello(random.getrandbits(64), ranges)
        for address in config.intercepts:
            client = InterceptClient(
                address, hello, self._loop,
                on_records=self._on_records, on_state=say,
                live_claims=lambda: tuple(self.table.by_target),
            )  # fmt: skip
            self._clients.append(client)
            if config.lonely:
                client.start()
            else:
                client.connect_blocking(START_TIMEOUT_S)
        self.table.on_claim = self._claim
        self.table.on_release = self._release

    def _capture(self) -> None:
        config = self.config
        services = [(each.online_addr, each.online_port) for each in config.services]
        devices = find_devices(config.interfaces)
        hook = Hook.XDP if config.hook == "xdp" else Hook.TC_INGRESS
        self._captures = live.capture(devices, services, hook, config.filter, config.ring_bytes)
        for tap in self._captures:
            self._loop.add(tap.ring.fileno(), READ, partial(self._on_capture_ring, tap))
            for attachment in tap.attachments:
                if attachment.reason:
                    say(f"{attachment.ifname}: {attachment.how}, since {attachment.reason}")

    def banner(self) -> str:
        """What is copied, from where, to where, how it is answered."""
        config = self.config
        where = ", ".join(each.ifname for tap in self._captures for each in tap.attachments)
        how = {each.how for tap in self._captures for each in tap.attachments}
        services = ", ".join(str(service) for service in config.services)
        if config.intercepts:
            names = ", ".join(client.name for client in self._clients)
            answers = f"responses from the intercept at {names}"
        else:
            low, high = self._self_ports
            answers = f"responses swallowed here (zero-route, our ports {low}-{high})"
        return f"ready: copying {services} from {where} ({', '.join(sorted(how))}); {answers}"

    # -- input ----------------------------------------------------------------------------

    def _on_capture_ring(self, tap: Tap, _events: int) -> None:
        now_ns = time.monotonic_ns()
        on_client = self.table.on_client
        for segment, payload in tap.drain(BATCH):
            on_client(segment, payload, now_ns)

    def _on_response_ring(self, tap: Tap, _events: int) -> None:
        now_ns = time.monotonic_ns()
        on_target = self.table.on_target
        for segment, _ in tap.drain(BATCH):
            on_target(segment, now_ns)

    def _on_records(self, records: list[Segment]) -> None:
        now_ns = time.monotonic_ns()
        on_target = self.table.on_target
        for segment in records:
            on_target(segment, now_ns)

    def _claim(self, key: bytes) -> None:
        for client in self._clients:
            client.claim(key)

    def _release(self, key: bytes) -> None:
        for client in self._clients:
            client.release(key)

    def _on_hop_change(self, hop: object) -> None:
        """A route may have moved to a device where nothing swallows the responses yet."""
        for tap in self._intercepts:
            for addr, port in self._targets:
                there = self._hops.resolve(addr)
                if there.usable and not tap.on(there.ifname):
                    try:
                        tap.attach(there.ifname)
                    except PycopyError as error:
                        say(f"responses from {endpoint(addr, port)}: {error}")

    # -- the loop -------------------------------------------------------------------------

    def _stop(self) -> None:
        self._stopping = True

    def run(self) -> None:
        """Copy until told to stop, then drain."""
        while not self._stopping:
            self._turn(time.monotonic_ns())
        self._draining = True
        for tap in self._captures:
            tap.detach()
        until_ns = time.monotonic_ns() + DRAIN_NS
        settled_ns = time.monotonic_ns() + SETTLE_NS
        while time.monotonic_ns() < until_ns:
            now_ns = time.monotonic_ns()
            pending = sum(tap.ring.pending_bytes() for tap in self._captures)
            if pending or self.table.busy():
                settled_ns = now_ns + SETTLE_NS
            elif now_ns >= settled_ns:
                break
            self._turn(now_ns, until_ns=now_ns + SETTLE_NS // 4)

    def _turn(self, now_ns: int, until_ns: int | None = None) -> None:
        table = self.table
        if now_ns >= self._housekeeping_at:
            self._housekeeping_at = now_ns + HOUSEKEEPING_NS
            self._housekeep()
        if now_ns >= table.deadline_ns():
            table.on_time(now_ns)
            self._send()
        rest_ns = self._woken_ns + COALESCE_NS - now_ns
        if rest_ns > 0:
            time.sleep(rest_ns / 1e9)
        self._loop.wait(min(self._deadline_ns(), until_ns or self._housekeeping_at))
        self._woken_ns = time.monotonic_ns()
        for client in self._clients:
            if client.deadline_ns <= self._woken_ns:
                client.on_timer(self._woken_ns)
        if self._hops.deadline_ns <= self._woken_ns:
            self._hops.tick(self._woken_ns)
        self._send()

    def _send(self) -> None:
        """Claims first: an intercept must know whose the answer is before it comes."""
        for client in self._clients:
            client.flush()
        outbox = self.table.outbox
        if outbox:
            self._egress.flush(outbox)

    def _deadline_ns(self) -> int:
        deadline_ns = min(
            self._housekeeping_at, self.table.deadline_ns(), self._hops.deadline_ns
        )
        for client in self._clients:
            deadline_ns = min(deadline_ns, client.deadline_ns)
        return deadline_ns

    def _housekeep(self) -> None:
        self._refresh_counters()
        if not self._draining:
            for tap in self._captures:
                for ifname in tap.lose_dead():
                    say(f"pycopy: {ifname} is gone; nothing is captured there any more")
            if not any(tap.attachments for tap in self._captures):
                raise PycopyError(
                    "every interface that was captured is gone", "start pycopy again once it is back"
                )
        table = self.table
        if self.config.memory_mb and live.rss_bytes() > self.config.memory_mb << 20:
            table.closed_for = Fate.REFUSED_MEMORY_LIMIT
        elif self._clients and not any(client.connected for client in self._clients):
            table.closed_for = Fate.REFUSED_NO_INTERCEPT
        else:
            table.closed_for = None

    def _refresh_counters(self) -> None:
        ledger = self.ledger
        ledger.kernel_capture = _sum(self._captures, len(CaptureCount))
        if self._intercepts:
            ledger.kernel_intercept = _sum(self._intercepts, len(InterceptCount))
        rings = self._captures + self._intercepts
        ledger.ring_pending_bytes = sum(tap.ring.pending_bytes() for tap in rings)
        ledger.active = len(self.table.by_target)
        ledger.intercept_dropped = sum(
            client.counts[ChannelCount.DROPPED_BY_INTERCEPT] for client in self._clients
        )

    # -- end ------------------------------------------------------------------------------

    def finish(self) -> None:
        """Reset what is still open, detach, settle the ledger."""
        for tap in self._captures:
            tap.detach()
        self.table.end_all(time.monotonic_ns())
        self._send()
        for tap in self._intercepts:
            tap.detach()
        for tap in self._captures + self._intercepts:
            self._count_rest(tap)
        self._refresh_counters()

    def _count_rest(self, tap: Tap) -> None:
        """What is left in a ring when the run ends still gets its fate."""
        table = self.table
        table.closed_for = Fate.DROPPED_RUN_ENDED
        now_ns = time.monotonic_ns()
        is_capture = tap in self._captures
        while tap.ring.pending_bytes():
            for segment, payload in tap.drain(BATCH):
                if is_capture:
                    table.on_client(segment, payload, now_ns)
                else:
                    table.on_target(segment, now_ns)
        table.outbox.clear()

    def snapshot(self) -> dict[str, dict[str, int | float | str]]:
        """For the view: the ledger, and whether it balances."""
        sections = self.ledger.snapshot()
        sections["process"] = {"rss_mb": live.rss_bytes() >> 20}
        if self._draining:
            sections["segments"]["balanced"] = "no" if self.ledger.balance() else "yes"
        return sections

    def _print_ledger(self) -> None:
        self._refresh_counters()
        View(self.snapshot).summary(sys.stderr)

    def close(self) -> None:
        """Undo everything, in reverse order; safe after a failed start."""
        closers: list[Callable[[], None]] = [tap.close for tap in self._captures]
        closers += [client.close for client in self._clients]
        closers += [tap.close for tap in self._intercepts]
        closers += [self._egress.close, self._hops.close, self._signals.close, self._loop.close]
        for tap in self._captures + self._intercepts:
            self._loop.remove(tap.ring.fileno())
        for close in closers:
            close()


def _sum(taps: list[Tap], number: int) -> list[int]:
    totals = [0] * number
    for tap in taps:
        totals = [total + count for total, count in zip(totals, tap.counters(number), strict=True)]
    return totals


def run(config: ReplayConfig) -> int:
    """Run until stopped; return the exit status. Raises PycopyError when start-up fails."""
    replay = Replay(config)
    view = View(replay.snapshot, config.interval_s, config.quiet, config.json)
    try:
        replay.start()
        say(replay.banner())
        daemon.ready()
        view.start()
        replay.run()
        replay.finish()
        view.stop()
        view.summary(sys.stdout if config.json else sys.stderr)
        wrong = replay.ledger.balance()
        for sentence in wrong:
            say(f"pycopy: the ledger does not balance: {sentence}")
        return EXIT_FAILED if wrong else EXIT_OK
    finally:
        view.stop()
        replay.close()


