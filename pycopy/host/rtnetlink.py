"""Ask the kernel for routes, neighbours and links (rtnetlink), and hear of changes.

One socket for all requests, since thousands of targets have thousands of them. It must not
know what the answers are used for. Addresses are 16 bytes, IPv4 as IPv4-mapped.

Tests: tests/unit/test_nexthop.py
"""

import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from pycopy.host.netlink import ACK, CREATE, REQUEST, attribute, attributes
from pycopy.wire.address import MAPPED_PREFIX, unmap_address

# linux/netlink.h, rtnetlink.h
_NLMSG_ERROR = 2
RTM_GETLINK, RTM_GETROUTE = 18, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
_RTMGRP_LINK, _RTMGRP_NEIGH = 0x1, 0x4
_RTMGRP_IPV4_IFADDR, _RTMGRP_IPV4_ROUTE, _RTMGRP_IPV4_RULE = 0x10, 0x40, 0x80
_RTMGRP_IPV6_IFADDR, _RTMGRP_IPV6_ROUTE, _RTMGRP_IPV6_RULE = 0x100, 0x400, 0x40000
_GROUPS = (
    _RTMGRP_LINK
    | _RTMGRP_NEIGH
    | _RTMGRP_IPV4_IFADDR
    | _RTMGRP_IPV4_ROUTE
    | _RTMGRP_IPV4_RULE
    | _RTMGRP_IPV6_IFADDR
    | _RTMGRP_IPV6_ROUTE
    | _RTMGRP_IPV6_RULE
)
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC, _RTA_METRICS, _RTA_VIA = 1, 4, 5, 7, 8, 18
_RTAX_MTU = 2
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU = 1, 3, 4
_NDA_DST, _NDA_LLADDR, _NDA_FLAGS_EXT = 1, 2, 15
_NTF_USE = 0x01

_NLMSGHDR = struct.Struct("=IHHII")
_ERRNO = struct.Struct("=i")
_U32 = struct.Struct("=I")
#: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_RTMSG = struct.Struct("=8BI")
#: family, type, index, flags, change
_IFINFOMSG = struct.Struct("=BxHiII")
#: family, ifindex, state, flags, type
_NDMSG = struct.Struct("=BxxxiHBB")
_DATAGRAM_BYTES = 1 << 16


class Route(NamedTuple):
    """How packets to a destination leave (``struct rtmsg``); addresses of 16 bytes."""

    kind: int  #: RTN_*
    ifindex: int
    gateway: bytes  #: empty: none
    source: bytes  #: empty: none
    mtu: int  #: 0: the device's


class Link(NamedTuple):
    """A network device (``struct ifinfomsg`` and its attributes); ``mtu`` in bytes."""

    ifname: str
    kind: int  #: ARPHRD_*
    flags: int  #: IFF_*
    mtu: int
    mac: bytes


class Entry(NamedTuple):
    """An entry of the neighbour table (``struct ndmsg`` and its attributes)."""

    state: int  #: NUD_*
    flags: int  #: NTF_*
    extended: bool  #: it has flags beyond those: the kernel sends them for managed entries only
    mac: bytes


class Neighbour(NamedTuple):
    """Who must answer ARP or neighbour discovery on an interface."""

    ifindex: int
    address: bytes


def messages(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(type, offset, length) of every message in a netlink datagram."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, _flags, _seq, _port = _NLMSGHDR.unpack_from(data, offset)
        if length < 16 or offset + length > len(data):
            return
        yield kind, offset, length
        offset += (length + 3) & ~3


class Requests:
    """The socket that asks: one request, its answer; OSError is the kernel's no. The kernel
    answers while it sends."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._sock.bind((0, 0))
        # Only a bug in this code or in the kernel could make a request go unanswered.
        self._sock.settimeout(2)
        self._seq = 0

    def route(self, destination: bytes) -> Route:
        """The one that a packet to ``destination`` would take."""
        raw = _raw(destination)
        body = _RTMSG.pack(family_of(destination), 8 * len(raw), 0, 0, 0, 0, 0, 0, 0)
        answer = self._ask(RTM_GETROUTE, 0, body + attribute(_RTA_DST, raw))
        found = attributes(answer[_RTMSG.size :])
        via = found.get(_RTA_VIA, b"")  # an IPv6 gateway for IPv4 (RFC 5549), after its family
        metrics = attributes(found.get(_RTA_METRICS, b""))
        return Route(
            _RTMSG.unpack_from(answer)[7],
            _number(found.get(_RTA_OIF)),
            _address(found.get(_RTA_GATEWAY) or via[2:]),
            _address(found.get(_RTA_PREFSRC, b"")),
            _number(metrics.get(_RTAX_MTU)),
        )

    def link(self, ifindex: int) -> Link:
        """The device with that index; raises OSError (ENODEV)."""
        answer = self._ask(RTM_GETLINK, 0, _IFINFOMSG.pack(socket.AF_UNSPEC, 0, ifindex, 0, 0))
        _, kind, _, flags, _ = _IFINFOMSG.unpack_from(answer)
        found = attributes(answer[_IFINFOMSG.size :])
        ifname = os.fsdecode(found.get(_IFLA_IFNAME, b"").rstrip(b"\0"))
        mtu = _number(found.get(_IFLA_MTU))
        return Link(ifname, kind, flags, mtu, found.get(_IFLA_ADDRESS, b""))

    def neighbour(self, neighbour: Neighbour) -> Entry | None:
        """None: the kernel does not know it yet."""
        try:
            answer = self._ask(RTM_GETNEIGH, 0, _neighbour_body(neighbour, 0))
        except OSError:
            return None
        _, _, state, flags, _ = _NDMSG.unpack_from(answer)
        found = attributes(answer[_NDMSG.size :])
        return Entry(state, flags, _NDA_FLAGS_EXT in found, found.get(_NDA_LLADDR, b""))

    def use(self, neighbour: Neighbour) -> None:
        """What `ip neigh add ... use` sends: as if a packet wanted to go there. The kernel starts
        resolving, or re-checks an entry that has become stale; what comes of it is an event."""
        self._ask(RTM_NEWNEIGH, ACK | CREATE, _neighbour_body(neighbour, _NTF_USE))

    def _ask(self, kind: int, flags: int, body: bytes) -> bytes:
        """The answer's body; empty if there is only the acknowledgement."""
        self._seq += 1
        header = _NLMSGHDR.pack(
            _NLMSGHDR.size + len(body), kind, REQUEST | flags, self._seq & 0xFFFFFFFF, 0
        )
        self._sock.send(header + body)
        while True:
            data = self._sock.recv(_DATAGRAM_BYTES)
            for got, offset, length in messages(data):
                if _NLMSGHDR.unpack_from(data, offset)[3] != self._seq & 0xFFFFFFFF:
                    continue  # left over from a request that timed out
                content = data[offset + _NLMSGHDR.size : offset + length]
                if got != _NLMSG_ERROR:
                    return content
                if code := -_ERRNO.unpack_from(content)[0]:
                    raise OSError(code, os.strerror(code))
                return b""

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


def open_events() -> socket.socket:
    """A non-blocking socket that hears of every change to links, addresses, routes, neighbours."""
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0
    )
    sock.bind((0, _GROUPS))
    return sock


def neighbour_of(message: bytes) -> Neighbour:
    """Whom a whole message RTM_NEWNEIGH or RTM_DELNEIGH, its header included, is about."""
    body = message[_NLMSGHDR.size :]
    if len(body) < _NDMSG.size:
        return Neighbour(0, b"")
    destination = attributes(body[_NDMSG.size :]).get(_NDA_DST, b"")
    return Neighbour(_NDMSG.unpack_from(body)[1], _address(destination))


def _neighbour_body(neighbour: Neighbour, flags: int) -> bytes:
    body = _NDMSG.pack(family_of(neighbour.address), neighbour.ifindex, 0, flags, 0)
    return body + attribute(_NDA_DST, _raw(neighbour.address))


def family_of(address: bytes) -> int:
    """AF_INET for an IPv4-mapped address, else AF_INET6."""
    return socket.AF_INET if address.startswith(MAPPED_PREFIX) else socket.AF_INET6


def to_text(address: bytes) -> str:
    """A 16-byte address as users write it."""
    return str(unmap_address(address))


def _raw(address: bytes) -> bytes:
    """As it stands in messages: 4 or 16 bytes."""
    return address[12:] if address.startswith(MAPPED_PREFIX) else address


def _address(raw: bytes) -> bytes:
    return MAPPED_PREFIX + raw if len(raw) == 4 else raw


def _number(content: bytes | None) -> int:
    return _U32.unpack(content)[0] if content else 0
