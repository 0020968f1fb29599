"""The target's responses from ``pycopy intercept`` on other hosts (``-s``): see base.py.

With the fast path they come straight from kernel to kernel (datagrams.py), and by the channel
only what cannot. Whether that way is open may change while we run; the kernel opens
sessions only while it is.
"""

import ipaddress
import random
import time

from pycopy.channel import Count, Hello, InterceptClient, Relaying
from pycopy.command.config import ReplayConfig
from pycopy.errors import UsageError
from pycopy.host.nexthop import Hop
from pycopy.interception.verdicts import range_of
from pycopy.kernel.abi import POOL_NETWORKS
from pycopy.process.console import say, while_slow
from pycopy.process.loop import NEVER_NS, Loop
from pycopy.responses.base import Kernel, Listener, Targets
from pycopy.responses.datagrams import FIRST_PROBE_NS, Datagrams, Intake
from pycopy.responses.here import RESPONSE_RING_BYTES
from pycopy.session.addresses import Addresses, KeptAddresses, PooledAddresses, own_ports
from pycopy.tap import Tap, Transport
from pycopy.wire.address import family_of, map_address, unmap_address

CONNECT_TIMEOUT_S = 15.0
#: How often the start looks for the first probes; later ones may open the fast path as well.
PROBE_POLL_NS = 5_000_000
#: How often it is looked whether they still come.
LOOK_NS = 250_000_000


def why_not_in_kernel(config: ReplayConfig, targets: Targets) -> str:
    """Why the kernel cannot keep sessions whose responses come from elsewhere; empty: it can."""
    pool = config.client_pool
    if config.workers > 1:
        return "an intercept cannot tell by the address which worker's a response is"
    for version in (4, 6):
        if sum(network.version == version for network in pool) > POOL_NETWORKS:
            return f"-c has more than {POOL_NETWORKS} networks of IPv{version}"
    for addr in dict.fromkeys(addr for addr, _ in targets):
        if any(unmap_address(addr) in network for network in pool):
            return f"the target {unmap_address(addr)} is itself one of -c"
    if not relayed_families(config, targets):
        return "intercept and target are named by addresses of different IP versions"
    return ""


def relayed_families(config: ReplayConfig, targets: Targets) -> frozenset[int]:
    """IP versions of the targets that every intercept can send datagrams about."""
    families = {family_of(addr) for addr, _ in targets}
    for addr, _ in _intercepts(config):
        families &= {family_of(addr)}
    return frozenset(families)


def _intercepts(config: ReplayConfig) -> list[tuple[bytes, int]]:
    return [(map_address(ipaddress.ip_address(host)), port) for host, port in config.intercepts]


def _addresses(config: ReplayConfig, targets: Targets) -> Addresses:
    """The clients' own, or one of the pool (-c)."""
    ports = own_ports(config.worker, config.workers)
    if config.client_pool:
        return PooledAddresses(config.client_pool, frozenset(addr for addr, _ in targets), ports)
    return KeptAddresses(ports)


class ResponsesElsewhere:
    """Intercepts on other hosts, each at the other end of a channel."""

    hints = (
        "is the intercept on the right device (-i), does its filter select the target's port, has\n"
        "  the target a route for the clients' addresses (ip route get CLIENT), is its rp_filter 0?"
    )

    def __init__(
        self, config: ReplayConfig, listener: Listener, loop: Loop, targets: Targets,
        transport: Transport, kernel: Kernel | None,
    ) -> None:  # fmt: skip
        """``kernel``: which keeps sessions as well; None: nobody does. Raises OSError."""
        self._config = config
        self._listener = listener
        self._loop = loop
        self.addresses = _addresses(config, targets)
        self.families = relayed_families(config, targets)
        self.taps: list[Tap] = []
        self._intake: Intake | None = None
        port = cookie = 0
        if kernel is not None:
            kernel.use_pool(config.client_pool)
            self._intake = Intake(
                _intercepts(config), transport.smaller(RESPONSE_RING_BYTES), kernel.maps, loop,
                listener.on_response_ring,
            )  # fmt: skip
            self.taps = self._intake.taps
            port, cookie = self._intake.port, self._intake.cookie
        ranges = tuple(map(range_of, config.client_pool))
        hello = Hello(random.getrandbits(64), ranges, port, cookie)
        self._clients = [self._client(address, hello) for address in config.intercepts]
        self._datagrams = Datagrams(self._intake, self._clients) if self._intake else None
        self._look_at = NEVER_NS
        #: Why the kernel opens no session now, as said; None: nothing has been said.
        self._said: str | None = None
        self._starting = True
        self.silenced = True

    def _client(self, address: tuple[str, int], hello: Hello) -> InterceptClient:
        listener = self._listener
        return InterceptClient(
            address, hello, self._loop,
            on_records=listener.on_records, on_state=say, on_connected=self._on_connected,
            on_bye=listener.on_bye, on_relaying=self._on_relaying, on_taken=listener.on_taken,
            live_claims=listener.live_claims,
        )  # fmt: skip

    @property
    def dropped(self) -> int:
        return sum(client.counts[Count.DROPPED_BY_INTERCEPT] for client in self._clients)

    @property
    def deadline_ns(self) -> int:
        deadline_ns = min((client.deadline_ns for client in self._clients), default=NEVER_NS)
        return min(deadline_ns, self._look_at)

    @property
    def why_not_relayed(self) -> str:
        return self._datagrams.why_not if self._datagrams else "there is none"

    def start(self) -> None:
        if self._intake is not None:
            self._intake.cover()
        for client in list(self._clients):
            if self._config.lonely:
                client.start()
            else:
                with while_slow(f"connecting to the intercept at {client.name}"):
                    client.connect_blocking(CONNECT_TIMEOUT_S)
        self._await_probes()
        self._starting = False
        self._look()

    def _await_probes(self) -> None:
        """Let the fast path be open from the first connection on, if it can be."""
        if self._datagrams is None:
            return
        until_ns = (now_ns := time.monotonic_ns()) + FIRST_PROBE_NS
        while self._datagrams.judge(now_ns) is Relaying.PROBING and now_ns < until_ns:
            self._loop.wait(now_ns + PROBE_POLL_NS)
            now_ns = time.monotonic_ns()

    def catch_up(self) -> None:
        """Say what is due meanwhile; an intercept may have given us up by now."""
        self._loop.wait(0)
        until_ns = now_ns = time.monotonic_ns()
        if not self._config.lonely:
            until_ns += int(CONNECT_TIMEOUT_S * 1e9)
        while self.silenced and now_ns < until_ns:
            self._loop.wait(min(until_ns, self.deadline_ns))
            now_ns = time.monotonic_ns()
            self.on_timer(now_ns)

    def describe(self) -> str:
        names = ", ".join(client.name for client in self._clients)
        if self.silenced:
            return f"waiting for the intercept at {names}"
        return f"responses from the intercept at {names}"

    # -- intercepts come and go -----------------------------------------------------------

    def _on_connected(self, client: InterceptClient) -> None:
        if client.connected:
            self._drop_twin(client)
        elif self._datagrams is not None:
            self._datagrams.on_lost(client)
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
        if self._datagrams is not None:
            self._datagrams.leave_out(second)
        second.close()
        say(f"intercept {second.name} is {first.name} by another address: left out")

    def _on_relaying(self, client: InterceptClient, relaying: Relaying) -> None:
        if self._datagrams is not None:
            self._datagrams.on_relaying(client, relaying, time.monotonic_ns())
            self._look()

    def _look(self) -> None:
        """Whether anything may be sent, and whether the kernel may open sessions: tell."""
        self.silenced = not all(client.connected for client in self._clients)
        if self._starting:
            return
        if self._datagrams is not None:
            now_ns = time.monotonic_ns()
            self._look_at = now_ns + LOOK_NS
            self._announce(self._datagrams.judge(now_ns), self._datagrams.why)
        self._listener.on_way_change()

    def _announce(self, state: Relaying, why: str) -> None:
        """Say so when the fast path begins or ceases to be open."""
        if state is Relaying.PROBING or why == self._said:
            return
        self._said = why
        if why:
            say(f"fast path off: {why}")
        else:
            say("fast path on: responses come straight from the intercept's kernel")

    # -- what the table says --------------------------------------------------------------

    def claim(self, target_key: bytes) -> None:
        for client in self._clients:
            client.claim(target_key)

    def give(self, target_key: bytes) -> None:
        """Claims are for what comes over the channel."""
        self.release(target_key)

    def release(self, target_key: bytes) -> None:
        for client in self._clients:
            client.release(target_key)

    # -- what the driver asks -------------------------------------------------------------

    def on_hop_change(self, hop: Hop) -> None:
        """Intercepts stand where they stand."""

    def flush(self) -> None:
        """Tell of new claims: an intercept must know whose a response is before it comes."""
        for client in self._clients:
            client.flush()

    def on_timer(self, now_ns: int) -> None:
        for client in self._clients:
            client.on_timer(now_ns)
        if now_ns >= self._look_at:
            self._look()

    def forget_released(self) -> None:
        """An intercept forgets by itself."""

    def watch(self) -> None:
        """Connections say themselves when they change."""
        if self._intake is not None:
            self._intake.watch()

    def close(self) -> None:
        for client in self._clients:
            client.close()
        if self._intake is not None:
            self._intake.close()
