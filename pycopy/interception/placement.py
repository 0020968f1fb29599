"""Assistant or target: where is this intercept, judged by what its filter would select.

The same command line works on both: if the expression selects the responses of a service
that listens on this very host, the host is the target; else responses are routed to it.
Only looks; what follows from the placement is intercept.py's business.
"""

import ipaddress
import re
import socket
import struct
from collections.abc import Iterable, Iterator

from pycopy.channel import Placement
from pycopy.host import netlink
from pycopy.kernel import pcapfilter
from pycopy.wire.address import MAPPED_PREFIX, map_address, unmap_address

#: Any client: documentation addresses (RFC 5737, RFC 3849), which nobody has.
_CLIENTS = (
    map_address(ipaddress.ip_address("198.51.100.7")),
    map_address(ipaddress.ip_address("2001:db8::7")),
)
_CLIENT_PORT = 40961
#: The state of a line of /proc/net/tcp; nothing else there is two digits long.
_LISTEN = b" 0A "

# linux/sock_diag.h, inet_diag.h, net/tcp_states.h
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _TCP_LISTEN = 4, 20, 10
#: ``struct inet_diag_req_v2``: family, protocol, extensions, states; of any address and port.
_DIAG_REQUEST = struct.Struct("=BBBxI48x")
#: ``struct inet_diag_msg``: the socket's own port and address.
_DIAG_ANSWER = struct.Struct("!4xH2x16s")
#: More wildcard listeners times addresses than this are not tried.
_MAX_TRIES = 4096

#: What may be an address or a network in a filter expression.
_LITERAL = re.compile(r"(?<![\w.:])[0-9a-fA-F:.]*[.:][0-9a-fA-F:.]*(?![\w.:])")

Listener = tuple[bytes, int]


def choose(
    wanted: str, expression: str, listeners: Iterable[Listener], own: Iterable[bytes]
) -> tuple[Placement, str]:
    """The placement and, in words, why; ``wanted`` is what --at says, ``own`` 16 bytes each."""
    if wanted != "auto":
        return Placement[wanted.upper()], f"--at {wanted}"
    found = _selected(expression, listeners, own)
    if found is not None:
        return Placement.TARGET, (
            f"the filter selects answers of port {found[1]}, on which this host listens; "
            "--at assistant overrules"
        )
    return Placement.ASSISTANT, (
        "the filter selects no service that listens on this host; --at target overrules"
    )


def listeners() -> list[Listener]:
    """Address (16 bytes, all zero for any) and port of every listening TCP socket here."""
    try:
        found = _ask_for_listeners()
    except OSError:  # a kernel without inet_diag
        found = _read_listeners()
    return sorted(found)


def _ask_for_listeners() -> set[Listener]:
    """Listeners as the kernel lists them, going through those alone (sock_diag(7))."""
    found = set()
    for family in (socket.AF_INET, socket.AF_INET6):
        wanted = _DIAG_REQUEST.pack(family, socket.IPPROTO_TCP, 0, 1 << _TCP_LISTEN)
        answers = netlink.request(_SOCK_DIAG_BY_FAMILY, netlink.DUMP, wanted, _NETLINK_SOCK_DIAG)
        for answer in answers:
            port, address = _DIAG_ANSWER.unpack_from(answer)
            if family == socket.AF_INET and any(address):
                address = MAPPED_PREFIX + address[:4]
            found.add((address, port))
    return found


def _read_listeners() -> set[Listener]:
    """Out of the table of all sockets, which takes a millisecond even when it is empty."""
    found = set()
    for table in ("/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"):
        try:
            with open(table, "rb", buffering=0) as file:
                lines = file.read().splitlines()
        except FileNotFoundError:  # IPv6 is disabled
            continue
        for line in lines:
            if _LISTEN in line:
                found.add(_listener(line.split()[1].decode("ascii")))
    return found


def _listener(local: str) -> Listener:
    address, _, port = local.partition(":")
    # The kernel prints words of 32 bits as it holds them, here in little-endian order.
    words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    if len(packed) == 4:
        packed = MAPPED_PREFIX + packed if any(packed) else bytes(16)
    return packed, int(port, 16)


def _selected(
    expression: str, listeners: Iterable[Listener], own: Iterable[bytes]
) -> Listener | None:
    clients = [*_CLIENTS, *_named_addresses(expression)]
    tries = 0
    for source, port in _sources(listeners, list(own)):
        for client in clients:
            if (client[:12] == MAPPED_PREFIX) != (source[:12] == MAPPED_PREFIX):
                continue
            tries += 1
            if tries > _MAX_TRIES:
                return None
            if pcapfilter.matches(expression, _syn_ack(source, port, client), 14):
                return source, port
    return None


def _sources(listeners: Iterable[Listener], own: list[bytes]) -> Iterator[Listener]:
    """What could answer from afar: never loopback."""
    for address, port in listeners:
        for mine in [address] if any(address) else own:
            if not unmap_address(mine).is_loopback:
                yield mine, port


def _named_addresses(expression: str) -> Iterator[bytes]:
    """Addresses in the expression: a filter may select by the client's, too."""
    for literal in _LITERAL.findall(expression):
        dots = literal.count(".")
        if ":" not in literal and dots < 3:
            # pcap-filter(7): ``net 10.1`` is 10.1.0.0/16.
            literal += ".0" * (3 - dots)
        try:
            yield map_address(ipaddress.ip_address(literal.strip(".")))
        except ValueError:
            continue


def _syn_ack(source: bytes, source_port: int, client: bytes) -> bytes:
    """A frame as the service's first response would be; checksums are nobody's concern here."""
    tcp = struct.pack("!HHIIBBHHH", source_port, _CLIENT_PORT, 1, 1, 0x50, 0x12, 65535, 0, 0)
    if source[:12] == MAPPED_PREFIX:
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, 6, 0)
        return bytes(12) + b"\x08\x00" + header + source[12:] + client[12:] + tcp
    header = struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64)
    return bytes(12) + b"\x86\xdd" + header + source + client + tcp
