"""The replay's end of the relays: responses straight from the intercepts' programs.

A UDP port that is ours, a cookie that only this run's intercepts know, and a program on
every device that takes in what bears both (bpf/progress.c). Whether the way is open, the
intercepts' probes say: they come by the very same way as responses.

Tests: tests/lab/test_fastpath_relay.py
"""

import errno
import secrets
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

from pycopy.command.values import INTERCEPT_PORT
from pycopy.errors import PycopyError
from pycopy.fastpath.kernel import KernelSessions
from pycopy.host.devices import find_devices
from pycopy.kernel import abi
from pycopy.kernel.attach import Hook
from pycopy.process.console import say
from pycopy.process.loop import READ, Loop
from pycopy.tap import Everywhere, Settings, Tap, Transport, as_u32, load_tap

#: An intercept's last probe may be so old; it sends one a second.
PROBE_NS = 3_000_000_000
#: What is read from nobody: datagrams that only pretend to be ours.
_RECEIVE_BYTES = 4096


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
            Settings(datagram_port=self._port), Tap, self._kernel.maps,
            entries={"intercepts": number, "probes": number},
        )  # fmt: skip
        maps = tap.module.maps
        maps["cookie"].update(bytes(4), self._cookie.to_bytes(8, sys.byteorder))
        for index, endpoint in enumerate(self._intercepts):
            maps["intercepts"].update(abi.ENDPOINT.pack(*endpoint), as_u32(index))
        return tap

    def probed_ns(self, index: int) -> int:
        """When the last probe of that intercept arrived (CLOCK_MONOTONIC), 0: none did."""
        key = index.to_bytes(4, sys.byteorder)
        values = [tap.module.maps["probes"].lookup(key) or b"" for tap in self.taps]
        return max((int.from_bytes(value, sys.byteorder) for value in values), default=0)


class Intake:
    """One run's, for ``intercepts``, each an address of 16 bytes and its channel's port."""

    def __init__(
        self, intercepts: Sequence[tuple[bytes, int]], transport: Transport,
        kernel: KernelSessions, loop: Loop, on_ring: Callable[[Tap, int], None],
    ) -> None:  # fmt: skip
        self._loop = loop
        self._on_ring = on_ring
        self.cookie = secrets.randbits(64)
        self._socket = _reserve_port()
        self.port: int = self._socket.getsockname()[1]
        self._programs = Progress(intercepts, self.port, self.cookie, transport, kernel)
        self.taps = self._programs.taps

    def cover(self) -> None:
        """Take in what comes on any device that has an address."""
        for tap in self._programs.cover(find_devices([])):
            self._loop.add(tap.ring.fileno(), READ, partial(self._on_ring, tap))

    def watch(self) -> None:
        """Devices have come or gone."""
        self._programs.lose_dead()
        try:
            self.cover()
        except PycopyError as error:
            say(f"responses may go unseen: {error}")

    def is_open(self, index: int) -> bool:
        """Whether datagrams of that intercept arrive."""
        probed_ns = self._programs.probed_ns(index)
        return bool(probed_ns) and time.monotonic_ns() - probed_ns < PROBE_NS

    def close(self) -> None:
        self._programs.close()
        self._socket.close()


def _reserve_port() -> socket.socket:
    """A UDP port of all addresses: the channel's number, for a firewall's rule to name, if
    nobody has it."""
    try:
        return _bound(INTERCEPT_PORT)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
    return _bound(0)


def _bound(port: int) -> socket.socket:
    try:
        return _bind(socket.AF_INET6, ("::", port))
    except OSError as error:  # without IPv6
        if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            raise
        return _bind(socket.AF_INET, ("0.0.0.0", port))


def _bind(family: socket.AddressFamily, where: tuple[str, int]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        sock.bind(where)
    except OSError:
        sock.close()
        raise
    return sock
