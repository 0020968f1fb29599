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
from pycopy.errors import PycopyError
from pycopy.pcapfilter import compile_filter
from pycopy.ring import Ring

#: ARPHRD_ETHER and ARPHRD_LOOPBACK frames begin with an Ethernet header; others with IP.
_ETHERNET_TYPES = frozenset({1, 772})
ETHERNET_BYTES = 14

#: TC_ACT_SHOT: at ingress nobody but us has seen the packet yet.
TC_ACT_SHOT = 2

Service = tuple[bytes | None, int]


def l2_bytes(ifname: str) -> int:
    """Bytes of link header on ``ifname``: 14, or 0 on devices that carry bare IP."""
    arphrd = int(Path(f"/sys/class/net/{ifname}/type").read_text())
    return ETHERNET_BYTES if arphrd in _ETHERNET_TYPES else 0


class Tap:
    """A program, its ring and where it is attached. Close it to detach."""

    def __init__(self, module: loader.Module, ring_bytes: int, hook: Hook, link_bytes: int) -> None:
        self.module = module
        self.ring = Ring(module.maps["segments"].fd, ring_bytes)
        self.hook = hook
        self.link_bytes = link_bytes
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
    source: str, ifname: str, hook: Hook, ring_bytes: int, text: str, defines: Mapping[str, int]
) -> Tap:
    link_bytes = l2_bytes(ifname)
    module = loader.load(
        source,
        defines={
            "PYCOPY_HOOK_XDP": int(hook is Hook.XDP),
            "PYCOPY_L2_BYTES": link_bytes,
            "PYCOPY_RING_BYTES": ring_bytes,
            **defines,
        },
        prelude=text,
    )
    return Tap(module, ring_bytes, hook, link_bytes)


def _spread(ifnames: Sequence[str], make: Callable[[str], Tap]) -> list[Tap]:
    """Attach to every interface, with one tap for each link type among them."""
    taps: list[Tap] = []
    try:
        for ifname in ifnames:
            link_bytes = l2_bytes(ifname)
            tap = next((each for each in taps if each.link_bytes == link_bytes), None)
            if tap is None:
                tap = make(ifname)
                taps.append(tap)
            tap.attach(ifname)
    except BaseException:
        for tap in taps:
            tap.close()
        raise
    return taps


def capture(
    ifnames: Sequence[str], services: Sequence[Service], hook: Hook, expression: str,
    ring_bytes: int,
) -> list[Tap]:  # fmt: skip
    """Capture the client segments of ``services`` on ``ifnames`` (bpf/capture.c)."""

    def make(ifname: str) -> Tap:
        text = prelude.services_prelude(services) + compile_filter(expression, l2_bytes(ifname))
        return _tap("capture.c", ifname, hook, ring_bytes, text, {})

    return _spread(ifnames, make)


def self_intercept(
    ifnames: Sequence[str], targets: Sequence[tuple[bytes, int]], ports: tuple[int, int],
    ring_bytes: int,
) -> list[Tap]:  # fmt: skip
    """Swallow what ``targets`` send to our own ``ports`` (bpf/intercept.c, zero-route mode)."""

    def make(ifname: str) -> Tap:
        text = prelude.targets_prelude(targets, *ports) + compile_filter("", l2_bytes(ifname))
        defines = {"PYCOPY_VERDICT_SWALLOW": TC_ACT_SHOT, "PYCOPY_CHANNEL_PORT": 0}
        return _tap("intercept.c", ifname, Hook.TC_INGRESS, ring_bytes, text, defines)

    return _spread(ifnames, make)


def default_interfaces(services: Sequence[Service]) -> list[str]:
    """The interfaces to capture on when none is named: up, with an address, not loopback.

    A bridge has the address and its ports do not, so no packet is seen twice.
    """
    from pycopy import nexthop

    names = [
        each.ifname
        for each in nexthop.interfaces()
        if each.up and each.has_address and not each.is_loopback
    ]
    if not names:
        raise PycopyError(
            "no network interface is up and has an address",
            "name the one that carries the service with -i",
        )
    return names


def rss_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
