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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from pycopy.errors import UsageError
from pycopy.wire.address import Address, family_of, map_address, unmap_address

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
#: The kernel's records number the services in 16 bits.
MOST_SERVICES = 65_535
#: What a list of services or targets shows before it says how many more there are.
_SHOWN = 3
#: Fewer ports in a row are written one by one, as most users write them.
_LEAST_RANGE = 3

_ENTRY_FORM = "write [srcIP:]srcPort-dstIP:dstPort, for example 80-10.0.0.2:8080"
#: The second port of a range stands between two dashes; the host after it may have more of them.
_RANGE_REST = re.compile(r"([0-9]+)-(.*)", re.DOTALL)
_PORT_RANGE = re.compile(r"([0-9]+)-([0-9]+)")
_NETWORK_FORM = "write an address, CIDR, or the form 62.135.200.x"
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")


@dataclass(slots=True)
class Service:
    """What is copied and where the copies go. ``None`` is any local address.

    One of each port: its place in the list is what the kernel's records carry.
    """

    online_addr: bytes | None
    online_port: int
    target_addr: bytes
    target_port: int

    def __str__(self) -> str:
        return f"{self.source()}-{endpoint(self.target_addr, self.target_port)}"

    def source(self) -> str:
        """The half before the dash."""
        if self.online_addr is None:
            return str(self.online_port)
        return endpoint(self.online_addr, self.online_port)


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
    """``-x``: comma separated ``[srcIP:]srcPort[-srcPort]-dstIP:dstPort[-dstPort]``, IPv6 in
    brackets; a range becomes one service a port."""
    services: list[Service] = []
    hosts = _Hosts(resolver)
    taken: dict[bytes | None, dict[int, Service]] = {None: {}}
    anywhere = taken[None]
    for entry in _items(text, "-x", _ENTRY_FORM):
        found = _parse_service(entry, hosts)
        if len(services) + len(found) > MOST_SERVICES:
            raise UsageError(
                f"-x {entry}: with it there are {len(services) + len(found):,} services, a port"
                f" each, more than {MOST_SERVICES:,}",
                "leave out what need not be copied; run a second replay for the rest",
            )
        here = taken.setdefault(found[0].online_addr, {})
        for service in found:
            port = service.online_port
            earlier = anywhere.get(port) or here.get(port)
            if earlier is not None:
                raise UsageError(
                    f"-x {entry}: {earlier} before it takes the same traffic already",
                    "one online port is copied to one target; "
                    + (f"write ranges around port {port}, or " if len(found) > 1 else "")
                    + "run a second replay for another",
                )
        # Not while looking: an entry is no rival of its own.
        here.update((service.online_port, service) for service in found)
        services += found
    return services


def describe(services: Sequence[Service]) -> str:
    """The services for a line of text: ranges where ports follow each other, and a few only."""
    return _shortened(
        (_range_text(services[first], services[last]), last - first + 1)
        for first, last in _runs(services)
    )


def describe_endpoints(endpoints: Iterable[tuple[bytes, int]]) -> str:
    """The same of addresses and ports, each once, in order."""
    services = [Service(None, port, addr, port) for addr, port in sorted(set(endpoints))]
    return _shortened(
        (
            endpoint(services[first].target_addr, services[first].target_port)
            + (f"-{services[last].target_port}" if last > first else ""),
            last - first + 1,
        )
        for first, last in _runs(services)
    )


def _shortened(parts: Iterable[tuple[str, int]]) -> str:
    """Comma separated; each part with how many it stands for."""
    listed = list(parts)
    # "and 1 more" would be no shorter than the one.
    shown = listed if len(listed) <= _SHOWN + 1 else listed[:_SHOWN]
    texts = [text for text, _ in shown]
    if more := sum(number for _, number in listed[len(shown) :]):
        texts.append(f"and {more:,} more")
    return ", ".join(texts)


def _runs(services: Sequence[Service]) -> Iterator[tuple[int, int]]:
    """Indexes, both inclusive, of what can be written as one entry of ``-x``."""
    first, step = 0, -1  # by how much the target's port grows in it; -1: not known yet
    for index, (one, next_) in enumerate(pairwise(services), 1):
        grown = next_.target_port - one.target_port
        if (
            next_.online_port == one.online_port + 1
            and (grown in (0, 1) if step < 0 else grown == step)
            and next_.target_addr == one.target_addr
            and next_.online_addr == one.online_addr
        ):
            step = grown
            continue
        yield from _whole_or_single(first, index - 1)
        first, step = index, -1
    if services:
        yield from _whole_or_single(first, len(services) - 1)


def _whole_or_single(first: int, last: int) -> Iterator[tuple[int, int]]:
    if last - first + 1 >= _LEAST_RANGE:
        yield first, last
    else:
        yield from ((index, index) for index in range(first, last + 1))


def _range_text(first: Service, last: Service) -> str:
    if first is last:
        return str(first)
    target = endpoint(first.target_addr, first.target_port)
    if first.target_port == last.target_port:
        target += f"-{first.target_port}"
    return f"{first.source()}-{last.online_port}-{target}"


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
    target = map_address(_parse_host(remote.strip("[]"), where, "remote_ip", resolver))
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
        local = map_address(_parse_address(part.strip("[]"), where, "local_ip"))
        _check_families(where, local, target)
        services.append(Service(local, ports[0], target, ports[1]))
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
            low, high = _widest_gap(service.online_port for service in services)
            raise UsageError(
                f"--ports {ports[0]}-{ports[1]} contains {service.online_port}, which is copied",
                f"choose a range without it, for example --ports {low}-{high}"
                if low <= high
                else "copy fewer ports (-x): none is left for the copies",
            )


def _widest_gap(taken: Iterable[int]) -> tuple[int, int]:
    """Ports of users' among which none is ``taken``, 10,000 at most; empty if there is none."""
    ports = set(taken)
    if ports.isdisjoint(range(20_000, 30_000)):
        return 20_000, 29_999
    ports = {port for port in ports if port >= _FIRST_USER_PORT}
    edges = sorted({_FIRST_USER_PORT - 1, *ports, 65_536})
    before, after = max(pairwise(edges), key=lambda pair: pair[1] - pair[0])
    return before + 1, min(after - 1, before + 10_000)


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
    if not pool:
        return
    for service in services:
        version = family_of(service.target_addr)
        if version not in versions:
            raise UsageError(
                f"-c has no IPv{version} addresses, but {service} has an IPv{version} target",
                "add a range of that family, comma separated",
            )


def _items(text: str, option: str, form: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    if "" in items:
        # Of thousands of entries only the place is told.
        at = items.index("")
        what = f" {text!r}" if len(text) <= 60 else ""
        after = "" if what or not at else f", after {items[at - 1]!r}"
        raise UsageError(f"{option}{what}: an entry is empty{after}", form)
    return items


class _Hosts:
    """The addresses of what is written for hosts, read once: thousands of entries have few of
    them, and a name must be the same address in all."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        self._sources: dict[str, bytes] = {}
        self._targets: dict[str, bytes] = {}

    def source(self, text: str, where: str) -> bytes:
        if text not in self._sources:
            self._sources[text] = map_address(_parse_address(text, where, "the source"))
        return self._sources[text]

    def target(self, text: str, where: str) -> bytes:
        if text not in self._targets:
            address = _parse_host(text, where, "the target", self._resolver)
            self._targets[text] = map_address(address)
        return self._targets[text]


def _parse_service(entry: str, hosts: _Hosts) -> list[Service]:
    """The services of one entry: one, or as many as the range has ports."""
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
    match = _RANGE_REST.fullmatch(target)
    if match is None:
        first = last = _parse_port(source_port, where, "the source port")
    else:
        first = _parse_port(source_port, where, "the first source port")
        last = _parse_port(match[1], where, "the last source port")
        target = match[2]
        if first > last:
            raise UsageError(
                f"{where}: the range of ports {first}-{last} is empty",
                f"write {source.removesuffix(source_port)}{last}-{first}-...; before a target whose"
                f" name begins with '{last}-' write {source}-{first}-...",
            )
        source = f"{source}-{last}"
    online = hosts.source(source_host, where) if source_host else None
    target_host, target_port = _split_endpoint(target, where)
    if _PORT_RANGE.fullmatch(target):
        target_host, target_port = "", target
    if target_port is None:
        raise UsageError(
            f"{where}: the target {target!r} has no port",
            f"write {source}-{target or '10.0.0.2'}:{first}, for example",
        )
    if not target_host:
        raise UsageError(
            f"{where}: the target {target!r} has no address",
            f"write {source}-10.0.0.2:{target_port}, for example"
            + (f", or {source}-{target}-10.0.0.2:{first} for a range" if match is None else ""),
        )
    first_target, step = _parse_target_ports(
        target_port, last - first + 1, where, f"{source}-{target.removesuffix(target_port)}"
    )
    address = hosts.target(target_host, where)
    if online is not None:
        _check_families(where, online, address)
    return [
        Service(online, port, address, first_target + step * (port - first))
        for port in range(first, last + 1)
    ]


def _parse_target_ports(text: str, number: int, where: str, before: str) -> tuple[int, int]:
    """The target's first port, and how much further the one for the next online port is: 1, or
    0 if all go to one. ``before``: the entry up to here."""
    match = _PORT_RANGE.fullmatch(text)
    if match is None:
        first = last = _parse_port(text, where, "the target port")
        last += number - 1
    else:
        first = _parse_port(match[1], where, "the first target port")
        last = _parse_port(match[2], where, "the last target port")
        if number > 1 and first == last:
            return first, 0
        if last - first + 1 != number:
            online = "one online port" if number == 1 else f"{number:,} online ports"
            raise UsageError(
                f"{where}: {online}, but target ports {first}-{last}",
                f"write {before}{first} for as many in a row, or {before}{first}-{first} for one"
                " port for all"
                if number > 1
                else f"write {before}{first}, or as many online ports",
            )
    if last > 65535:
        raise UsageError(
            f"{where}: the target's ports would be {first}-{last}",
            f"the last port is 65535: write {before}{65536 - number}, for example,"
            f" or {before}{first}-{first} for one port for all",
        )
    return first, 1


def _check_families(where: str, online: bytes, target: bytes) -> None:
    if family_of(online) != family_of(target):
        raise UsageError(
            f"{where}: IPv{family_of(online)} traffic cannot be copied to an"
            f" IPv{family_of(target)} target",
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
