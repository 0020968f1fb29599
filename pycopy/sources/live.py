"""Live sources: a BPF program on the wire, its ring, and its counters.

A :class:`Tap` is one loaded program attached to one or more interfaces of the same link
type. The capture of the online server is a set of taps, and so is the intercept of the
zero-route mode. What the segments mean is the session engine's business.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from pycopy import loader, prelude
from pycopy.abi import Segment
from pycopy.attach import Attachment, Hook
from pycopy.devices import Device
from pycopy.pcapfilter import compile_filter
from pycopy.ring import Ring

#: TC_ACT_SHOT: at ingress nobody but us has seen the packet yet.
TC_ACT_SHOT = 2

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

    def on(self, ifname: str) -> bool:
        """True if attached to ``ifname``."""
        return any(each.ifname == ifname for each in self.attachments)

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
        self.module.close()


def _tap(
    source: str, l2_bytes: int, hook: Hook, ring_bytes: int, text: str, defines: Mapping[str, int]
) -> Tap:
    module = loader.load(
        source,
        defines={
            "PYCOPY_HOOK_XDP": int(hook is Hook.XDP),
            "PYCOPY_L2_BYTES": l2_bytes,
            "PYCOPY_RING_BYTES": ring_bytes,
            **defines,
        },
        prelude=text,
    )
    return Tap(module, ring_bytes, hook, l2_bytes)


def _spread(devices: Sequence[Device], make: Callable[[int], Tap]) -> list[Tap]:
    """Attach to every device, with one tap (``make(l2_bytes)``) for each link type among them."""
    taps: list[Tap] = []
    try:
        for device in devices:
            tap = next((each for each in taps if each.l2_bytes == device.l2_bytes), None)
            if tap is None:
                tap = make(device.l2_bytes)
                taps.append(tap)
            tap.attach(device.name)
    except BaseException:
        for tap in taps:
            tap.close()
        raise
    return taps


def capture(
    devices: Sequence[Device], services: Sequence[Service], hook: Hook, expression: str,
    ring_bytes: int,
) -> list[Tap]:  # fmt: skip
    """Capture the client segments of ``services`` on ``devices`` (bpf/capture.c)."""

    def make(l2_bytes: int) -> Tap:
        text = prelude.services_prelude(services) + compile_filter(expression, l2_bytes)
        return _tap("capture.c", l2_bytes, hook, ring_bytes, text, {})

    return _spread(devices, make)


def self_intercept(
    devices: Sequence[Device], targets: Sequence[tuple[bytes, int]], ports: tuple[int, int],
    ring_bytes: int,
) -> list[Tap]:  # fmt: skip
    """Swallow what ``targets`` send to our own ``ports`` (bpf/intercept.c, zero-route mode)."""

    def make(l2_bytes: int) -> Tap:
        text = prelude.targets_prelude(targets, *ports) + compile_filter("", l2_bytes)
        defines = {"PYCOPY_VERDICT_SWALLOW": TC_ACT_SHOT, "PYCOPY_CHANNEL_PORT": 0}
        return _tap("intercept.c", l2_bytes, Hook.TC_INGRESS, ring_bytes, text, defines)

    return _spread(devices, make)



def rss_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
