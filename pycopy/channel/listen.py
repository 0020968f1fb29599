"""The intercept's listening socket, and what to say when there cannot be one.

Tests: tests/unit/test_channel.py
"""

import errno
import socket
from typing import Any

from pycopy.errors import PycopyError

#: More than a burst of strangers, so that a replay among them is not kept waiting.
_BACKLOG = 1024


def listen(bind: str, port: int) -> socket.socket:
    """A listening socket; ``bind`` "" means every address of both families. Raises PycopyError."""
    try:
        if bind:
            found = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, address = found[0]
            sock = _bound(family, address)
        else:
            try:
                sock = _bound(socket.AF_INET6, ("::", port))
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                sock = _bound(socket.AF_INET, ("0.0.0.0", port))
        sock.listen(_BACKLOG)
        sock.setblocking(False)
        return sock
    except socket.gaierror as error:
        raise PycopyError(
            f"cannot listen on {bind!r}: {error.strerror}", "give one of this host's addresses"
        ) from None
    except OSError as error:
        where = f"port {port}" + (f" of {bind}" if bind else "")
        if error.errno == errno.EADDRINUSE:
            raise PycopyError(
                f"{where} is in use, so no replay could connect",
                f"see who has it (ss -ltnp 'sport = :{port}'), or choose another port with -p "
                "and give it to replay as -s HOST:PORT",
            ) from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise PycopyError(
                f"cannot listen on {bind}: not an address of this host",
                "give one of this host's addresses, or none for all of them",
            ) from None
        raise PycopyError(
            f"cannot listen on {where}: {error.strerror}", "choose another port with -p"
        ) from None


def _bound(family: int, address: tuple[Any, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock
