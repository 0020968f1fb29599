"""The target's answers from ``pycopy intercept`` on other hosts (``-s``): see answers.py.

With the fast path they come straight from kernel to kernel (intake.py), and by the channel
only what cannot. Whether that way is open may change while we run; the kernel opens
sessions only while it is.
"""

import ipaddress
import random
import time
from collections.abc import Callable

from pycopy.channel import Count, Hello, InterceptClient, Relaying
from pycopy.command.config import ReplayConfig
from pycopy.errors import UsageError
from pycopy.fastpath.driver import FastPath
from pycopy.interception.verdicts import range_of
from pycopy.kernel.abi import POOL_NETWORKS
from pycopy.process.console import say, while_slow
from pycopy.process.loop import NEVER_NS, Loop
from pycopy.responses.base import Targets
from pycopy.responses.datagrams import Intake
from pycopy.responses.here import RESPONSE_RING_BYTES
from pycopy.session.addresses import Addresses, KeptAddresses, PooledAddresses, own_ports
from pycopy.session.table import Table
from pycopy.tap import Tap, Transport
from pycopy.wire.address import family_of, map_address, unmap_address
from pycopy.wire.segment import Segment

CONNECT_TIMEOUT_S = 15.0
#: How long the start waits for the first probes; later ones may open the fast path as well.
PROBE_TIMEOUT_NS = 1_000_000_000
PROBE_POLL_NS = 5_000_000
#: How often it is looked whether they still come.
LOOK_NS = 250_000_000

#: An intercept has connected a moment ago: its probe may be on its way.
_NOT_YET = "not yet"


class ChannelAnswers:
    """Intercepts on other hosts, each at the other end of a channel."""

    hints = (
        "is the intercept on the right device (-i), does its filter select the target's port, has\n"
        "  the target a route for the clients' addresses (ip route get CLIENT), is its rp_filter 0?"
    )

    def __init__(
        self, config: ReplayConfig, loop: Loop, targets: Targets,
        on_records: Callable[[list[Segment]], None], on_ring: Callable[[Tap, int], None],
        on_change: Callable[[], None], on_bye: Callable[[], None],
    ) -> None:  # fmt: skip
        """``on_change``: look at ``cut_off`` again; ``on_bye``: an intercept is about to leave."""
        self._config = config
        self._loop = loop
        self._targets = targets
        self._on_records = on_records
        self._on_ring = on_ring
        self._on_change = on_change
        self._on_bye = on_bye
        self.taps: list[Tap] = []
        self._clients: list[InterceptClient] = []
        self._fastpath: FastPath | None = None
        self._intake: Intake | None = None
        #: By the order of -s, which a twin that is left out does not change.
        self._numbers: dict[InterceptClient, int] = {}
        #: When it connected, for those that are.
        self._connected_ns: dict[InterceptClient, int] = {}
        self._look_at = NEVER_NS
        #: Why the kernel opens no session now, as said; None: nothing has been said.
        self._said: str | None = None
        self._starting = True
        self.cut_off = True

    @property
    def dropped(self) -> int:
        return sum(client.counts[Count.DROPPED_BY_INTERCEPT] for client in self._clients)

    @property
    def deadline_ns(self) -> int:
        deadline_ns = min((client.deadline_ns for client in self._clients), default=NEVER_NS)
        return min(deadline_ns, self._look_at)

    def addresses(self) -> Addresses:
        """The clients' own, or one of the pool (-c)."""
        ports = own_ports(self._config.worker, self._config.workers)
        if self._config.client_pool:
            targets = frozenset(addr for addr, _ in self._targets)
            return PooledAddresses(self._config.client_pool, targets, ports)
        return KeptAddresses(ports)

    def may_stay_in_kernel(self) -> str:
        pool = self._config.client_pool
        if self._config.workers > 1:
            return "an intercept cannot tell by the address which worker's a response is"
        for version in (4, 6):
            if sum(network.version == version for network in pool) > POOL_NETWORKS:
                return f"-c has more than {POOL_NETWORKS} networks of IPv{version}"
        for addr in dict.fromkeys(addr for addr, _ in self._targets):
            if any(unmap_address(addr) in network for network in pool):
                return f"the target {unmap_address(addr)} is itself one of -c"
        if not self._families():
            return "intercept and target are named by addresses of different IP versions"
        return ""

    def _families(self) -> frozenset[int]:
        """Those of the targets that every intercept can send datagrams about."""
        families = {family_of(addr) for addr, _ in self._targets}
        for addr, _ in self._intercepts():
            families &= {family_of(addr)}
        return frozenset(families)

    def _intercepts(self) -> list[tuple[bytes, int]]:
        return [
            (map_address(ipaddress.ip_address(host)), port)
            for host, port in self._config.intercepts
        ]

    def start(self, table: Table, fastpath: FastPath | None, transport: Transport) -> None:
        config = self._config
        self._fastpath = fastpath
        self._clients, self.taps, self._intake = [], [], None
        port = cookie = 0
        if fastpath is not None:
            fastpath.use_pool(config.client_pool)
            fastpath.use_families(self._families())
            fastpath.set_relayed(_NOT_YET)
            self._intake = Intake(
                self._intercepts(), transport.smaller(RESPONSE_RING_BYTES), fastpath.kernel,
                self._loop, self._on_ring,
            )  # fmt: skip
            self.taps = self._intake.taps
            self._intake.cover()
            port, cookie = self._intake.port, self._intake.cookie
        ranges = tuple(map(range_of, config.client_pool))
        hello = Hello(random.getrandbits(64), ranges, port, cookie)
        for number, address in enumerate(config.intercepts):
            client = InterceptClient(
                address, hello, self._loop,
                on_records=self._on_records, on_state=say,
                on_connected=self._on_connected, on_bye=self._on_bye, on_relaying=self._judge,
                on_taken=lambda keys: table.on_taken(keys, time.monotonic_ns()),
                live_claims=lambda: tuple(table.by_target),
            )  # fmt: skip
            self._clients.append(client)
            self._numbers[client] = number
            if config.lonely:
                client.start()
            else:
                with while_slow(f"connecting to the intercept at {client.name}"):
                    client.connect_blocking(CONNECT_TIMEOUT_S)
        self._await_probes()
        self._starting = False
        self._look()
        table.on_claim = self._claim
        table.on_give = self._release_there
        table.on_release = self._release

    def catch_up(self) -> None:
        """Answer what came meanwhile; an intercept may have given us up by now."""
        self._loop.wait(0)
        until_ns = now_ns = time.monotonic_ns()
        if not self._config.lonely:
            until_ns += int(CONNECT_TIMEOUT_S * 1e9)
        while self.cut_off and now_ns < until_ns:
            self._loop.wait(min(until_ns, self.deadline_ns))
            now_ns = time.monotonic_ns()
            self.on_timer(now_ns)

    def describe(self) -> str:
        names = ", ".join(client.name for client in self._clients)
        if self.cut_off:
            return f"waiting for the intercept at {names}"
        return f"responses from the intercept at {names}"

    # -- intercepts come and go -----------------------------------------------------------

    def _look(self) -> None:
        self.cut_off = not all(client.connected for client in self._clients)
        self._judge()
        self._on_change()

    def _on_connected(self, client: InterceptClient) -> None:
        if client.connected:
            self._connected_ns[client] = time.monotonic_ns()
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

    # -- the way from kernel to kernel ----------------------------------------------------

    def _await_probes(self) -> None:
        """Let the fast path be open from the first connection on, if it can be."""
        until_ns = time.monotonic_ns() + PROBE_TIMEOUT_NS
        while self._why_closed() == _NOT_YET and time.monotonic_ns() < until_ns:
            self._loop.wait(time.monotonic_ns() + PROBE_POLL_NS)

    def _why_closed(self) -> str:
        """Why the kernel may not open sessions now; empty: it may."""
        why = self._why_no_datagrams()
        # As long as they do not all arrive, the channel is the better way for all.
        for client in self._clients:
            client.want_relay(Relaying.OFF if why else Relaying.ON)
        if not why and any(client.relaying is not Relaying.ON for client in self._clients):
            return _NOT_YET
        return why

    def _why_no_datagrams(self) -> str:
        if self._intake is None:
            return "there is none"
        for client in self._clients:
            if not client.connected:
                return f"intercept {client.name} is not connected"
            if client.relaying is Relaying.OFF:
                return f"intercept {client.name} sends responses over the channel only"
            if not self._intake.is_open(self._numbers[client]):
                if time.monotonic_ns() - self._connected_ns[client] < PROBE_TIMEOUT_NS:
                    return _NOT_YET
                return (
                    f"nothing arrives from intercept {client.name} on UDP port"
                    f" {self._intake.port} (a firewall?)"
                )
        return ""

    def _judge(self) -> None:
        """Open or close the fast path, and say so when that changes."""
        if self._intake is None or self._fastpath is None or self._starting:
            return
        self._look_at = time.monotonic_ns() + LOOK_NS
        why = self._why_closed()
        self._fastpath.set_relayed(why)
        if why in (self._said, _NOT_YET):
            return
        self._said = why
        if why:
            say(f"fast path off: {why}")
        else:
            say("fast path on: responses come straight from the intercept's kernel")

    # -- claims ---------------------------------------------------------------------------

    def _claim(self, key: bytes) -> None:
        for client in self._clients:
            client.claim(key)

    def _release(self, key: bytes) -> None:
        if self._fastpath is not None:
            self._fastpath.kernel.release(key)
        self._release_there(key)

    def _release_there(self, key: bytes) -> None:
        for client in self._clients:
            client.release(key)

    # -- what the driver asks -------------------------------------------------------------

    def on_hop_change(self) -> None:
        """Intercepts stand where they stand."""

    def flush(self) -> None:
        """Tell of new claims: an intercept must know whose an answer is before it comes."""
        for client in self._clients:
            client.flush()

    def on_timer(self, now_ns: int) -> None:
        for client in self._clients:
            client.on_timer(now_ns)
        if now_ns >= self._look_at:
            self._judge()

    def forget_released(self) -> None:
        if self._intake is not None and self._fastpath is not None:
            self._fastpath.kernel.forget_released()

    def watch(self) -> None:
        """Connections say themselves when they change."""
        if self._intake is not None:
            self._intake.watch()

    def close(self) -> None:
        for client in self._clients:
            client.close()
        if self._intake is not None:
            self._intake.close()
