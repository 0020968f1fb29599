"""Put frames on the wire: one packet socket per egress interface, nothing received.

A frame is the header that :func:`pycopy.wire.headers.write_frame` made, beginning with the
virtio_net_hdr that lets the kernel checksum and segment (PACKET_VNET_HDR), and the payload
beside it. What cannot be sent is counted by errno and never raises: to the sessions it is loss
in the network, which they repair like any TCP. It must not know sessions or routes.
"""

import errno
import select
import socket
from typing import Protocol

from pycopy.errors import HostUnfit

_SOL_PACKET = 263
_PACKET_VNET_HDR = 15
_SO_SNDBUFFORCE = 32

# Held by the qdisc and the driver at most, per interface; about 30 ms at 1 Gbit/s. More
# would only hide that the link is full from the engine, which could hold back instead.
_SNDBUF_BYTES = 4 << 20
# When the socket is full: long enough for a fast link to send something, short enough for
# the ring to be drained in time. One such wait per interface and flush at most.
_FULL_WAIT_MS = 1

# The interface is gone: whatever comes in its place needs a new socket.
_GONE = frozenset((errno.ENXIO, errno.ENODEV, errno.EBADF))
_UNFIT = {
    errno.EPERM: ("not allowed to open a packet socket", "run as root or with CAP_NET_RAW"),
    errno.EACCES: ("not allowed to open a packet socket", "run as root or with CAP_NET_RAW"),
    errno.EAFNOSUPPORT: ("this kernel has no packet sockets", "load or build af_packet"),
    errno.ENOPROTOOPT: (
        "this kernel's packet sockets lack PACKET_VNET_HDR",
        "use a kernel with CONFIG_PACKET and offload support (Linux 2.6.34 or later)",
    ),
}


class HasIfindex(Protocol):
    """What is asked of a next hop."""

    ifindex: int


class Sender:
    """Sends frames; ``errors`` by errno only grow."""

    __slots__ = ("_opened", "_sockets", "_waited", "errors")

    def __init__(self) -> None:
        self._sockets: dict[int, socket.socket] = {}
        self._opened = False
        #: Interfaces that had their wait since :meth:`begin`.
        self._waited: set[int] = set()
        self.errors: dict[int, int] = {}

    def begin(self) -> None:
        """A new flush: a full interface is waited for once more."""
        self._waited.clear()

    def send(
        self, hop: HasIfindex, header: memoryview | bytes, payload: bytes | memoryview | None = None
    ) -> int:
        """Send one frame or super-segment through ``hop``'s interface; 0 or an errno.

        Raises only HostUnfit, and only from the first socket this Sender ever opens.
        """
        try:
            sock = self._sockets.get(hop.ifindex) or self._open(hop.ifindex)
            if payload:
                sock.sendmsg((header, payload))
            else:
                sock.send(header)
        except OSError as problem:
            return self._failed(hop.ifindex, header, payload, problem.errno or errno.EIO)
        return 0

    def open(self, hop: HasIfindex) -> None:
        """Open the socket for ``hop`` now, so that an unfit host shows at start-up.

        An interface that is not there is no such thing: send() will count it.
        """
        if hop.ifindex not in self._sockets:
            try:
                self._open(hop.ifindex)
            except OSError as problem:
                self._count(problem.errno or errno.EIO)

    def close(self) -> None:
        """Close every socket; a later send() opens a new one."""
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()

    def _open(self, ifindex: int) -> socket.socket:
        sock = None
        try:
            # By index, because an interface may be renamed; bind() wants a name.
            ifname = socket.if_indextoname(ifindex)
            # Protocol 0: no packet is ever queued to this socket. Non-blocking: a full queue
            # is told to the caller instead of stalling every other session.
            # PACKET_QDISC_BYPASS stays off: bypassing, frames would miss the TC egress hook
            # (where copies may be intercepted), be invisible to tcpdump, and a full device
            # queue would drop them; measured, it gains nothing.
            sock = socket.socket(
                socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0
            )
            sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
            try:
                sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SNDBUF_BYTES)
            except PermissionError:  # CAP_NET_RAW without CAP_NET_ADMIN
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SNDBUF_BYTES)
            sock.bind((ifname, 0))
        except OSError as problem:
            if sock is not None:
                sock.close()
            # Later, privileges may have been given up: that is an error like any other.
            if not self._opened and problem.errno in _UNFIT:
                raise HostUnfit(*_UNFIT[problem.errno]) from problem
            raise
        self._opened = True
        self._sockets[ifindex] = sock
        return sock

    def _failed(
        self,
        ifindex: int,
        header: memoryview | bytes,
        payload: bytes | memoryview | None,
        code: int,
    ) -> int:
        sock = self._sockets.get(ifindex)
        if code == errno.EAGAIN and sock is not None and ifindex not in self._waited:
            # The socket's share of the queue is used up. One short wait is back-pressure on
            # the whole loop, which is right: whoever fills the link should read less of the
            # ring. Then one more try, whatever poll said: it reports room only at half empty.
            self._waited.add(ifindex)
            poll = select.poll()
            poll.register(sock, select.POLLOUT)
            poll.poll(_FULL_WAIT_MS)
            try:
                sock.sendmsg((header, payload) if payload else (header,))
                return 0
            except OSError as problem:
                code = problem.errno or errno.EIO
        if code in _GONE and sock is not None:
            del self._sockets[ifindex]
            sock.close()
        self._count(code)
        return code

    def _count(self, code: int) -> None:
        self.errors[code] = self.errors.get(code, 0) + 1
