"""The live source: clients' segments as they arrive on this host's devices (bpf/capture.c)."""

import contextlib
import os
import time
from collections.abc import Sequence
from functools import partial

from pycopy.host.devices import Device, local_addresses
from pycopy.kernel import abi, syscall
from pycopy.kernel.attach import Hook
from pycopy.kernel.module import Module, make_map
from pycopy.process.console import say
from pycopy.process.loop import READ, Loop
from pycopy.tap import Kept, OnSegment, Settings, Tap, Transport, as_u32, load_tap

Service = tuple[bytes | None, int]

#: Records taken from a ring before timers and the other inputs get their turn.
BATCH = 256
#: Records taken from a ring that fills faster than that: what is lifted meanwhile keeps it
#: from running over.
BUSY_BATCH = 64


class Capture(Tap):
    """A tap on clients' segments; it has been told which addresses are this host's."""

    def __init__(self, module: Module, transport: Transport, hook: Hook, l2_bytes: int) -> None:
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
            self.given["service_ports"] = make_map("service_ports")
            self.given["services"] = make_map("services", max(with_address, 1))
            ports: dict[int, int] = {}
            for index, (address, port) in enumerate(services):
                if address is None:
                    # One that is named before at some address there goes first, by itself.
                    ports[port] = ports.get(port, 0) | own | index
                else:
                    ports[port] = ports.get(port, 0) | abi.PORT_GIVEN
                    key = abi.ENDPOINT.pack(address, port)
                    syscall.map_update(self.given["services"], key, as_u32(index))
            for port, found in ports.items():
                syscall.map_update(self.given["service_ports"], as_u32(port), as_u32(found))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptors; what programs use stays until they are gone."""
        for fd in self.given.values():
            os.close(fd)
        self.given = {}


def load_captures(
    devices: Sequence[Device], services: Sequence[Service], hook: Hook, expression: str,
    transport: Transport, forwarded: bool, kept: Kept | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[Capture]:  # fmt: skip
    """Load what captures the client segments of ``services`` on ``devices`` (bpf/capture.c).

    One tap for each link type; :meth:`Capture.begin` attaches it. A service without an address
    is any address of this host; ``forwarded``: of anybody. ``share``: which worker, and of how
    many. ``kept``: as in load_tap(). Raises PycopyError with nothing left loaded.
    """
    taps: dict[int, Capture] = {}
    settings = Settings(*share)
    maps = Services(services, forwarded)
    try:
        for device in devices:
            if device.l2_bytes not in taps:
                taps[device.l2_bytes] = load_tap(
                    "capture", device.l2_bytes, hook, transport, settings, Capture, kept,
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


class Captures:
    """All taps on clients' segments of a run, as its driver uses them."""

    def __init__(
        self, taps: Sequence[Capture], loop: Loop, on_client: OnSegment, lift_bytes: int
    ) -> None:
        """``lift_bytes``: so much may be lifted out of a ring that fills too fast."""
        self.taps = taps
        self._loop = loop
        self._on_client = on_client
        self._lift_bytes = lift_bytes

    def begin(self) -> None:
        """See packets from now on. Raises PycopyError."""
        for tap in self.taps:
            tap.begin()
            self._loop.add(tap.ring.fileno(), READ, partial(self._on_ring, tap))
            for attachment in tap.attachments:
                if attachment.reason:
                    say(f"{attachment.ifname}: {attachment.how}, since {attachment.reason}")

    def describe(self) -> str:
        """The devices, and how they are captured."""
        attachments = [each for tap in self.taps for each in tap.attachments]
        how = {each.how for each in attachments}
        return f"{', '.join(each.ifname for each in attachments)} ({', '.join(sorted(how))})"

    def watch(self) -> bool:
        """Addresses and devices come and go; False if no device is left."""
        for tap in self.taps:
            for ifname in tap.lose_dead():
                say(f"pycopy: {ifname} is gone; nothing is captured there any more")
        if not any(tap.attachments for tap in self.taps):
            return False
        for tap in self.taps:
            tap.name_local_addresses()
        return True

    def _on_ring(self, tap: Capture, _events: int = READ) -> None:
        now_ns = time.monotonic_ns()
        on_client, ring = self._on_client, tap.ring
        ring.lift(self._lift_bytes)
        for segment, payload in ring.drain(BUSY_BATCH if ring.lifted_bytes else BATCH):
            on_client(segment, payload, now_ns)
        if ring.lifted_bytes:
            self._loop.again(ring.fileno())

    def is_unread(self) -> bool:
        """Whether a ring has something."""
        return any(tap.ring.pending_bytes() for tap in self.taps)

    def read_rest(self) -> None:
        """Take what is left in the rings; nothing is added any more."""
        for tap in self.taps:
            while tap.ring.pending_bytes():
                self._on_ring(tap)

    def detach(self) -> None:
        """Stop seeing packets; what is in the rings stays readable."""
        for tap in self.taps:
            tap.detach()

    def close(self) -> None:
        """Detach all of them and leave the loop; safe after a failed start."""
        with contextlib.ExitStack() as every_one:
            for tap in self.taps:
                self._loop.remove(tap.ring.fileno())
                every_one.callback(tap.close)
