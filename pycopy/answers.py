"""Where the target's answers come from, by placement; the session engine does not know.

:class:`OwnAnswers` swallows them on this host (zero-route mode); where they come from
``pycopy intercept`` on other hosts, channelanswers.py has them. Both choose the addresses
copies leave from, take claims from the session table, and hand every answer to the driver.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from pycopy import selfports
from pycopy.config import ReplayConfig
from pycopy.devices import Device, find_devices
from pycopy.errors import PycopyError
from pycopy.fastpath.driver import FastPath
from pycopy.loop import NEVER_NS, READ, Loop
from pycopy.messages import say
from pycopy.nexthop import NextHops
from pycopy.session.addresses import Addresses, SelfPorts
from pycopy.session.table import Table
from pycopy.sources.live import SelfIntercept, Tap, Transport

#: The second ring: 17,000 responses, which are headers only.
RESPONSE_RING_BYTES = 2 << 20

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

    def start(self, table: Table, fastpath: FastPath | None, transport: Transport) -> None: ...

    def catch_up(self) -> None:
        """Everything is loaded, which may have taken its time: be ready when this returns."""

    def describe(self) -> str: ...

    def flush(self) -> None: ...

    def on_timer(self, now_ns: int) -> None: ...

    def on_hop_change(self) -> None: ...

    def forget_released(self) -> None:
        """Once a second."""

    def watch(self) -> None:
        """Devices have come or gone."""

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
        copied = {service.online_port for service in self._config.services}
        self._usable = selfports.choose_ports(self._ports, copied)
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
