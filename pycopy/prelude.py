"""Generated C that goes before the programs' text: addresses and ports as X-macros.

A list known before the program starts costs least as constants in its text. Addresses are
16 bytes, IPv4-mapped for IPv4, and become the four host-order words bpf/ compares with.
"""

import struct
from collections.abc import Iterable

_WORDS = struct.Struct("!4I")
_ANY = bytes(16)


def services_prelude(services: Iterable[tuple[bytes | None, int]], forwarded: bool = False) -> str:
    """PYCOPY_SERVICES: ``S(index, whose, port, w0, w1, w2, w3)`` for each online (address, port).

    An address of None stands for every address of this host, or, ``forwarded``, of any.
    """
    whose = "PYCOPY_ANYBODYS" if forwarded else "PYCOPY_OWN"
    entries = [
        f"S({index}, {whose if address is None else 'PYCOPY_GIVEN'}, {port},"
        f" {_words(address or _ANY)})"
        for index, (address, port) in enumerate(services)
    ]
    return _x_macro("PYCOPY_SERVICES", entries)


def targets_prelude(targets: Iterable[tuple[bytes, int]], lo: int, hi: int) -> str:
    """PYCOPY_TARGETS: ``S(port, w0, w1, w2, w3)`` for each target, answers to ports lo..hi."""
    entries = [f"S({port}, {_words(address)})" for address, port in targets]
    ports = f"#define PYCOPY_SELF 1\n#define PYCOPY_PORT_LO {lo}\n#define PYCOPY_PORT_HI {hi}\n"
    return ports + _x_macro("PYCOPY_TARGETS", entries)


def intercepts_prelude(intercepts: Iterable[tuple[bytes, int]]) -> str:
    """PYCOPY_INTERCEPTS: ``S(index, port, w0, w1, w2, w3)`` for each intercept (address, port)."""
    entries = [
        f"S({index}, {port}, {_words(address)})" for index, (address, port) in enumerate(intercepts)
    ]
    return _x_macro("PYCOPY_INTERCEPTS", entries)


def _words(address: bytes) -> str:
    return ", ".join(f"0x{word:08x}U" for word in _WORDS.unpack(address))


def _x_macro(name: str, entries: list[str]) -> str:
    return " \\\n\t".join([f"#define {name}(S)", *entries]) + "\n"
