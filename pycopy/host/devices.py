"""This host's network devices, as far as programs are attached to them. Only looks."""

import fcntl
import socket
import struct
from collections.abc import Iterable
from typing import NamedTuple

from pycopy.errors import HostUnfit, UsageError
from pycopy.host import netlink
from pycopy.wire.address import MAPPED_PREFIX

# linux/sockios.h, if.h, if_arp.h
_SIOCGIFFLAGS, _SIOCGIFADDR, _SIOCGIFHWADDR, _SIOCGIFINDEX = 0x8913, 0x8915, 0x8927, 0x8933
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8
_ARPHRD_ETHER, _ARPHRD_LOOPBACK = 1, 772
_IPV6_ADDR_LINKLOCAL = "20"
_IFREQ = struct.Struct("=16sH22x")
_INDEX = struct.Struct("=16si20x")


# linux/rtnetlink.h, if_addr.h
_RTM_GETADDR = 22
_IFADDRMSG = struct.Struct("=BBBBI")
_IFA_ADDRESS, _IFA_LOCAL = 1, 2


class Device(NamedTuple):
    """A network device of this host, as it was when it was looked at."""

    name: str
    ifindex: int
    #: Bytes before the IP header: 14, or 0 on devices that carry bare IP (tun, wireguard, ...).
    l2_bytes: int


def find_devices(names: Iterable[str]) -> list[Device]:
    """Those named, or by default every device that is up, has an address and is not loopback.

    Raises HostUnfit if there is none.
    """
    names = list(names)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        if not names:
            names = [name for _, name in socket.if_nameindex() if _in_service(any_socket, name)]
        if not names:
            raise HostUnfit(
                "no network device is up and has an address",
                "'ip -br addr' lists them; name one with -i",
            )
        return [_device(any_socket, name) for name in names]


def local_addresses() -> set[bytes]:
    """Every address of this host, 16 bytes each, IPv4-mapped for IPv4 (RFC 4291 2.5.5.2)."""
    found = set()
    for answer in netlink.request(_RTM_GETADDR, netlink.DUMP, bytes(_IFADDRMSG.size)):
        attributes = netlink.attributes(answer[_IFADDRMSG.size :])
        # On a point-to-point link IFA_ADDRESS is the other end; IPv6 has IFA_LOCAL only then.
        address = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS, b"")
        if address:
            found.add(MAPPED_PREFIX + address if len(address) == 4 else address)
    return found


def _device(any_socket: socket.socket, name: str) -> Device:
    try:
        # Not if_nametoindex(): where it can have no socket it says that there is no device.
        index: int = _INDEX.unpack(_answer(any_socket, _SIOCGIFINDEX, name))[1]
        kind = _ask(any_socket, _SIOCGIFHWADDR, name)
    except OSError:
        raise UsageError(
            f"there is no network device {name}", "'ip -br link' lists those of this host"
        ) from None
    return Device(name, index, 14 if kind in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK) else 0)


def _in_service(any_socket: socket.socket, name: str) -> bool:
    try:
        flags = _ask(any_socket, _SIOCGIFFLAGS, name)
    except OSError:  # it went away while we looked
        return False
    return bool(flags & _IFF_UP) and not flags & _IFF_LOOPBACK and _has_address(any_socket, name)


def _has_address(any_socket: socket.socket, name: str) -> bool:
    try:
        _ask(any_socket, _SIOCGIFADDR, name)
        return True
    except OSError:  # none of IPv4
        pass
    try:
        with open("/proc/net/if_inet6", encoding="ascii") as table:
            fields = (line.split() for line in table)
            # Every port of a bridge has a link-local address, and would show segments twice.
            return any(name == each[5] and each[3] != _IPV6_ADDR_LINKLOCAL for each in fields)
    except FileNotFoundError:  # IPv6 is disabled
        return False


def _ask(any_socket: socket.socket, request: int, name: str) -> int:
    """The first 16 bits of the answer: flags, or an address's family or type."""
    value: int = _IFREQ.unpack(_answer(any_socket, request, name))[1]
    return value


def _answer(any_socket: socket.socket, request: int, name: str) -> bytes:
    return fcntl.ioctl(any_socket, request, _IFREQ.pack(name.encode(), 0))
