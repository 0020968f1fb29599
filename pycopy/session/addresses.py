"""Which source address and port a copy gets towards the target.

Three ways, by placement and -c: the online host's own address with a port of a reserved
range (zero-route mode), the client's own address, or one of a pool. Each answers with the
36-byte key of the connection to the target (KEY) that nobody uses, or None. Who uses
what is the table's knowledge, asked through ``is_free``.
"""

import ipaddress
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol
from zlib import crc32

from pycopy.wire.address import family_of, map_address
from pycopy.wire.segment import KEY
from pycopy.wire.seq import MASK

IsFree = Callable[[bytes], bool]

#: Ports tried before a pool member or a client address is given up, and members tried:
#: what is exhausted must not slow down everything else.
TRIES = 256
MEMBERS = 8

#: Replacement ports lie above the well-known and registered services.
PORT_LO, PORT_HI = 10_000, 65_535
PORTS = range(PORT_LO, PORT_HI + 1)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Addresses(Protocol):
    """What the three ways have in common."""

    #: What the port may be where it is not the client's own, in rising order.
    ports: Sequence[int]

    def allocate(
        self, client_addr: bytes, client_port: int, target_addr: bytes, target_port: int,
        is_free: IsFree,
    ) -> bytes | None:  # fmt: skip
        """Return a free key towards the target's address and port, or None."""


def other_port(target_key: bytes, jump: int, ports: Sequence[int], is_free: IsFree) -> bytes | None:
    """Return a free key that differs from ``target_key`` in its port, one of ``ports``, or None.

    ``jump``: any number that another replay with the same wish does not have, so that the
    two do not go from port to port together.
    """
    source, target_addr, port, target_port = KEY.unpack(target_key)
    return _next_free(source, port + 1 + jump, ports, target_addr, target_port, is_free)


def _next_free(
    source: bytes, first: int, ports: Sequence[int], target_addr: bytes, target_port: int,
    is_free: IsFree,
) -> bytes | None:  # fmt: skip
    """Return the first free key with one of ``ports`` from ``first`` on; TRIES at most."""
    start = bisect_left(ports, PORT_LO + (first - PORT_LO) % len(PORTS))
    for step in range(min(TRIES, len(ports))):
        port = ports[(start + step) % len(ports)]
        key = KEY.pack(source, target_addr, port, target_port)
        if is_free(key):
            return key
    return None


class KeptAddresses:
    """The client's own address and port; another port only when that pair is taken.

    A client of the other IP version than the target has no address to keep.
    """

    def __init__(self, ports: Sequence[int] = PORTS) -> None:
        """``ports``: what another port may be, in rising order."""
        self.ports = ports

    def allocate(
        self, client_addr: bytes, client_port: int, target_addr: bytes, target_port: int,
        is_free: IsFree,
    ) -> bytes | None:  # fmt: skip
        """As in :class:`Addresses`; the client's own address always, its port if it is free."""
        if family_of(client_addr) != family_of(target_addr):
            return None
        key = KEY.pack(client_addr, target_addr, client_port, target_port)
        if is_free(key):
            return key
        return _next_free(
            client_addr, client_port + 1, self.ports, target_addr, target_port, is_free
        )


class PooledAddresses:
    """-c: a member of the pool chosen by a stable hash of the client, its port if free.

    Unlike the original's table of first sight the mapping survives a restart and is the
    same in every instance, and ports move out of each other's way.
    """

    def __init__(
        self, networks: Sequence[Network], excluded: frozenset[bytes],
        ports: Sequence[int] = PORTS,
    ) -> None:  # fmt: skip
        """``excluded`` are 16-byte addresses never to be used: the targets' own; ``ports``
        as in :class:`KeptAddresses`.
        """
        self._pools: dict[int, list[Network]] = {
            4: [net for net in networks if net.version == 4],
            6: [net for net in networks if net.version == 6],
        }
        self._excluded = excluded
        self.ports = ports

    def allocate(
        self, client_addr: bytes, client_port: int, target_addr: bytes, target_port: int,
        is_free: IsFree,
    ) -> bytes | None:  # fmt: skip
        """As in :class:`Addresses`; the client's pool member, or one of the next few."""
        start = crc32(client_addr)
        for attempt in range(MEMBERS):
            source = self._member(target_addr, start + attempt)
            if source is None:
                return None
            if source in self._excluded:
                continue
            key = KEY.pack(source, target_addr, client_port, target_port)
            if is_free(key):
                return key
            other = _next_free(
                source, client_port + 1, self.ports, target_addr, target_port, is_free
            )
            if other is not None:
                return other
        return None

    def _member(self, target_addr: bytes, number: int) -> bytes | None:
        """Return pool member ``number`` (taken round) of the target's family, 16 bytes."""
        pool = self._pools[family_of(target_addr)]
        *starts, total = accumulate(map(usable_hosts, pool), initial=0)
        if total == 0:
            return None
        number %= total
        index = bisect_right(starts, number) - 1
        net = pool[index]
        return map_address(net[first_host(net) + number - starts[index]])


class SelfPorts:
    """Zero-route mode: the online host's own address, ports of one range in turn.

    In turn, so that a port rests as long as possible before it is used again: the target
    may keep the old connection in TIME_WAIT for a minute.
    """

    def __init__(
        self, ports: Sequence[int], source_for: Callable[[bytes], bytes], first: int = 0
    ) -> None:
        """``ports``: the reserved ones, none in use; ``source_for(target_addr)``: our address;
        ``first``: index of the port to begin with.
        """
        self.ports = ports
        self._source_for = source_for
        self._first = first
        self._next: dict[tuple[bytes, int], int] = {}

    def allocate(
        self, client_addr: bytes, client_port: int, target_addr: bytes, target_port: int,
        is_free: IsFree,
    ) -> bytes | None:  # fmt: skip
        """As in :class:`Addresses`: our own address and the next port of the range that is free."""
        source = self._source_for(target_addr)
        ports, target = self.ports, (target_addr, target_port)
        position = self._next.get(target, self._first)
        for _ in range(min(len(ports), TRIES)):
            key = KEY.pack(source, target_addr, ports[position], target_port)
            position = (position + 1) % len(ports)
            self._next[target] = position
            if is_free(key):
                return key
        return None


def usable_hosts(net: Network) -> int:
    """Addresses of ``net`` that a host may have: all but the first and last of a wide IPv4 one."""
    if net.version == 4 and net.prefixlen < 31:
        return net.num_addresses - 2
    return net.num_addresses


def first_host(net: Network) -> int:
    """Which address of ``net`` is the first of its :func:`usable_hosts`."""
    return 0 if usable_hosts(net) == net.num_addresses else 1


#: Multiply, then fold: neighbouring ports go to different workers.
WORKER_MIX = ((0x7FEB352D, 15), (0x846CA68B, 16))


def worker_of(client_port: int, workers: int) -> int:
    """Which of so many workers has the flows of that port; the twin of is_mine() in capture.c."""
    mixed = client_port
    for factor, shift in WORKER_MIX:
        mixed = mixed * factor & MASK
        mixed ^= mixed >> shift
    return mixed * workers >> 32


def own_ports(worker: int, workers: int) -> Sequence[int]:
    """Ports that this worker may give copies whose client's own port is taken, rising."""
    if workers == 1:
        return PORTS
    return [port for port in PORTS if worker_of(port, workers) == worker]
