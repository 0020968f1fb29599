"""The parsers of single values: from text to addresses, ports, sizes and numbers.

Those that stand in the table of options (config.py) take what is typed and the option's name.
They say what is wrong with the text (:class:`UsageError`: cause and cure), and look at nothing
of this host but for names, by a resolver that callers may replace.
"""

import difflib
import ipaddress
import re
import socket
from collections.abc import Callable, Sequence

from pycopy.errors import UsageError
from pycopy.wire.address import Address, unmap_address

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
#: From the name of a host to its address.
Resolver = Callable[[str], Address]

INTERCEPT_PORT = 36524
FIRST_USER_PORT = 1024

_NETWORK_FORM = "write an address, CIDR, or the form 62.135.200.x"
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")


def endpoint(packed: bytes, port: int) -> str:
    """``10.0.0.2:8080`` or ``[fd00::2]:8080``."""
    address = unmap_address(packed)
    return f"{address}:{port}" if address.version == 4 else f"[{address}]:{port}"


def resolve(host: str) -> Address:
    """The first address of ``host`` as the system resolves it, asked once."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot resolve {host!r}: {reason}",
            "check the name, or give the address itself",
        ) from None
    return ipaddress.ip_address(found[0][4][0])


def parse_intercepts(
    text: str, default_port: int = INTERCEPT_PORT, resolver: Resolver = resolve
) -> list[tuple[str, int]]:
    """``-s``: comma separated ``host[:port]``, IPv6 in brackets when a port follows."""
    form = "write host[:port], for example 10.0.0.3 or [fd00::3]:36524"
    intercepts = []
    for entry in items(text, "-s", form):
        where = f"-s {entry}"
        host, port = (entry, None) if is_address(entry) else split_endpoint(entry, where)
        if not host:
            raise UsageError(f"{where}: the intercept has no address", form)
        address = str(parse_host(host, where, "the intercept", resolver))
        number = default_port if port is None else parse_port(port, where, "its port")
        if (address, number) in intercepts:
            raise UsageError(f"{where}: given twice", "name each intercept once")
        intercepts.append((address, number))
    return intercepts


def parse_bind(text: str, option: str) -> str:
    """``-b``: one address of this host."""
    where = f"{option} {text}"
    host, port = (text, None) if is_address(text) else split_endpoint(text, where)
    if not host or "," in text:
        raise UsageError(
            f"{where}: not one address",
            f"write {option} 10.0.0.2, or leave {option} out for all",
        )
    if port is not None:
        raise UsageError(
            f"{where}: the address is followed by a port", f"write {option} {host} -p {port}"
        )
    return str(parse_address(host, where, "the address"))


def parse_networks(text: str, option: str) -> list[Network]:
    """Comma separated addresses, CIDR blocks, or tcpcopy's ``62.135.200.x`` (a /24)."""
    return [
        _parse_network(entry, f"{option} {entry}") for entry in items(text, option, _NETWORK_FORM)
    ]


def parse_interfaces(text: str, option: str) -> list[str]:
    """``-i``: comma separated device names; ``any`` is the default choice."""
    names = items(text, option, "write eth0, or eth0,eth1")
    for name in names:
        # The kernel's own rule, dev_valid_name().
        if len(name.encode()) > 15 or "/" in name or name in (".", "..") or ":" in name:
            raise UsageError(
                f"{option} {name}: no device can have this name", "'ip -br link' lists the devices"
            )
    return [] if names == ["any"] else list(dict.fromkeys(names))


def parse_ports(text: str, option: str) -> tuple[int, int]:
    """``--ports A-B``, inclusive."""
    low, dash, high = text.partition("-")
    where = f"{option} {text}"
    if not dash:
        raise UsageError(f"{where}: not a range", f"write A-B, for example {option} 20000-29999")
    ports = parse_port(low, where, "the first"), parse_port(high, where, "the last")
    if ports[0] > ports[1]:
        raise UsageError(f"{where}: the range is empty", f"write {option} {high}-{low}")
    if ports[0] < FIRST_USER_PORT:
        raise UsageError(
            f"{where}: ports below {FIRST_USER_PORT} are for services",
            f"write A-B, for example {option} 20000-29999",
        )
    return ports


def parse_bytes(text: str, option: str) -> int:
    """``16M``, ``512K`` or bytes, rounded up to the power of two that a BPF ring must be."""
    match = re.fullmatch(r"(\d{1,12})([KMG]?)(?:i?B)?", text, re.IGNORECASE)
    size = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2].upper()] if match else 0
    if not 64 << 10 <= size <= 1 << 30:
        raise UsageError(
            f"{option} {text}: not a size between 64K and 1G", f"write {option} 16M, for example"
        )
    return 1 << (size - 1).bit_length()


def parse_int(text: str, option: str, low: int, high: int, what: str) -> int:
    """A whole number in a range, inclusive. ``what``: the sentence's subject if it is none."""
    number = int(text) if re.fullmatch(r"[0-9]{1,10}", text) else -1
    if not low <= number <= high:
        raise UsageError(
            f"{option} {text}: {what} must be a whole number from {low} to {high}",
            f"write {option} {min(max(number, low), high)}, for example",
        )
    return number


def parse_interval(text: str, option: str) -> float:
    """Seconds, a tenth to a day."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:
        raise UsageError(
            f"{option} {text}: not a number of seconds from 0.1 to 86400", f"write {option} 10"
        )
    return seconds


def parse_percent(text: str, option: str) -> int:
    """``-r``: ``10`` or ``10%``."""
    return parse_int(text.removesuffix("%"), option, 1, 100, "the percentage")


def whole(low: int, high: int, what: str) -> Callable[[str, str], int]:
    """The parser of a whole number in a range, inclusive."""
    return lambda text, option: parse_int(text, option, low, high, what)


def choose(word: str, option: str, choices: Sequence[str]) -> str:
    """``word``, which must be one of ``choices``; ``option``: for the sentence about it."""
    if word not in choices:
        near = difflib.get_close_matches(word, choices, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of: {', '.join(choices)}"
        raise UsageError(f"{option}: {word!r} is not known", hint)
    return word


def one_of(*choices: str) -> Callable[[str, str], str]:
    """The parser of one word of a few."""
    return lambda text, option: choose(text, option, choices)


def some_of(*choices: str) -> Callable[[str, str], list[str]]:
    """The parser of words of a few, comma separated."""
    return lambda text, option: [choose(word, option, choices) for word in text.split(",")]


def as_typed(text: str, option: str) -> str:
    """Any text: what is wrong with it is found by whoever uses it."""
    return text


def size_text(size_bytes: int) -> str:
    """As :func:`parse_bytes` reads it: ``64M``. ``size_bytes``: a power of two, 1K or more."""
    for unit, shift in (("G", 30), ("M", 20)):
        if size_bytes >= 1 << shift:
            return f"{size_bytes >> shift}{unit}"
    return f"{size_bytes >> 10}K"


def items(text: str, option: str, form: str) -> list[str]:
    found = [item.strip() for item in text.split(",")]
    if "" in found:
        # Of thousands of entries only the place is told.
        at = found.index("")
        what = f" {text!r}" if len(text) <= 60 else ""
        after = "" if what or not at else f", after {found[at - 1]!r}"
        raise UsageError(f"{option}{what}: an entry is empty{after}", form)
    return found


def split_endpoint(text: str, where: str) -> tuple[str, str | None]:
    """Host and port of ``host:port``; a number alone is a port, anything else alone a host."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or not host or (rest and not rest.startswith(":")):
            raise UsageError(f"{where}: {text!r} is not [IPv6]:port", "write [fd00::2]:80")
        return host, rest[1:] if rest else None
    if text.count(":") > 1:
        raise UsageError(
            f"{where}: {text!r} has too many colons", "put IPv6 addresses in brackets: [fd00::2]:80"
        )
    host, colon, port = text.rpartition(":")
    if colon:
        return host, port
    return ("", text) if text.isdigit() else (text, None)


def parse_port(text: str, where: str, what: str) -> int:
    number = int(text) if re.fullmatch(r"[0-9]{1,5}", text) else 0
    if not 1 <= number <= 65535:
        raise UsageError(
            f"{where}: {what} is {text!r}, not a port", "ports are whole numbers from 1 to 65535"
        )
    return number


def is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def parse_address(text: str, where: str, what: str) -> Address:
    if "%" in text:
        raise UsageError(
            f"{where}: {text!r} is a link-local address with a zone",
            "give a global or unique local (fd..) address",
        )
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise UsageError(
            f"{where}: {what} is {text!r}, not an address", "write 10.0.0.2, or [fd00::2] for IPv6"
        ) from None
    mapped = address.ipv4_mapped if address.version == 6 else None
    return mapped or address


def parse_host(text: str, where: str, what: str, resolver: Resolver) -> Address:
    labels = text.removesuffix(".").split(".")
    # getaddrinfo() takes "10.2" for 10.0.0.2 and "0x7f" for an address; a user never means that.
    if labels[-1][:1].isdigit() or not all(_LABEL.fullmatch(label) for label in labels):
        return parse_address(text, where, what)
    return resolver(text)


def _parse_network(entry: str, where: str) -> Network:
    head, dot, last = entry.rpartition(".")
    if dot and last in ("x", "X") and head.count(".") == 2 and is_address(f"{head}.0"):
        return ipaddress.ip_network(f"{head}.0/24")
    try:
        return ipaddress.ip_network(entry)
    except ValueError:
        pass
    try:
        loose = ipaddress.ip_network(entry, strict=False)
    except ValueError:
        cure = "only the last octet may be x; write CIDR" if "x" in entry.lower() else _NETWORK_FORM
        raise UsageError(f"{where}: not an address range", cure) from None
    raise UsageError(
        f"{where}: the address has bits beyond its prefix length",
        f"did you mean {loose}, or {entry.partition('/')[0]} alone?",
    )
