"""The replay's end of the relays: responses straight from the intercepts' programs.

A UDP port that is ours, a cookie that only this run's intercepts know, and a program on
every device that takes in what bears both (bpf/progress.c): the :class:`Intake`. Whether the
way is open, the intercepts' probes say: they come by the very same way as responses.
:class:`Datagrams` makes one state of that, of what the intercepts say and of what they were
asked for; nobody else keeps any of it.

Tests: tests/lab/test_fastpath_relay.py
"""

import errno
import secrets
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from pycopy.channel import Relaying
from pycopy.command.values import INTERCEPT_PORT
from pycopy.errors import PycopyError
from pycopy.host.devices import find_devices
from pycopy.kernel import abi
from pycopy.kernel.attach import Hook
from pycopy.process.console import say
from pycopy.process.loop import READ, Loop
from pycopy.tap import Everywhere, Kept, Settings, Tap, Transport, as_u32, load_tap

#: An intercept's last probe may be so old; it sends one a second.
PROBE_NS = 3_000_000_000
#: And so long after it has offered them the first one may be on its way.
FIRST_PROBE_NS = 1_000_000_000
#: What is read from nobody: datagrams that only pretend to be ours.
_RECEIVE_BYTES = 4096


class RecordPrograms(Everywhere):
    """Take in what ``intercepts`` send straight to this host (bpf/progress.c)."""

    def __init__(
        self, intercepts: Sequence[tuple[bytes, int]], port: int, cookie: int,
        transport: Transport, kept: Kept,
    ) -> None:  # fmt: skip
        super().__init__()
        self._intercepts = intercepts
        self._port = port
        self._cookie = cookie
        self._transport = transport
        self._kept = kept

    def _make(self, l2_bytes: int) -> Tap:
        number = len(self._intercepts)
        tap = load_tap(
            "progress", l2_bytes, Hook.TC_INGRESS, self._transport,
            Settings(datagram_port=self._port), Tap, self._kept,
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
        kept: Kept, loop: Loop, on_ring: Callable[[Tap, int], None],
    ) -> None:  # fmt: skip
        self._loop = loop
        self._on_ring = on_ring
        self.cookie = secrets.randbits(64)
        self._socket = _reserve_port()
        self.port: int = self._socket.getsockname()[1]
        self._programs = RecordPrograms(intercepts, self.port, self.cookie, transport, kept)
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

    def is_open(self, index: int, now_ns: int) -> bool:
        """Whether probes of that intercept have arrived of late."""
        probed_ns = self._programs.probed_ns(index)
        return bool(probed_ns) and now_ns - probed_ns < PROBE_NS

    def close(self) -> None:
        for tap in self.taps:
            self._loop.remove(tap.ring.fileno())
        self._programs.close()
        self._socket.close()


class Peer(Protocol):
    """The connection to an intercept, as much of it as is needed here."""

    name: str

    @property
    def connected(self) -> bool: ...

    def tell_relaying(self, wanted: Relaying) -> None: ...


class _Way:
    """One intercept's datagrams."""

    def __init__(self, number: int) -> None:
        self.number = number
        #: What it says of them, since when that is not OFF, and what it was asked for.
        self.said = self.asked = Relaying.OFF
        self.offered_ns = 0


class Datagrams:
    """Whether responses come as datagrams: one state for all intercepts of a run.

        OFF: those of at least one cannot, :attr:`why` says why: over the channel, for all
        PROBING: not known yet, or asked for and not confirmed
        ON: all do

    OFF becomes PROBING when the last one that is missing connects or offers probes; PROBING
    becomes ON when probes of all arrive and all have confirmed; either becomes OFF when one is
    lost, takes its offer back, or is not heard.
    """

    def __init__(self, intake: Intake, peers: Sequence[Peer]) -> None:
        """``peers`` by the numbers that the intake knows them by."""
        self._intake = intake
        self._ways = {peer: _Way(number) for number, peer in enumerate(peers)}
        self.state = Relaying.PROBING
        self.why = ""

    @property
    def why_not(self) -> str:
        """Why they do not; empty: they do."""
        return "not yet" if self.state is Relaying.PROBING else self.why

    def on_lost(self, peer: Peer) -> None:
        way = self._ways[peer]
        way.said = way.asked = Relaying.OFF

    def on_relaying(self, peer: Peer, relaying: Relaying, now_ns: int) -> None:
        """``peer`` says so."""
        way = self._ways[peer]
        if way.said is Relaying.OFF:
            way.offered_ns = now_ns
        way.said = relaying

    def leave_out(self, peer: Peer) -> None:
        """It is another one by a second address."""
        del self._ways[peer]

    def judge(self, now_ns: int) -> Relaying:
        """Look at everything again; ask the intercepts for what has become possible."""
        state, self.why = Relaying.ON, ""
        for peer, way in self._ways.items():
            state, self.why = self._judge_one(peer, way, now_ns)
            if state is not Relaying.ON:
                break
        # As long as they do not all arrive, the channel is the better way for all.
        wanted = Relaying.ON if state is Relaying.ON else Relaying.OFF
        for peer, way in self._ways.items():
            if way.asked is not wanted and peer.connected:
                way.asked = wanted
                peer.tell_relaying(wanted)
        if any(way.said is not Relaying.ON for way in self._ways.values()):
            state = min(state, Relaying.PROBING)
        self.state = state
        return state

    def _judge_one(self, peer: Peer, way: _Way, now_ns: int) -> tuple[Relaying, str]:
        """Whether its datagrams arrive, and why not."""
        if not peer.connected:
            return Relaying.OFF, f"intercept {peer.name} is not connected"
        if way.said is Relaying.OFF:
            return Relaying.OFF, f"intercept {peer.name} sends responses over the channel only"
        if self._intake.is_open(way.number, now_ns):
            return Relaying.ON, ""
        if now_ns - way.offered_ns < FIRST_PROBE_NS:
            return Relaying.PROBING, ""
        return Relaying.OFF, (
            f"nothing arrives from intercept {peer.name} on UDP port {self._intake.port}"
            " (a firewall?)"
        )


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
