"""Addresses as 16 bytes, IPv4 as IPv4-mapped (RFC 4291 2.5.5.2): the form of the BPF programs.

Pure, so that the session engine may use it as well.

Tests: tests/unit/test_config.py
"""

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MAPPED_PREFIX = bytes(10) + b"\xff\xff"


def map_address(address: Address) -> bytes:
    """16 bytes of ``address``."""
    packed = address.packed
    return packed if len(packed) == 16 else MAPPED_PREFIX + packed


def unmap_address(packed: bytes) -> Address:
    """The address that ``packed``, 16 bytes, stands for."""
    if packed.startswith(MAPPED_PREFIX):
        return ipaddress.IPv4Address(packed[12:])
    return ipaddress.IPv6Address(packed)


def family_of(packed: bytes) -> int:
    """4 for an IPv4-mapped address, else 6."""
    return 4 if packed.startswith(MAPPED_PREFIX) else 6
