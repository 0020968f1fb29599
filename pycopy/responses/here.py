"""The zero-route mode: responses are swallowed on this host, at ingress (bpf/intercept.c).

Tests: tests/lab/test_replay_services.py
"""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from pycopy.command.config import ReplayConfig
from pycopy.errors import PycopyError
from pycopy.host import ports
from pycopy.host.devices import Device, find_devices
from pycopy.host.nexthop import Hop, NextHops
from pycopy.kernel import abi
from pycopy.kernel.attach import Hook
from pycopy.process.console import say
from pycopy.process.loop import NEVER_NS, READ, Loop
from pycopy.responses.base import Kernel, Listener, Targets
from pycopy.session.addresses import Addresses, SelfPorts
from pycopy.session.leaving import Leaving
from pycopy.tap import Everywhere, Kept, Settings, Tap, Transport, as_u32, load_tap

#: The second ring: 17,000 responses, which are headers only.
RESPONSE_RING_BYTES = 2 << 20
#: Room in the kernel's table for copies that ended a moment ago (allocated when used).
SPARE_SESSIONS = 1 << 17


class SelfIntercept(Everywhere):
    """Zero-route mode: swallow what ``targets`` send to our copies (bpf/intercept.c).

    On every device of this host, since responses need not come back the way copies leave.
    A connection is swallowed from :meth:`claim` until a while after :meth:`release`, and no
    other: what the target still says of one that is over must not make the kernel answer.
    With the fast path, ``kept``, the programs look into its maps instead.
    """

    def __init__(
        self, targets: Iterable[tuple[bytes, int]], ports: tuple[int, int],
        transport: Transport, max_sessions: int, kept: Kept | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._kept = kept
        self._targets = set(targets)
        self._ports = ports
        self._transport = transport
        self._max_sessions = max_sessions
        self._claimed: set[bytes] = set()
        self._leaving = Leaving()

    def _make(self, l2_bytes: int) -> Tap:
        tap = load_tap(
            "self", l2_bytes, Hook.TC_INGRESS, self._transport,
            Settings(port_lo=self._ports[0], port_hi=self._ports[1]), Tap, self._kept,
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
        if self._kept is not None:
            return  # the table has claimed it there
        self._leaving.withdraw(key)
        self._claimed.add(key)
        for tap in self.taps:
            tap.module.maps["ours"].update(key, b"\1")

    def release(self, key: bytes) -> None:
        """The copy is over."""
        if self._kept is None:
            self._claimed.discard(key)
            self._leaving.add(key)

    def forget_released(self) -> None:
        """Call once a second: forget what was released before the last call."""
        for key in self._leaving.forget():
            for tap in self.taps:
                tap.module.maps["ours"].delete(key)


class OwnPorts(NamedTuple):
    """What copies leave from: the range, both ends included, and the ports of it that are free."""

    ends: tuple[int, int]
    usable: list[int]


def take_ports(config: ReplayConfig) -> OwnPorts:
    """Choose a range that is this run's alone until the process ends. Raises PycopyError."""
    ends = ports.choose_range(config.self_ports)
    ports.hold_range(ends)
    copied = {service.online_port for service in config.services}
    return OwnPorts(ends, ports.choose_ports(ends, copied))


class ResponsesHere:
    """Zero-route mode: a BPF program at ingress takes out what is for a copy."""

    families = frozenset({4, 6})
    silenced = False
    why_not_relayed = ""
    dropped = 0
    deadline_ns = NEVER_NS
    hints = "does the target accept connections from this host (curl), is a firewall in between?"

    def __init__(
        self, config: ReplayConfig, listener: Listener, loop: Loop, hops: NextHops,
        targets: Targets, ports: OwnPorts, transport: Transport, kernel: Kernel | None,
    ) -> None:  # fmt: skip
        """``kernel``: which keeps sessions as well; None: nobody does."""
        self._listener = listener
        self._loop = loop
        self._hops = hops
        self._targets = targets
        self._ports = ports
        # The kernel, which opens sessions as well, takes them in turn from the first one on.
        half_way = len(ports.usable) // 2
        self.addresses: Addresses = SelfPorts(
            ports.usable, lambda target: hops.resolve(target).source, half_way
        )
        if kernel is not None:
            kernel.use_ports(ports.usable)
        self._intercept = SelfIntercept(
            targets, ports.ends, transport.smaller(RESPONSE_RING_BYTES), config.max_sessions,
            kernel.maps if kernel else None,
        )  # fmt: skip
        self.taps = self._intercept.taps
        #: Devices by which targets have been reached: index and name.
        self._ways_out: set[tuple[int, str]] = set()

    def start(self) -> None:
        self._cover(find_devices([]))
        self._cover_ways_out()

    def catch_up(self) -> None:
        """Nobody waits for us."""

    def describe(self) -> str:
        return own_words(self._ports.ends)

    def claim(self, target_key: bytes) -> None:
        self._intercept.claim(target_key)

    def give(self, target_key: bytes) -> None:
        """It is still a copy."""

    def release(self, target_key: bytes) -> None:
        self._intercept.release(target_key)

    def _cover(self, devices: list[Device]) -> None:
        """Swallow our copies' responses on ``devices`` as well."""
        for tap in self._intercept.cover(devices):
            self._loop.add(
                tap.ring.fileno(), READ, partial(self._listener.on_response_ring, tap)
            )  # fmt: skip

    def _cover_ways_out(self) -> None:
        """The devices towards the targets count among them even without an address."""
        hops = [self._hops.resolve(addr) for addr in dict.fromkeys(a for a, _ in self._targets)]
        self._ways_out |= {(hop.ifindex, hop.ifname) for hop in hops if hop.usable}
        self._cover(find_devices(sorted({hop.ifname for hop in hops if hop.usable})))

    def on_hop_change(self, hop: Hop) -> None:
        """A route may have moved to a device where nothing swallows the responses yet."""
        # A look at all devices and targets, so not for each target that comes this way.
        if hop.usable and (hop.ifindex, hop.ifname) not in self._ways_out:
            self._cover_ways_out_or_say()

    def _cover_ways_out_or_say(self) -> None:
        try:
            self._cover_ways_out()
        except PycopyError as error:
            say(f"responses may go unseen: {error}")

    def flush(self) -> None:
        """Claims are in the kernel already."""

    def on_timer(self, now_ns: int) -> None:
        """Nothing here has a time of its own."""

    def forget_released(self) -> None:
        self._intercept.forget_released()

    def watch(self) -> None:
        self._intercept.lose_dead()
        try:
            self._cover(find_devices([]))
        except PycopyError as error:
            say(f"responses may go unseen: {error}")
        self._cover_ways_out_or_say()

    def close(self) -> None:
        for tap in self.taps:
            self._loop.remove(tap.ring.fileno())
        self._intercept.close()


def own_words(ports: tuple[int, int]) -> str:
    """What the banner says of the zero-route mode."""
    return f"responses swallowed here (zero-route, our ports {ports[0]}-{ports[1]})"
