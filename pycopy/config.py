"""What the user asked for: the two configurations, and the parsers that fill them.

Everything here turns text into values and says what is wrong with the text; nothing looks
at the host (that is guards.py) but for its memory, and for names, by a resolver that callers
may replace.
Addresses are 16 bytes, IPv4 as IPv4-mapped (RFC 4291 2.5.5.2), as in the BPF programs.
"""

import ipaddress
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from pycopy.errors import UsageError
from pycopy.inet import Address, map_address, unmap_address

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str], Address]

INTERCEPT_PORT = 36524
RESPONSE_IDLE_S = 600
#: What -k adds to -t when it is not given: a session with nothing left to send is kept longer.
SESSION_IDLE_EXTRA_S = 120

#: Of a capture's rings, and which part of this host's memory they take at most: a burst comes
#: as fast as the network, and waits in them until it is this process's turn on a busy CPU.
RING_MOST_BYTES = 128 << 20
RING_LEAST_BYTES = 1 << 20
RING_SHARE = 64

_FIRST_USER_PORT = 1024
_ENTRY_FORM = "write [srcIP:]srcPort-dstIP:dstPort, for example 80-10.0.0.2:8080"
_NETWORK_FORM = "write an address, CIDR, or the form 62.135.200.x"
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")


@dataclass(slots=True)
class Service:
    """One ``-x`` entry: what is copied and where the copies go. ``None`` is any local address."""

    online_addr: bytes | None
    online_port: int
    target_addr: bytes
    target_port: int

    def __str__(self) -> str:
        if self.online_addr is None:
            source = str(self.online_port)
        else:
            source = endpoint(self.online_addr, self.online_port)
        return f"{source}-{endpoint(self.target_addr, self.target_port)}"


@dataclass
class ProcessConfig:
    """What replay and intercept have in common: the process itself and what it reports."""

    interfaces: list[str] = field(default_factory=list)  #: [] is the driver's default choice
    filter: str = ""  #: pcap-filter(7) expression, "" is everything
    daemon: bool = False
    log_path: str = ""  #: "" is stderr
    pid_path: str = ""  #: "" is none
    json: bool = False
    interval_s: float = 10.0
    quiet: bool = False
    ring_bytes: int = 4 << 20  #: of kernel memory; a power of two
    transport: str = "ring"  #: of records to user space: "ring" or "perf"


def default_ring_bytes(workers: int = 1) -> int:
    """What each of so many workers' captures may fill before its records are read."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    share = min(memory_bytes // RING_SHARE, RING_MOST_BYTES) // workers
    return 1 << (max(share, RING_LEAST_BYTES).bit_length() - 1)


@dataclass
class ReplayConfig(ProcessConfig):
    """``pycopy replay``."""

    ring_bytes: int = field(default_factory=default_ring_bytes)
    services: list[Service] = field(default_factory=list)
    intercepts: list[tuple[str, int]] = field(default_factory=list)  #: numeric address, port
    client_pool: list[Network] = field(default_factory=list)
    hook: str = "tc"  #: "tc" or "xdp"
    fastpath: bool = True  #: the kernel keeps the healthy sessions
    backlog_bytes: int = 64 << 20  #: of what it has sent and holds, in all
    forwarded: bool = False  #: a service without an address is anybody's, not only this host's
    wait_for_response: bool = True
    only_full_sessions: bool = False
    sample_percent: int = 100
    ramp: bool = False
    response_idle_s: int = RESPONSE_IDLE_S
    session_idle_s: int = RESPONSE_IDLE_S + SESSION_IDLE_EXTRA_S
    memory_mb: int = 1024
    max_sessions: int = 65536
    self_ports: tuple[int, int] | None = None  #: inclusive; None is the driver's choice
    mtu: int = 0  #: 0 is the route's
    lonely: bool = False
    allow_public_target: bool = False
    workers: int = 1  #: processes that share the flows
    worker: int = 0  #: which of them this is


@dataclass
class InterceptConfig(ProcessConfig):
    """``pycopy intercept``."""

    placement: str = "auto"  #: "auto", "assistant" or "target"
    hook: str = "tc"  #: on an assistant: "tc" or "xdp"
    bind: str = ""  #: "" is every address of this host, IPv4 and IPv6
    port: int = INTERCEPT_PORT
    pass_nets: list[Network] = field(default_factory=list)


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


def parse_services(text: str, resolver: Resolver = resolve) -> list[Service]:
    """``-x``: comma separated ``[srcIP:]srcPort-dstIP:dstPort``, IPv6 in brackets."""
    services: list[Service] = []
    for entry in _items(text, "-x", _ENTRY_FORM):
        service = _parse_service(entry, resolver)
        for earlier in services:
            if earlier.online_port == service.online_port and earlier.online_addr in (
                None,
                service.online_addr,
            ):
                raise UsageError(
                    f"-x {entry}: {earlier} before it takes the same traffic already",
                    "one online port is copied to one target; run a second replay for another",
                )
        services.append(service)
    return services


def parse_old_form(words: list[str], resolver: Resolver = resolve) -> list[Service]:
    """``local_ip1[:local_ip2...] local_port remote_ip remote_port``, tcpcopy's first form."""
    if len(words) != 4:
        raise UsageError(
            f"unexpected argument: {words[0]!r}",
            "services are given with -x 80-10.0.0.2:8080; the older form has exactly four words:"
            " local_ip1[:local_ip2...] local_port remote_ip remote_port",
        )
    locals_, local_port, remote, remote_port = words
    where = " ".join(words)
    target = _parse_host(remote.strip("[]"), where, "remote_ip", resolver)
    ports = [
        _parse_port(local_port, where, "local_port"),
        _parse_port(remote_port, where, "remote_port"),
    ]
    # Colons separate addresses, so IPv6 addresses must be bracketed or alone.
    parts = re.findall(r"\[[^]]*\]|[^:\[\]]+", locals_) if "[" in locals_ else locals_.split(":")
    if _is_address(locals_):
        parts = [locals_]
    services = []
    for part in parts:
        local = _parse_address(part.strip("[]"), where, "local_ip")
        _check_families(where, local, target)
        services.append(Service(map_address(local), ports[0], map_address(target), ports[1]))
    return services


def parse_intercepts(
    text: str, default_port: int = INTERCEPT_PORT, resolver: Resolver = resolve
) -> list[tuple[str, int]]:
    """``-s``: comma separated ``host[:port]``, IPv6 in brackets when a port follows."""
    form = "write host[:port], for example 10.0.0.3 or [fd00::3]:36524"
    intercepts = []
    for entry in _items(text, "-s", form):
        where = f"-s {entry}"
        host, port = (entry, None) if _is_address(entry) else _split_endpoint(entry, where)
        if not host:
            raise UsageError(f"{where}: the intercept has no address", form)
        address = str(_parse_host(host, where, "the intercept", resolver))
        number = default_port if port is None else _parse_port(port, where, "its port")
        if (address, number) in intercepts:
            raise UsageError(f"{where}: given twice", "name each intercept once")
        intercepts.append((address, number))
    return intercepts


def parse_bind(text: str) -> str:
    """``-b``: one address of this host."""
    where = f"-b {text}"
    host, port = (text, None) if _is_address(text) else _split_endpoint(text, where)
    if not host or "," in text:
        raise UsageError(f"{where}: not one address", "write -b 10.0.0.2, or leave -b out for all")
    if port is not None:
        raise UsageError(
            f"{where}: the address is followed by a port", f"write -b {host} -p {port}"
        )
    return str(_parse_address(host, where, "the address"))


def parse_networks(text: str, option: str) -> list[Network]:
    """Comma separated addresses, CIDR blocks, or tcpcopy's ``62.135.200.x`` (a /24)."""
    return [
        _parse_network(entry, f"{option} {entry}") for entry in _items(text, option, _NETWORK_FORM)
    ]


def parse_interfaces(text: str) -> list[str]:
    """``-i``: comma separated device names; ``any`` is the default choice."""
    names = _items(text, "-i", "write eth0, or eth0,eth1")
    for name in names:
        # The kernel's own rule, dev_valid_name().
        if len(name.encode()) > 15 or "/" in name or name in (".", "..") or ":" in name:
            raise UsageError(
                f"-i {name}: no device can have this name", "'ip -br link' lists the devices"
            )
    return [] if names == ["any"] else list(dict.fromkeys(names))


def parse_ports(text: str) -> tuple[int, int]:
    """``--ports A-B``, inclusive."""
    low, dash, high = text.partition("-")
    where = f"--ports {text}"
    if not dash:
        raise UsageError(f"{where}: not a range", "write A-B, for example --ports 20000-29999")
    ports = _parse_port(low, where, "the first"), _parse_port(high, where, "the last")
    if ports[0] > ports[1]:
        raise UsageError(f"{where}: the range is empty", f"write --ports {high}-{low}")
    if ports[0] < _FIRST_USER_PORT:
        raise UsageError(
            f"{where}: ports below {_FIRST_USER_PORT} are for services",
            "write A-B, for example --ports 20000-29999",
        )
    return ports


def check_ports(ports: tuple[int, int], services: list[Service]) -> None:
    """Copies may not leave from a port on which the online service is reached."""
    for service in services:
        if ports[0] <= service.online_port <= ports[1]:
            raise UsageError(
                f"--ports {ports[0]}-{ports[1]} contains {service.online_port}, which is copied",
                "choose a range without it, for example --ports 20000-29999",
            )


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
    number = int(text) if re.fullmatch(r"[0-9]{1,10}", text) else -1
    if not low <= number <= high:
        raise UsageError(
            f"{option} {text}: {what} must be a whole number from {low} to {high}",
            f"write {option} {min(max(number, low), high)}, for example",
        )
    return number


def parse_interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:
        raise UsageError(
            f"--interval {text}: not a number of seconds from 0.1 to 86400", "write --interval 10"
        )
    return seconds


def check_client_pool(pool: list[Network], services: list[Service]) -> None:
    """Every target must find client addresses of its own family in ``-c``."""
    versions = {network.version for network in pool}
    for service in services:
        version = unmap_address(service.target_addr).version
        if pool and version not in versions:
            raise UsageError(
                f"-c has no IPv{version} addresses, but {service} has an IPv{version} target",
                "add a range of that family, comma separated",
            )


def _items(text: str, option: str, form: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    if "" in items:
        raise UsageError(f"{option} {text!r}: an entry is empty", form)
    return items


def _parse_service(entry: str, resolver: Resolver) -> Service:
    where = f"-x {entry}"
    if "@" in entry:
        raise UsageError(
            f"{where}: MAC addresses are not taken",
            "leave '@MAC' out: the next hop is resolved from the kernel's own tables",
        )
    source, dash, target = entry.partition("-")
    if not dash:
        raise UsageError(f"{where}: there is no '-' between source and target", _ENTRY_FORM)
    source_host, source_port = _split_endpoint(source, where)
    if source_port is None:
        raise UsageError(f"{where}: the source {source!r} has no port", _ENTRY_FORM)
    online_port = _parse_port(source_port, where, "the source port")
    online = _parse_address(source_host, where, "the source") if source_host else None
    target_host, target_port = _split_endpoint(target, where)
    if target_port is None:
        raise UsageError(
            f"{where}: the target {target!r} has no port",
            f"write {source}-{target or '10.0.0.2'}:{online_port}, for example",
        )
    if not target_host:
        raise UsageError(
            f"{where}: the target {target!r} has no address",
            f"write {source}-10.0.0.2:{target_port}, for example",
        )
    port = _parse_port(target_port, where, "the target port")
    address = _parse_host(target_host, where, "the target", resolver)
    if online is not None:
        _check_families(where, online, address)
    return Service(
        None if online is None else map_address(online), online_port, map_address(address), port
    )


def _check_families(where: str, online: Address, target: Address) -> None:
    if online.version != target.version:
        raise UsageError(
            f"{where}: IPv{online.version} traffic cannot be copied to an IPv{target.version}"
            " target",
            "give source and target of one family",
        )


def _split_endpoint(text: str, where: str) -> tuple[str, str | None]:
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


def _parse_port(text: str, where: str, what: str) -> int:
    number = int(text) if re.fullmatch(r"[0-9]{1,5}", text) else 0
    if not 1 <= number <= 65535:
        raise UsageError(
            f"{where}: {what} is {text!r}, not a port", "ports are whole numbers from 1 to 65535"
        )
    return number


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _parse_address(text: str, where: str, what: str) -> Address:
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


def _parse_host(text: str, where: str, what: str, resolver: Resolver) -> Address:
    labels = text.removesuffix(".").split(".")
    # getaddrinfo() takes "10.2" for 10.0.0.2 and "0x7f" for an address; a user never means that.
    if labels[-1][:1].isdigit() or not all(_LABEL.fullmatch(label) for label in labels):
        return _parse_address(text, where, what)
    return resolver(text)


def _parse_network(entry: str, where: str) -> Network:
    head, dot, last = entry.rpartition(".")
    if dot and last in ("x", "X") and head.count(".") == 2 and _is_address(f"{head}.0"):
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
