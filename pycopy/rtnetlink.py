"""Ask the kernel for routes, neighbours, links and addresses (rtnetlink), and hear of changes.

Framing and sockets are plain here; the messages' insides are pyroute2's. It must not know
what the answers are used for.
"""

import importlib.util
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

from pycopy.errors import HostUnfit
from pycopy.inet import MAPPED_PREFIX, map_address, unmap_address

# linux/netlink.h, rtnetlink.h
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST = 1
NLM_F_ACK, NLM_F_DUMP, NLM_F_CREATE = 4, 0x300, 0x400
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
_NLMSGHDR = struct.Struct("=IHHII")
_DATAGRAM_BYTES = 1 << 16


class Codecs(NamedTuple):
    rtmsg: type
    ndmsg: type
    ifinfmsg: type


_loaded: Codecs | None = None


def codecs() -> Codecs:
    """pyroute2's message classes, without the rest of pyroute2.

    Importing the package runs an ``__init__`` that loads every subsystem: 26 MB resident,
    more than everything else in this process. The four classes alone are 5 MB, so they are
    imported below a bare stand-in package, which is taken away again: whoever imports
    pyroute2 itself still gets the real one. The classes are the same in 0.7 and 0.9, whose
    sockets are not (0.9 runs asyncio inside), which is why the sockets here are our own.
    """
    global _loaded
    if _loaded is not None:
        return _loaded
    before = {name: module for name, module in sys.modules.items() if _is_pyroute2(name)}
    if not before:
        spec = importlib.util.find_spec("pyroute2")
        if spec is None or spec.submodule_search_locations is None:
            raise HostUnfit(
                "the Python package pyroute2 is missing", "apt install python3-pyroute2"
            )
        package = ModuleType("pyroute2")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["pyroute2"] = package
    try:
        from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
        from pyroute2.netlink.rtnl.ndmsg import ndmsg
        from pyroute2.netlink.rtnl.rtmsg import rtmsg
    finally:
        if not before:
            for name in [name for name in sys.modules if _is_pyroute2(name)]:
                del sys.modules[name]
    _loaded = Codecs(rtmsg, ndmsg, ifinfmsg)
    return _loaded


def _is_pyroute2(name: str) -> bool:
    return name == "pyroute2" or name.startswith("pyroute2.")


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
    """The socket that asks: one request, its answers. The kernel answers while it sends."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._sock.bind((0, 0))
        # Only a bug in this code or in the kernel could make a request go unanswered.
        self._sock.settimeout(2)
        self._seq = 0

    def ask(self, kind: int, flags: int, message: Any) -> list[Any]:
        """Answers as decoded messages of ``message``'s class; OSError is the kernel's no."""
        self._seq += 1
        header = message["header"]
        header["type"] = kind
        header["flags"] = _NLM_F_REQUEST | flags
        header["sequence_number"] = self._seq
        message.encode()
        self._sock.send(message.data)
        more = bool(flags & (NLM_F_DUMP | NLM_F_ACK))
        answers: list[Any] = []
        while True:
            data = self._sock.recv(_DATAGRAM_BYTES)
            for got, offset, length in messages(data):
                if _NLMSGHDR.unpack_from(data, offset)[3] != self._seq:
                    continue  # left over from a request that timed out
                if got == _NLMSG_DONE:
                    return answers
                if got == _NLMSG_ERROR:
                    code = -struct.unpack_from("=i", data, offset + 16)[0]
                    if code:
                        raise OSError(code, os.strerror(code))
                    return answers
                answer = type(message)(data[offset : offset + length])
                answer.decode()
                answers.append(answer)
            if answers and not more:
                return answers

    def close(self) -> None:
        self._sock.close()


def open_events() -> socket.socket:
    """A non-blocking socket that hears of every change to links, addresses, routes, neighbours."""
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0
    )
    sock.bind((0, _GROUPS))
    return sock


# Addresses are 16 bytes here, IPv4-mapped for IPv4, and text in pyroute2's messages.


def family_of(address: bytes) -> int:
    """AF_INET for an IPv4-mapped address, else AF_INET6."""
    return socket.AF_INET if address.startswith(MAPPED_PREFIX) else socket.AF_INET6


def to_text(address: bytes) -> str:
    return str(unmap_address(address))


def from_text(text: str) -> bytes:
    return map_address(ipaddress.ip_address(text))


def mac_bytes(text: str | None) -> bytes:
    return bytes.fromhex(text.replace(":", "")) if text else b""
