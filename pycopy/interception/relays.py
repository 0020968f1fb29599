"""The intercept's relays: responses that its programs send straight to their replay.

A replay that asks for it (HELLO) gets a relay: an entry of the programs' map ``relays``. The
way there is followed like a target's, and a probe goes along it once a second. While the
replay says that they arrive, the claims on its responses point to the entry; a firewall in
between shows there by their absence. Everybody else gets records over the channel. What a
claim is, verdicts.py knows; what is in a datagram, the programs (bpf/relay.h).
"""

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Callable
from typing import Any

from pycopy.channel import Hello, Range, Relaying
from pycopy.channel.server import Peer
from pycopy.host.nexthop import Hop, NextHops
from pycopy.interception.verdicts import VerdictMap, Verdicts
from pycopy.kernel import abi
from pycopy.process.loop import READ, Loop
from pycopy.wire.address import family_of, map_address

PROBE_NS = 1_000_000_000

#: No checksum, as in what the programs send: a firewall may mind (asm-generic/socket.h,
#: linux/udp.h).
_SO_NO_CHECK = 11
_UDP_NO_CHECK6_TX = 101

_PORT = struct.Struct("!H")


class Relay:
    """The way of one replay's responses: who it is, how it is reached, what it was told."""

    def __init__(
        self, number: int, hello: Hello, hop: Hop, ours: tuple[Any, ...], peer: tuple[Any, ...]
    ) -> None:
        self.number = number
        self.hello = hello
        self.hop = hop
        #: The ends of its channel connection.
        self.ours, self.peer = ours, peer
        #: The replay gets our probes, and wants its responses the same way.
        self.wanted = False
        #: What the replay has been told, and the programs.
        self.state = Relaying.OFF
        self.entry = b""

    def entry_now(self) -> bytes:
        """What the programs must know (``struct pycopy_relay``); empty while there is no way."""
        hop = self.hop
        if not hop.usable or len(hop.l2) != 14:
            return b""
        entry = abi.RelayEntry(
            cookie=self.hello.cookie, ifindex=hop.ifindex, family=family_of(hop.destination),
            reserved=0, l2=hop.l2, source=_packed(self.ours), destination=hop.destination,
            source_port=_PORT.pack(self.ours[1]),
            destination_port=_PORT.pack(self.hello.relay_port),
        )  # fmt: skip
        return abi.RELAY_ENTRY.pack(*entry)

    def probe(self) -> bytes:
        """A datagram (``struct pycopy_datagram``) that only shows that the way is open."""
        head = abi.DATAGRAM_HEAD.pack(self.hello.cookie, 0, abi.PROBE, 0)
        return head.ljust(abi.DATAGRAM_BYTES, b"\0")


class Relays:
    """All of them. A replay is told when its responses begin or cease to be relayed."""

    def __init__(self, loop: Loop, verdicts: Verdicts, log: Callable[[str], None]) -> None:
        self._loop = loop
        self._verdicts = verdicts
        self._log = log
        #: The map ``relays`` of each program that can relay: at XDP, or on bare IP, none can.
        self._maps: list[VerdictMap] = []
        self._ranges: dict[Peer, tuple[Range, ...]] = {}
        self._relays: dict[Peer, Relay] = {}
        #: Probes leave from the address and port that datagrams have.
        self._sockets: dict[tuple[Any, ...], socket.socket] = {}
        self._hops: NextHops | None = None
        self._probe_at = 0
        self._said_shared = False
        self._closed = False

    # -- programs -------------------------------------------------------------------------

    def add_map(self, relays: VerdictMap) -> None:
        """One more program's map ``relays``."""
        self._maps.append(relays)
        for relay in self._relays.values():
            if relay.entry:
                relays.update(_key(relay.number), relay.entry)

    # -- replays --------------------------------------------------------------------------

    def welcome(self, replay: Peer, hello: Hello) -> Relaying:
        """A replay is here: whether its responses may be relayed."""
        self._ranges[replay] = hello.ranges
        if hello.relay_port and self._maps:
            self._make(replay, hello)
        self._refresh(newcomer=replay)
        relay = self._relays.get(replay)
        if relay is None:
            return Relaying.OFF
        self._send_probe(relay)
        return relay.state

    def want(self, replay: Peer, wanted: Relaying) -> None:
        """The replay gets our probes, or does not any more."""
        relay = self._relays.get(replay)
        if relay is not None:
            relay.wanted = wanted is Relaying.ON
            self._refresh()

    def _make(self, replay: Peer, hello: Hello) -> None:
        used = {relay.number for relay in self._relays.values()}
        number = next(number for number in range(abi.RELAYS) if number not in used)
        try:
            ours, peer = replay.ends()
            self._open_socket(ours)
        except OSError as error:
            self._log(f"responses of {replay.name} go over the channel: {error.strerror}")
            return
        if self._hops is None:
            self._hops = NextHops(on_change=lambda _hop: self._refresh())
            self._loop.add(self._hops.fileno(), READ, self._hops.on_readable)
        hop = self._hops.resolve(_packed(peer))
        self._relays[replay] = Relay(number, hello, hop, ours, peer)

    def leave(self, replay: Peer) -> None:
        """A replay is gone: what still comes for it goes into the ring."""
        if self._closed:
            return
        ranges = self._ranges.pop(replay, ())
        relay = self._relays.pop(replay, None)
        self._verdicts.relay_ranges(ranges, None)
        self._refresh()
        if relay is not None:
            self._write(relay, b"")

    def _refresh(self, newcomer: Peer | None = None) -> None:
        """Who can be relayed to now; claims, programs and replays are told what is new.

        ``newcomer`` is told by WELCOME.
        """
        owners: dict[Range, int] = {}
        for ranges in self._ranges.values():
            for item in ranges:
                owners[item] = owners.get(item, 0) + 1
        strangers = [replay for replay, ranges in self._ranges.items() if not ranges]
        if len(strangers) > 1 and not self._said_shared:
            self._said_shared = True
            self._log("several replays keep clients' addresses: responses go over the channel")
        by_default = None
        changed = []
        for replay, relay in list(self._relays.items()):
            ranges = self._ranges[replay]
            alone = all(owners[item] == 1 for item in ranges) if ranges else len(strangers) == 1
            entry = relay.entry_now()
            state = Relaying.OFF
            if alone and entry:
                state = Relaying.ON if relay.wanted else Relaying.PROBING
            on = state is Relaying.ON
            if entry != relay.entry and entry:
                self._write(relay, entry)
            self._verdicts.relay_ranges(ranges, relay.number if on else None)
            if on and not ranges:
                by_default = relay.number
            if not entry and relay.entry:
                self._write(relay, b"")
            if state is not relay.state:
                relay.state = state
                changed.append(replay)
        self._verdicts.relay_strangers(by_default)
        for replay in changed:
            if replay is not newcomer and replay in self._relays:
                replay.tell_relaying(self._relays[replay].state)

    def _write(self, relay: Relay, entry: bytes) -> None:
        for table in self._maps:
            table.update(_key(relay.number), entry or bytes(abi.RELAY_ENTRY.size))
        relay.entry = entry

    # -- probes ---------------------------------------------------------------------------

    def _open_socket(self, ours: tuple[Any, ...]) -> None:
        if ours in self._sockets:
            return
        family = socket.AF_INET6 if len(ours) == 4 else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                sock.setsockopt(socket.IPPROTO_UDP, _UDP_NO_CHECK6_TX, 1)
            sock.setsockopt(socket.SOL_SOCKET, _SO_NO_CHECK, 1)
            sock.bind(ours)
        except OSError:
            sock.close()
            raise
        self._sockets[ours] = sock

    def _send_probe(self, relay: Relay) -> None:
        if relay.state is not Relaying.OFF:
            # What goes wrong here is what the probe's absence says.
            with contextlib.suppress(OSError):
                to = (relay.peer[0], relay.hello.relay_port, *relay.peer[2:])
                self._sockets[relay.ours].sendto(relay.probe(), to)

    # -- time, end ------------------------------------------------------------------------

    def on_timer(self, now_ns: int) -> None:
        """Call it some times a second."""
        if self._hops is not None and now_ns >= self._hops.deadline_ns:
            self._hops.tick(now_ns)
        if now_ns >= self._probe_at:
            self._probe_at = now_ns + PROBE_NS
            for relay in self._relays.values():
                self._send_probe(relay)

    def close(self) -> None:
        """Close the sockets; what the programs were told stays as it is."""
        self._closed = True
        if self._hops is not None:
            self._loop.remove(self._hops.fileno())
            self._hops.close()
            self._hops = None
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()


def _key(number: int) -> bytes:
    return number.to_bytes(4, "little")


def _packed(end: tuple[Any, ...]) -> bytes:
    """16 bytes of a socket's address; what a dual-stack socket has is IPv4-mapped already."""
    return map_address(ipaddress.ip_address(end[0].partition("%")[0]))
