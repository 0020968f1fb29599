"""The zero-route mode: responses are swallowed on this host, at ingress (bpf/intercept.c).

Tests: tests/lab/test_replay_services.py
"""

from collections.abc import Callable, Iterable
from functools import partial

from pycopy.command.config import ReplayConfig
from pycopy.errors import PycopyError
from pycopy.fastpath.driver import FastPath
from pycopy.fastpath.kernel import KernelSessions
from pycopy.host import ports
from pycopy.host.devices import Device, find_devices
from pycopy.host.nexthop import NextHops
from pycopy.kernel import abi
from pycopy.kernel.attach import Hook
from pycopy.process.console import say
from pycopy.process.loop import NEVER_NS, READ, Loop
from pycopy.responses.base import Targets
from pycopy.session.addresses import Addresses, SelfPorts
from pycopy.session.table import Table
from pycopy.tap import Everywhere, Settings, Tap, Transport, as_u32, load_tap

#: The second ring: 17,000 responses, which are headers only.
RESPONSE_RING_BYTES = 2 << 20
#: Room in the kernel's table for copies that ended a moment ago (allocated when used).
SPARE_SESSIONS = 1 << 17


class SelfIntercept(Everywhere):
    """Zero-route mode: swallow what ``targets`` send to our copies (bpf/intercept.c).

    On every device of this host, since answers need not come back the way copies leave.
    A connection is swallowed from :meth:`claim` until a while after :meth:`release`, and no
    other: what the target still says of one that is over must not make the kernel answer.
    """

    def __init__(
        self, targets: Iterable[tuple[bytes, int]], ports: tuple[int, int],
        transport: Transport, max_sessions: int, kernel: KernelSessions | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._kernel = kernel
        self._targets = set(targets)
        self._ports = ports
        self._transport = transport
        self._max_sessions = max_sessions
        self._claimed: set[bytes] = set()
        self._leaving: list[bytes] = []
        self._gone: list[bytes] = []

    def _make(self, l2_bytes: int) -> Tap:
        tap = load_tap(
            "self", l2_bytes, Hook.TC_INGRESS, self._transport,
            Settings(port_lo=self._ports[0], port_hi=self._ports[1]), Tap,
            self._kernel.maps if self._kernel else None,
            entries={
                "servers": len(self._targets), "ours": self._max_sessions + SPARE_SESSIONS
            },
        )  # fmt: skip
        for target in self._targets:
            tap.module.maps["servers"].update(abi.ENDPOINT.pack(*target), as_u32(1))
        for key in self._claimed:
            tap.module.maps["ours"].update(key, b"\1")
        return tap

    def claim(self, key: bytes) -> None:
        """The connection ``key`` (KEY) is a copy; call it before its SYN leaves."""
        if self._kernel is not None:
            return  # the table has claimed it there
        self._claimed.add(key)
        for tap in self.taps:
            tap.module.maps["ours"].update(key, b"\1")

    def release(self, key: bytes) -> None:
        """The copy is over."""
        if self._kernel is not None:
            self._kernel.release(key)
            return
        self._claimed.discard(key)
        self._leaving.append(key)

    def forget_released(self) -> None:
        """Call once a second: forget what was released before the last call."""
        if self._kernel is not None:
            self._kernel.forget_released()
        for key in self._gone:
            if key not in self._claimed:
                for tap in self.taps:
                    tap.module.maps["ours"].delete(key)
        self._gone, self._leaving = self._leaving, []


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
        self._ports = ports.choose_range(self._config.self_ports)
        ports.hold_range(self._ports)
        copied = {service.online_port for service in self._config.services}
        self._usable = ports.choose_ports(self._ports, copied)
        # The kernel, which opens sessions as well, takes them in turn from the first one on.
        half_way = len(self._usable) // 2
        return SelfPorts(self._usable, lambda target: self._hops.resolve(target).source, half_way)

    def may_stay_in_kernel(self) -> str:
        return ""

    def start(self, table: Table, fastpath: FastPath | None, transport: Transport) -> None:
        config = self._config
        if fastpath is not None:
            fastpath.use_ports(self._usable)
        self._intercept = SelfIntercept(
            self._targets, self._ports, transport.smaller(RESPONSE_RING_BYTES),
            config.max_sessions, fastpath.kernel if fastpath else None,
        )  # fmt: skip
        self.taps = self._intercept.taps
        table.on_claim = self._intercept.claim
        table.on_release = self._intercept.release
        self._cover(find_devices([]))
        self._cover_ways_out()

    def catch_up(self) -> None:
        """Nobody waits for us."""

    def describe(self) -> str:
        return own_words(self._ports)

    def _cover(self, devices: list[Device]) -> None:
        """Swallow our copies' answers on ``devices`` as well."""
        assert self._intercept is not None
        for tap in self._intercept.cover(devices):
            self._loop.add(tap.ring.fileno(), READ, partial(self._on_ring, tap))

    def _cover_ways_out(self) -> None:
        """The devices towards the targets count among them even without an address."""
        hops = [self._hops.resolve(addr) for addr in dict.fromkeys(a for a, _ in self._targets)]
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

    def forget_released(self) -> None:
        assert self._intercept is not None
        self._intercept.forget_released()

    def watch(self) -> None:
        assert self._intercept is not None
        self._intercept.lose_dead()
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
