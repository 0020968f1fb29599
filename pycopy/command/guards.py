"""Safety guards: what pycopy refuses to do, and why; asked before anything is attached.

Only looks (/proc, the interface list), never changes anything. Every refusal says what to
type to overrule it, or that it cannot be overruled.
"""

import difflib
import ipaddress
import socket
from collections.abc import Iterable

from pycopy.command.services import Service
from pycopy.command.values import endpoint
from pycopy.errors import Refused, UsageError
from pycopy.wire.address import unmap_address

_FINAL = "cannot be overruled: "
#: Addresses that are named one by one in warnings.
_WARNINGS = 8


def check_targets(
    services: Iterable[Service], local_addresses: set[bytes], allow_public: bool
) -> None:
    """Refuse targets that would hurt: this host, a captured service, the public internet."""
    services = list(services)
    copied: dict[tuple[bytes | None, int], Service] = {}
    for service in services:
        copied.setdefault((service.online_addr, service.online_port), service)
    # Thousands of services may have one target.
    seen: set[bytes] = set()
    for service in services:
        address = service.target_addr
        if address not in seen:
            _check_one_host(service, local_addresses)
        other = copied.get((address, service.target_port))
        if other is not None:
            raise Refused(
                f"-x {service}: the target is itself copied by {other}: a loop",
                _FINAL + "a copy would be copied again without end; leave one out",
            )
        if address not in seen and not allow_public and unmap_address(address).is_global:
            raise Refused(
                f"-x {service}: the target {_target(service)} is a public internet address",
                "if it is yours and may be flooded, add --allow-public-target",
            )
        seen.add(address)


def _check_one_host(service: Service, local_addresses: set[bytes]) -> None:
    """Refuse a target that is this host, or that is not exactly one."""
    address = unmap_address(service.target_addr)
    if address.is_loopback or service.target_addr in local_addresses:
        raise Refused(
            f"-x {service}: the target {_target(service)} is this host itself",
            _FINAL + "give the target a host, container or network namespace of its own",
        )
    if _is_not_one_host(address):
        raise Refused(
            f"-x {service}: the target {_target(service)} is not the address of one host",
            _FINAL + "copies go to one unicast address",
        )


def _target(service: Service) -> str:
    return endpoint(service.target_addr, service.target_port)


def foreign_sources(services: Iterable[Service], local_addresses: set[bytes]) -> list[str]:
    """A warning for each address in -x that no device here has: what is copied is forwarded."""
    foreign: dict[bytes, list[Service]] = {}
    for service in services:
        if service.online_addr is not None and service.online_addr not in local_addresses:
            foreign.setdefault(service.online_addr, []).append(service)
    warnings = []
    for address, its in list(foreign.items())[:_WARNINGS]:
        more = f" and {len(its) - 1:,} more" if len(its) > 1 else ""
        warnings.append(
            f"-x {its[0]}{more}: this host has no address {unmap_address(address)};"
            " only what it forwards is copied"
        )
    if len(foreign) > _WARNINGS:
        warnings.append(
            f"the same of {len(foreign) - _WARNINGS:,} more addresses in -x;"
            " 'ip -br address' lists this host's"
        )
    return warnings


def check_interfaces(names: Iterable[str], existing: Iterable[str] | None = None) -> None:
    """Every device named with -i must exist now."""
    present = [name for _, name in socket.if_nameindex()] if existing is None else list(existing)
    for name in names:
        if name not in present:
            near = difflib.get_close_matches(name, present, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(
                f"-i {name}: there is no such network device",
                f"{hint}this host has: {', '.join(sorted(present)) or 'none'}",
            )


def _is_not_one_host(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return (
        address.is_multicast
        or address.is_unspecified
        or (address.version == 4 and address.packed[0] in (0, *range(240, 256)))
    )
