"""What is copied, and where to: the services of ``-x``, and how they are shown.

A range of ports is one service for each port, for that is what the kernel's records number.
Addresses are 16 bytes, IPv4 as IPv4-mapped (RFC 4291 2.5.5.2), as in the BPF programs.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pycopy.command.values import (
    FIRST_USER_PORT,
    Network,
    Resolver,
    endpoint,
    is_address,
    items,
    parse_address,
    parse_host,
    parse_port,
    resolve,
    split_endpoint,
)
from pycopy.errors import UsageError
from pycopy.wire.address import family_of, map_address

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


def parse_services(text: str, resolver: Resolver = resolve) -> list[Service]:
    """``-x``: comma separated ``[srcIP:]srcPort[-srcPort]-dstIP:dstPort[-dstPort]``, IPv6 in
    brackets; a range becomes one service a port."""
    services: list[Service] = []
    hosts = _Hosts(resolver)
    taken: dict[bytes | None, dict[int, Service]] = {None: {}}
    anywhere = taken[None]
    for entry in items(text, "-x", _ENTRY_FORM):
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
    target = map_address(parse_host(remote.strip("[]"), where, "remote_ip", resolver))
    ports = [
        parse_port(local_port, where, "local_port"),
        parse_port(remote_port, where, "remote_port"),
    ]
    # Colons separate addresses, so IPv6 addresses must be bracketed or alone.
    parts = re.findall(r"\[[^]]*\]|[^:\[\]]+", locals_) if "[" in locals_ else locals_.split(":")
    if is_address(locals_):
        parts = [locals_]
    services = []
    for part in parts:
        local = map_address(parse_address(part.strip("[]"), where, "local_ip"))
        _check_families(where, local, target)
        services.append(Service(local, ports[0], target, ports[1]))
    return services


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
    ports = {port for port in ports if port >= FIRST_USER_PORT}
    edges = sorted({FIRST_USER_PORT - 1, *ports, 65_536})
    before, after = max(pairwise(edges), key=lambda pair: pair[1] - pair[0])
    return before + 1, min(after - 1, before + 10_000)


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


class _Hosts:
    """The addresses of what is written for hosts, read once: thousands of entries have few of
    them, and a name must be the same address in all."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        self._sources: dict[str, bytes] = {}
        self._targets: dict[str, bytes] = {}

    def source(self, text: str, where: str) -> bytes:
        if text not in self._sources:
            self._sources[text] = map_address(parse_address(text, where, "the source"))
        return self._sources[text]

    def target(self, text: str, where: str) -> bytes:
        if text not in self._targets:
            address = parse_host(text, where, "the target", self._resolver)
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
    source_host, source_port = split_endpoint(source, where)
    if source_port is None:
        raise UsageError(f"{where}: the source {source!r} has no port", _ENTRY_FORM)
    match = _RANGE_REST.fullmatch(target)
    if match is None:
        first = last = parse_port(source_port, where, "the source port")
    else:
        first = parse_port(source_port, where, "the first source port")
        last = parse_port(match[1], where, "the last source port")
        target = match[2]
        if first > last:
            raise UsageError(
                f"{where}: the range of ports {first}-{last} is empty",
                f"write {source.removesuffix(source_port)}{last}-{first}-...; before a target whose"
                f" name begins with '{last}-' write {source}-{first}-...",
            )
        source = f"{source}-{last}"
    online = hosts.source(source_host, where) if source_host else None
    target_host, target_port = split_endpoint(target, where)
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
        first = last = parse_port(text, where, "the target port")
        last += number - 1
    else:
        first = parse_port(match[1], where, "the first target port")
        last = parse_port(match[2], where, "the last target port")
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
