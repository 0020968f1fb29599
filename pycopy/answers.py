"""Where the target's answers come from, by placement; the session engine does not know.

:class:`OwnAnswers` swallows them on this host (zero-route mode), :class:`ChannelAnswers`
gets them from ``pycopy intercept`` on other hosts. Both choose the addresses copies leave
from, take claims from the session table, and hand every answer to the driver.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import Protocol

from pycopy import selfports, shares
from pycopy.abi import Segment
from pycopy.channel import Count, Hello, InterceptClient
from pycopy.claims import range_of
from pycopy.config import ReplayConfig
from pycopy.devices import Device, find_devices
from pycopy.errors import PycopyError, UsageError
from pycopy.fastpath.driver import FastPath
from pycopy.loop import NEVER_NS, READ, Loop
from pycopy.messages import say
from pycopy.nexthop import NextHops
from pycopy.session.addresses import Addresses, KeptAddresses, PooledAddresses, SelfPorts
from pycopy.session.table import Table
from pycopy.sources.live import SelfIntercept, Tap

#: The zero-route mode's second ring: 17,000 responses, which are headers only.
RESPONSE_RING_BYTES = 2 << 20
CONNECT_TIMEOUT_S = 5.0

Targets = list[tuple[bytes, int]]


class Answers(Protocol):
    """What the driver asks of either. ``start`` may raise PycopyError; ``close`` undoes it all."""

    #: Local programs and their rings; empty if there are none here.
    taps: list[Tap]
    #: Answers could reach real clients now: nothing may be sent.
    cut_off: bool
    #: What to look at when no answer comes at all.
    hints: str

    @property
    def deadline_ns(self) -> int:
        """When :meth:`on_timer` has something to do."""

    @property
    def dropped(self) -> int:
        """Answers that were lost on their way to us, as far as it is known."""

    def addresses(self) -> Addresses: ...

    def may_stay_in_kernel(self) -> str:
        """Why the kernel cannot keep sessions here; empty: it can."""

    def start(self, table: Table, fastpath: FastPath | None) -> None: ...

    def describe(self) -> str: ...

    def flush(self) -> None: ...

    def on_timer(self, now_ns: int) -> None: ...

    def on_hop_change(self) -> None: ...

    def watch(self) -> None: ...

    def close(self) -> None: ...


class OwnAnswers:
    """Zero-route mode: a BPF program at ingress takes out what is for a copy."""

    cut_off = False
    dropped = 0
    deadline_ns = NEVER_NS
    hints = "does the target accept connections from this host (curl), is a firewall in between?"

    def __init__(
        self, config: ReplayConfig, loop: Loop, hops: NextHops, targets: Targets,
        on_ring: Callable[[Tap, int], None],
    ) -> None:  # fmt: skip
        self.taps: list[Tap] = []
        self._config = config
        self._loop = loop
        self._hops = hops
        self._targets = targets
        self._on_ring = on_ring
        self._ports = (0, 0)
        self._usable: list[int] = []
        self._intercept: SelfIntercept | None = None

    def addresses(self) -> Addresses:
        """Ports of a range that is ours alone."""
        self._ports = selfports.choose_range(self._config.self_ports)
        selfports.hold_range(self._ports)
        self._usable = selfports.choose_ports(self._ports)
        # The kernel, which opens sessions as well, takes them in turn from the first one on.
        half_way = len(self._usable) // 2
        return SelfPorts(self._usable, lambda target: self._hops.resolve(target).source, half_way)

    def may_stay_in_kernel(self) -> str:
        return ""

    def start(self, table: Table, fastpath: FastPath | None) -> None:
        config = self._config
        if fastpath is not None:
            fastpath.use_ports(self._usable)
        self._intercept = SelfIntercept(
            self._targets, self._ports, min(config.ring_bytes, RESPONSE_RING_BYTES),
            config.max_sessions, fastpath.kernel if fastpath else None,
        )  # fmt: skip
        self.taps = self._intercept.taps
        table.on_claim = self._intercept.claim
        table.on_release = self._intercept.release
        self._cover(find_devices([]))
        self._cover_ways_out()

    def describe(self) -> str:
        return own_words(self._ports)

    def _cover(self, devices: list[Device]) -> None:
        """Swallow our copies' answers on ``devices`` as well."""
        assert self._intercept is not None
        for tap in self._intercept.cover(devices):
            self._loop.add(tap.ring.fileno(), READ, partial(self._on_ring, tap))

    def _cover_ways_out(self) -> None:
        """The devices towards the targets count among them even without an address."""
        hops = [self._hops.resolve(addr) for addr, _ in self._targets]
        self._cover(find_devices(sorted({hop.ifname for hop in hops if hop.usable})))

    def on_hop_change(self) -> None:
        """A route may have moved to a device where nothing swallows the responses yet."""
        if self._intercept is not None and self.taps:
            try:
                self._cover_ways_out()
            except PycopyError as error:
                say(f"responses may go unseen: {error}")

    def flush(self) -> None:
        """Claims are in the kernel already."""

    def on_timer(self, now_ns: int) -> None:
        """Nothing here has a time of its own."""

    def watch(self) -> None:
        """Once a second: devices come and go while we run."""
        assert self._intercept is not None
        self._intercept.forget_released()
        for tap in self.taps:
            for ifname in tap.lose_dead():
                say(f"{ifname} is gone; responses are awaited on the other devices")
        try:
            self._cover(find_devices([]))
        except PycopyError as error:
            say(f"responses may go unseen: {error}")
        self.on_hop_change()

    def close(self) -> None:
        for tap in self.taps:
            tap.close()


def own_words(ports: tuple[int, int]) -> str:
    """What the banner says of the zero-route mode."""
    return f"responses swallowed here (zero-route, our ports {ports[0]}-{ports[1]})"


class ChannelAnswers:
    """Intercepts on other hosts, each at the other end of a channel."""

    hints = (
        "is the intercept on the right device (-i), does its filter select the target's port, has\n"
        "  the target a route for the clients' addresses (ip route get CLIENT), is its rp_filter 0?"
    )

    def __init__(
        self, config: ReplayConfig, loop: Loop, targets: Targets,
        on_records: Callable[[list[Segment]], None], on_change: Callable[[], None],
        on_bye: Callable[[], None],
    ) -> None:  # fmt: skip
        """``on_change``: look at ``cut_off`` again; ``on_bye``: an intercept is about to leave."""
        self._config = config
        self._loop = loop
        self._targets = targets
        self._on_records = on_records
        self._on_change = on_change
        self._on_bye = on_bye
        self.taps: list[Tap] = []
        self._clients: list[InterceptClient] = []
        self._starting = True
        self.cut_off = True

    @property
    def dropped(self) -> int:
        return sum(client.counts[Count.DROPPED_BY_INTERCEPT] for client in self._clients)

    @property
    def deadline_ns(self) -> int:
        return min((client.deadline_ns for client in self._clients), default=NEVER_NS)

    def addresses(self) -> Addresses:
        """The clients' own, or one of the pool (-c)."""
        ports = shares.own_ports(self._config)
        if self._config.client_pool:
            targets = frozenset(addr for addr, _ in self._targets)
            return PooledAddresses(self._config.client_pool, targets, ports)
        return KeptAddresses(ports)

    def may_stay_in_kernel(self) -> str:
        return "responses come from another host"

    def start(self, table: Table, fastpath: FastPath | None) -> None:
        config = self._config
        hello = Hello(random.getrandbits(64), tuple(map(range_of, config.client_pool)))
        for address in config.intercepts:
            client = InterceptClient(
                address, hello, self._loop,
                on_records=self._on_records, on_state=say,
                on_connected=self._on_connected, on_bye=self._on_bye,
                live_claims=lambda: tuple(table.by_target),
            )  # fmt: skip
            self._clients.append(client)
            if config.lonely:
                client.start()
            else:
                client.connect_blocking(CONNECT_TIMEOUT_S)
        self._starting = False
        self._look()
        table.on_claim = self._claim
        table.on_release = self._release

    def describe(self) -> str:
        names = ", ".join(client.name for client in self._clients)
        if self.cut_off:
            return f"waiting for the intercept at {names}"
        return f"responses from the intercept at {names}"

    def _look(self) -> None:
        self.cut_off = not all(client.connected for client in self._clients)
        self._on_change()

    def _on_connected(self, client: InterceptClient) -> None:
        if client.connected:
            self._drop_twin(client)
        self._look()

    def _drop_twin(self, client: InterceptClient) -> None:
        """One intercept under two addresses would take each connection for the other's end."""
        others = (other for other in self._clients if other is not client)
        twin = next((other for other in others if other.instance == client.instance), None)
        if twin is None:
            return
        first, second = sorted((client, twin), key=self._clients.index)
        if self._starting and not self._config.lonely:
            raise UsageError(
                f"-s: {first.name} and {second.name} are one and the same intercept",
                "name each intercept once",
            )
        self._clients = [other for other in self._clients if other is not second]
        second.close()
        say(f"intercept {second.name} is {first.name} by another address: left out")

    def _claim(self, key: bytes) -> None:
        for client in self._clients:
            client.claim(key)

    def _release(self, key: bytes) -> None:
        for client in self._clients:
            client.release(key)

    def on_hop_change(self) -> None:
        """Intercepts stand where they stand."""

    def flush(self) -> None:
        """Tell of new claims: an intercept must know whose an answer is before it comes."""
        for client in self._clients:
            client.flush()

    def on_timer(self, now_ns: int) -> None:
        for client in self._clients:
            client.on_timer(now_ns)

    def watch(self) -> None:
        """Once a second: connections say themselves when they change."""

    def close(self) -> None:
        for client in self._clients:
            client.close()
