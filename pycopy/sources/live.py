"""Live sources: a BPF program on the wire, its ring, and its counters.

A :class:`Tap` is one loaded program attached to one or more interfaces of the same link
type. The capture of the online server is a set of taps, and so is the intercept of the
zero-route mode. What the segments mean is the session engine's business.
"""

import mmap
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from pycopy import abi, link, loader, objects
from pycopy.abi import Segment
from pycopy.attach import Attachment, Hook
from pycopy.config import ProcessConfig
from pycopy.devices import Device, local_addresses
from pycopy.fastpath.kernel import KernelSessions
from pycopy.heartbeat import Heartbeat
from pycopy.messages import say
from pycopy.pcapfilter import filter_code
from pycopy.perfring import PerfRing
from pycopy.ring import Ring

#: Room in the kernel's table for copies that ended a moment ago (allocated when used).
SPARE_SESSIONS = 1 << 17

Service = tuple[bytes | None, int]


class Settings(NamedTuple):
    """``struct pycopy_settings``: what a program is told of the run, in its own words there."""

    worker: int = 0
    workers: int = 1
    port_lo: int = 0
    port_hi: int = 0
    channel_port: int = 0
    datagram_port: int = 0
    redirect_away: bool = False


class Transport(NamedTuple):
    """How records come to user space, and what every program of this process is given.

    ``ring_bytes`` is a ring's size, or that of all CPUs' perf rings together.
    """

    ring_bytes: int
    perf: bool
    #: Descriptors of maps by name: the heartbeat's.
    given: Mapping[str, int]

    def smaller(self, most_bytes: int) -> "Transport":
        """The same, for records that are few or short."""
        return self._replace(ring_bytes=min(self.ring_bytes, most_bytes))


def choose_transport(config: ProcessConfig, heartbeat: Heartbeat) -> Transport:
    """The one that is asked for; perf rings, and a word, where the kernel has no other."""
    perf = config.transport == "perf"
    if not perf and not link.has_map_type(link.RINGBUF):
        perf = True
        say("this kernel has no BPF ring buffer (it came with Linux 5.8): perf ring buffers it is")
    return Transport(config.ring_bytes, perf, heartbeat.given)


class Tap:
    """A program, its ring and where it is attached. Close it to detach."""

    def __init__(
        self, module: loader.Module, transport: Transport, hook: Hook, l2_bytes: int
    ) -> None:
        self.module = module
        kind = PerfRing if transport.perf else Ring
        self.ring = kind(module.maps["segments"].fd, transport.ring_bytes)
        self.hook = hook
        self.l2_bytes = l2_bytes
        self.attachments: list[Attachment] = []

    def attach(self, ifname: str) -> Attachment:
        """Attach to one more interface; raises PycopyError, and leaves the others alone."""
        attachment = loader.attach(self.module, ifname, self.hook)
        self.attachments.append(attachment)
        return attachment

    def on(self, device: Device) -> bool:
        """True if attached to ``device``, not to a former one of the same name."""
        return any(each.ifindex == device.ifindex for each in self.attachments)

    def lose_dead(self) -> list[str]:
        """Forget attachments whose interface has gone; return their names."""
        dead = [each for each in self.attachments if not each.alive()]
        for attachment in dead:
            self.attachments.remove(attachment)
            attachment.close()
        return [each.ifname for each in dead]

    def counters(self, number: int) -> list[int]:
        """The first ``number`` counters of the program, summed over the CPUs."""
        counts = self.module.maps["counts"]
        return [counts.sum_percpu(index) for index in range(number)]

    def drain(self, limit: int) -> Iterator[tuple[Segment, bytes]]:
        return self.ring.drain(limit)

    def detach(self) -> None:
        """Stop seeing packets; what is in the ring stays readable."""
        for attachment in self.attachments:
            attachment.close()
        self.attachments.clear()

    def close(self) -> None:
        self.detach()
        self.ring.close()
        self.module.close()


class Capture(Tap):
    """A tap on clients' segments; it has been told which addresses are this host's."""

    def __init__(
        self, module: loader.Module, transport: Transport, hook: Hook, l2_bytes: int
    ) -> None:
        super().__init__(module, transport, hook, l2_bytes)
        self._told: set[bytes] = set()
        #: Where :meth:`begin` attaches it.
        self.ifnames: list[str] = []

    def begin(self) -> None:
        """See packets from now on; raises PycopyError, and the caller closes the tap."""
        self.name_local_addresses()
        for ifname in self.ifnames:
            self.attach(ifname)

    def name_local_addresses(self) -> None:
        """Tell the program what has changed since the last time; it may change while we run."""
        table = self.module.maps["local_addresses"]
        now = local_addresses()
        for address in now - self._told:
            table.update(address, b"\1")
        for address in self._told - now:
            table.delete(address)
        self._told = now


AnyTap = TypeVar("AnyTap", bound=Tap)


def load_tap(
    role: str, l2_bytes: int, hook: Hook, transport: Transport, settings: Settings,
    kind: type[AnyTap], kernel: KernelSessions | None = None, *, expression: str = "",
    given: Mapping[str, int] | None = None, entries: Mapping[str, int] | None = None,
) -> AnyTap:  # fmt: skip
    """Load the program of ``role`` (pycopy.objects) for ``hook``, and tell it what it must know.

    ``kernel``: with the fast path, whose sessions it keeps. ``given`` and ``entries``: as in
    pycopy.loader.load(). Raises PycopyError with nothing left loaded.
    """
    xdp = hook is Hook.XDP
    module = loader.load(
        objects.name_of(role, xdp=xdp, l2_bytes=l2_bytes, fastpath=kernel is not None),
        given={**transport.given, **(kernel.maps.given if kernel else {}), **(given or {})},
        entries={"segments": transport.ring_bytes, **(entries or {})},
        constants=kernel.maps.constants if kernel else None,
        filter_code=filter_code(expression, l2_bytes, xdp),
        perf=transport.perf,
    )
    try:
        module.maps["settings"].update(bytes(4), abi.SETTINGS.pack(*settings))
        return kind(module, transport, hook, l2_bytes)
    except BaseException:
        module.close()
        raise


class Services:
    """The maps by which capture.c finds a packet's service; all captures of a run share them."""

    def __init__(self, services: Sequence[Service], forwarded: bool) -> None:
        """A service without an address is any address of this host's; ``forwarded``: anybody's.

        Raises PycopyError.
        """
        own = abi.PORT_ANYBODYS if forwarded else abi.PORT_OWN
        with_address = sum(address is not None for address, _ in services)
        self.given: dict[str, int] = {}
        try:
            self.given["service_ports"] = loader.make_map("service_ports")
            self.given["services"] = loader.make_map("services", max(with_address, 1))
            ports: dict[int, int] = {}
            for index, (address, port) in enumerate(services):
                if address is None:
                    # One that is named before at some address there goes first, by itself.
                    ports[port] = ports.get(port, 0) | own | index
                else:
                    ports[port] = ports.get(port, 0) | abi.PORT_GIVEN
                    key = abi.ENDPOINT.pack(address, port)
                    link.map_update(self.given["services"], key, _number(index))
            for port, found in ports.items():
                link.map_update(self.given["service_ports"], _number(port), _number(found))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for fd in self.given.values():
            os.close(fd)
        self.given = {}


def _number(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)


def load_captures(
    devices: Sequence[Device], services: Sequence[Service], hook: Hook, expression: str,
    transport: Transport, forwarded: bool, kernel: KernelSessions | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[Capture]:  # fmt: skip
    """Load what captures the client segments of ``services`` on ``devices`` (bpf/capture.c).

    One tap for each link type; :meth:`Capture.begin` attaches it. A service without an address
    is any address of this host; ``forwarded``: of anybody. ``share``: which worker, and of how
    many. Raises PycopyError with nothing left loaded.
    """
    taps: dict[int, Capture] = {}
    settings = Settings(*share)
    maps = Services(services, forwarded)
    try:
        for device in devices:
            if device.l2_bytes not in taps:
                taps[device.l2_bytes] = load_tap(
                    "capture", device.l2_bytes, hook, transport, settings, Capture, kernel,
                    expression=expression, given=maps.given,
                )  # fmt: skip
            taps[device.l2_bytes].ifnames.append(device.name)
    except BaseException:
        for tap in taps.values():
            tap.close()
        raise
    finally:
        maps.close()  # the programs hold them
    return list(taps.values())


class Everywhere:
    """A program at TC ingress of whatever device, one tap for each link type."""

    def __init__(self) -> None:
        self.taps: list[Tap] = []

    def cover(self, devices: Iterable[Device]) -> list[Tap]:
        """Attach where we are not yet; return the taps that are new."""
        new = []
        for device in devices:
            tap = next((each for each in self.taps if each.l2_bytes == device.l2_bytes), None)
            if tap is None:
                tap = self._make(device.l2_bytes)
                self.taps.append(tap)
                new.append(tap)
            if not tap.on(device):
                tap.attach(device.name)
        return new

    def lose_dead(self) -> None:
        """Forget devices that are gone, and say so."""
        for tap in self.taps:
            for ifname in tap.lose_dead():
                say(f"{ifname} is gone; responses are awaited on the other devices")

    def _make(self, l2_bytes: int) -> Tap:
        raise NotImplementedError

    def detach(self) -> None:
        for tap in self.taps:
            tap.detach()

    def close(self) -> None:
        for tap in self.taps:
            tap.close()


class Progress(Everywhere):
    """Take in what ``intercepts`` send straight to this host (bpf/progress.c)."""

    def __init__(
        self, intercepts: Sequence[tuple[bytes, int]], port: int, cookie: int,
        transport: Transport, kernel: KernelSessions,
    ) -> None:  # fmt: skip
        super().__init__()
        self._intercepts = intercepts
        self._port = port
        self._cookie = cookie
        self._transport = transport
        self._kernel = kernel

    def _make(self, l2_bytes: int) -> Tap:
        number = len(self._intercepts)
        tap = load_tap(
            "progress", l2_bytes, Hook.TC_INGRESS, self._transport,
            Settings(datagram_port=self._port), Tap, self._kernel,
            entries={"intercepts": number, "probes": number},
        )  # fmt: skip
        maps = tap.module.maps
        maps["cookie"].update(bytes(4), self._cookie.to_bytes(8, sys.byteorder))
        for index, endpoint in enumerate(self._intercepts):
            maps["intercepts"].update(abi.ENDPOINT.pack(*endpoint), _number(index))
        return tap

    def probed_ns(self, index: int) -> int:
        """When the last probe of that intercept arrived (CLOCK_MONOTONIC), 0: none did."""
        key = index.to_bytes(4, sys.byteorder)
        values = [tap.module.maps["probes"].lookup(key) or b"" for tap in self.taps]
        return max((int.from_bytes(value, sys.byteorder) for value in values), default=0)


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
            Settings(port_lo=self._ports[0], port_hi=self._ports[1]), Tap, self._kernel,
            entries={
                "servers": len(self._targets), "ours": self._max_sessions + SPARE_SESSIONS
            },
        )  # fmt: skip
        for target in self._targets:
            tap.module.maps["servers"].update(abi.ENDPOINT.pack(*target), _number(1))
        for key in self._claimed:
            tap.module.maps["ours"].update(key, b"\1")
        return tap

    def claim(self, key: bytes) -> None:
        """The connection ``key`` (abi.KEY) is a copy; call it before its SYN leaves."""
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


def rss_bytes() -> int:
    """Resident memory of this process, what is mapped of rings and logs included."""
    return _statm()[1] * mmap.PAGESIZE


def own_bytes() -> int:
    """The same without what is mapped: what grows with sessions."""
    _, resident, shared, *_ = _statm()
    return (resident - shared) * mmap.PAGESIZE


def _statm() -> list[int]:
    fd = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [int(pages) for pages in os.read(fd, 128).split()]
    finally:
        os.close(fd)
