"""A tap: one BPF program on the wire, its ring, and its counters.

Attached to one or more interfaces of the same link type. The capture of the online server is a
set of taps, and so is whatever swallows responses. What the segments mean is the session
engine's business.

Tests: tests/bpf/test_live.py
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import IntEnum
from typing import NamedTuple, Protocol, TypeVar

from pycopy.host.devices import Device
from pycopy.kernel import abi, objects, syscall
from pycopy.kernel.attach import Attachment, Hook, attach
from pycopy.kernel.heartbeat import Heartbeat
from pycopy.kernel.module import Module
from pycopy.kernel.pcapfilter import filter_code
from pycopy.kernel.perfring import PerfRing
from pycopy.kernel.ring import Ring
from pycopy.loader import load
from pycopy.process.console import say
from pycopy.wire.segment import Segment

#: Takes a record, the payload of it that was recorded, and the time (CLOCK_MONOTONIC, ns).
OnSegment = Callable[[Segment, bytes, int], None]


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
        """With rings of ``most_bytes`` at most, for records that are few or short."""
        return self._replace(ring_bytes=min(self.ring_bytes, most_bytes))


def choose_transport(perf: bool, ring_bytes: int, heartbeat: Heartbeat) -> Transport:
    """The one that is asked for; perf rings, and a word, where the kernel has no other."""
    if not perf and not syscall.has_map_type(syscall.RINGBUF):
        perf = True
        say("this kernel has no BPF ring buffer (it came with Linux 5.8): perf ring buffers it is")
    return Transport(ring_bytes, perf, heartbeat.given)


class Tap:
    """A program, its ring and where it is attached. Close it to detach."""

    def __init__(self, module: Module, transport: Transport, hook: Hook, l2_bytes: int) -> None:
        self.module = module
        kind = PerfRing if transport.perf else Ring
        self.ring = kind(module.maps["segments"].fd, transport.ring_bytes)
        self.hook = hook
        self.l2_bytes = l2_bytes
        self.attachments: list[Attachment] = []

    def attach(self, ifname: str) -> Attachment:
        """Attach to one more interface; raises PycopyError, and leaves the others alone."""
        attachment = attach(self.module, ifname, self.hook)
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
        """At most ``limit`` records, each with its payload, as the ring has them."""
        return self.ring.drain(limit)

    def detach(self) -> None:
        """Stop seeing packets; what is in the ring stays readable."""
        for attachment in self.attachments:
            attachment.close()
        self.attachments.clear()

    def close(self) -> None:
        """Detach, and give up ring and program; what is still in the ring is lost."""
        self.detach()
        self.ring.close()
        self.module.close()


def sum_counters(taps: Iterable[Tap], counts: type[IntEnum]) -> list[int]:
    """All counters of several programs of one kind, which are numbered by ``counts``."""
    each = [tap.counters(len(counts)) for tap in taps]
    return [sum(values) for values in zip(*each, strict=True)] or [0] * len(counts)


class Kept(Protocol):
    """The maps in which the kernel's sessions are: pycopy/fastpath/maps.py."""

    @property
    def given(self) -> Mapping[str, int]:
        """Their descriptors by name, for pycopy.loader.load()."""

    @property
    def constants(self) -> Mapping[abi.Constant, int]:
        """What programs that use them are linked with."""


AnyTap = TypeVar("AnyTap", bound=Tap)


def load_tap(
    role: str, l2_bytes: int, hook: Hook, transport: Transport, settings: Settings,
    kind: type[AnyTap], kept: Kept | None = None, *, expression: str = "",
    given: Mapping[str, int] | None = None, entries: Mapping[str, int] | None = None,
) -> AnyTap:  # fmt: skip
    """Load the program of ``role`` (objects.py) for ``hook``, and tell it what it must know.

    ``kept``: with the fast path, and the sessions that it keeps. ``given`` and ``entries``: as in
    pycopy.loader.load(). Raises PycopyError with nothing left loaded.
    """
    xdp = hook is Hook.XDP
    module = load(
        objects.name_of(role, xdp=xdp, l2_bytes=l2_bytes, fastpath=kept is not None),
        given={**transport.given, **(kept.given if kept else {}), **(given or {})},
        entries={"segments": transport.ring_bytes, **(entries or {})},
        constants=kept.constants if kept else None,
        filter_code=filter_code(expression, l2_bytes, xdp),
        perf=transport.perf,
    )
    try:
        module.maps["settings"].update(bytes(4), abi.SETTINGS.pack(*settings))
        return kind(module, transport, hook, l2_bytes)
    except BaseException:
        module.close()
        raise


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
        """Stop seeing packets on every device; what is in the rings stays readable."""
        for tap in self.taps:
            tap.detach()

    def close(self) -> None:
        """Close every tap."""
        for tap in self.taps:
            tap.close()


def as_u32(value: int) -> bytes:
    """A map's key or value of 32 bits."""
    return value.to_bytes(4, sys.byteorder)
