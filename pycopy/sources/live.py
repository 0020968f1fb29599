"""Live sources: a BPF program on the wire, its ring, and its counters.

A :class:`Tap` is one loaded program attached to one or more interfaces of the same link
type. The capture of the online server is a set of taps, and so is the intercept of the
zero-route mode. What the segments mean is the session engine's business.
"""

import mmap
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from pycopy import loader, prelude
from pycopy.abi import Segment
from pycopy.attach import Attachment, Hook
from pycopy.devices import Device, local_addresses
from pycopy.fastpath.kernel import KernelSessions
from pycopy.fastpath.maps import Maps
from pycopy.messages import say
from pycopy.pcapfilter import compile_filter
from pycopy.ring import Ring

#: TC_ACT_SHOT: at ingress nobody but us has seen the packet yet.
TC_ACT_SHOT = 2

#: Room in the kernel's table for copies that ended a moment ago (allocated when used).
SPARE_SESSIONS = 1 << 17

Service = tuple[bytes | None, int]


class Tap:
    """A program, its ring and where it is attached. Close it to detach."""

    def __init__(self, module: loader.Module, ring_bytes: int, hook: Hook, l2_bytes: int) -> None:
        self.module = module
        self.ring = Ring(module.maps["segments"].fd, ring_bytes)
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

    def __init__(self, module: loader.Module, ring_bytes: int, hook: Hook, l2_bytes: int) -> None:
        super().__init__(module, ring_bytes, hook, l2_bytes)
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
    source: str, l2_bytes: int, hook: Hook, ring_bytes: int, text: str,
    defines: Mapping[str, int | str], kind: type[AnyTap], maps: Maps | None = None,
) -> AnyTap:  # fmt: skip
    """Load ``source`` of bpf/ for ``hook``; ``text`` is generated C that goes before it.

    ``maps``: with the fast path, whose maps they are.
    """
    module = loader.load(
        source,
        defines={
            "PYCOPY_HOOK_XDP": int(hook is Hook.XDP),
            "PYCOPY_L2_BYTES": l2_bytes,
            "PYCOPY_RING_BYTES": ring_bytes,
            **defines,
            **(maps.defines() if maps else {}),
        },
        prelude=text,
        map_fds=maps.fds if maps else (),
    )
    return kind(module, ring_bytes, hook, l2_bytes)


def load_captures(
    devices: Sequence[Device], services: Sequence[Service], hook: Hook, expression: str,
    ring_bytes: int, forwarded: bool, kernel: KernelSessions | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[Capture]:  # fmt: skip
    """Load what captures the client segments of ``services`` on ``devices`` (bpf/capture.c).

    One tap for each link type; :meth:`Capture.begin` attaches it. A service without an address
    is any address of this host; ``forwarded``: of anybody. ``share``: which worker, and of how
    many. Raises PycopyError with nothing left loaded.
    """
    worker, workers = share
    defines = {"PYCOPY_WORKER": worker, "PYCOPY_WORKERS": workers} if workers > 1 else {}

    def make(l2_bytes: int) -> Capture:
        text = prelude.services_prelude(services, forwarded)
        text += compile_filter(expression, l2_bytes)
        maps = kernel.maps if kernel else None
        return load_tap("capture.c", l2_bytes, hook, ring_bytes, text, defines, Capture, maps)

    taps: dict[int, Capture] = {}
    try:
        for device in devices:
            if device.l2_bytes not in taps:
                taps[device.l2_bytes] = make(device.l2_bytes)
            taps[device.l2_bytes].ifnames.append(device.name)
    except BaseException:
        for tap in taps.values():
            tap.close()
        raise
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
        self, intercepts: Sequence[tuple[bytes, int]], port: int, cookie: int, ring_bytes: int,
        kernel: KernelSessions,
    ) -> None:  # fmt: skip
        super().__init__()
        self._intercepts = intercepts
        self._defines: dict[str, int | str] = {
            "PYCOPY_DATAGRAM_PORT": port,
            "PYCOPY_INTERCEPTS_MAX": len(intercepts),
        }
        self._cookie = cookie
        self._ring_bytes = ring_bytes
        self._kernel = kernel

    def _make(self, l2_bytes: int) -> Tap:
        text = prelude.intercepts_prelude(self._intercepts)
        tap = load_tap(
            "progress.c", l2_bytes, Hook.TC_INGRESS, self._ring_bytes, text, self._defines, Tap,
            self._kernel.maps,
        )  # fmt: skip
        tap.module.maps["cookie"].update(bytes(4), self._cookie.to_bytes(8, sys.byteorder))
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
        self, targets: Sequence[tuple[bytes, int]], ports: tuple[int, int], ring_bytes: int,
        max_sessions: int, kernel: KernelSessions | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._kernel = kernel
        self._targets = targets
        self._ports = ports
        self._ring_bytes = ring_bytes
        self._max_sessions = max_sessions
        self._claimed: set[bytes] = set()
        self._leaving: list[bytes] = []
        self._gone: list[bytes] = []

    def _make(self, l2_bytes: int) -> Tap:
        text = prelude.targets_prelude(self._targets, *self._ports) + compile_filter("", l2_bytes)
        defines = {
            "PYCOPY_VERDICT_SWALLOW": TC_ACT_SHOT,
            "PYCOPY_CHANNEL_PORT": 0,
            "PYCOPY_SESSIONS": self._max_sessions + SPARE_SESSIONS,
        }
        tap = load_tap(
            "intercept.c", l2_bytes, Hook.TC_INGRESS, self._ring_bytes, text, defines, Tap,
            self._kernel.maps if self._kernel else None,
        )  # fmt: skip
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
