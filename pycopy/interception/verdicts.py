"""What the BPF programs do with a response, by its destination: swallow it or let it pass.

The verdicts, most specific prefix first: this host's own addresses and --pass pass; ranges
that replays claimed are swallowed; for the rest ``claims_default`` decides. What is
swallowed may go by a relay (pycopy/interception/relays.py) instead of the ring. Knows maps by
``update`` only; who gets the records is the channel's business.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Protocol

from pycopy.channel import Range
from pycopy.command.values import Network
from pycopy.errors import PycopyError
from pycopy.kernel.abi import CLAIM_KEY, PASS, RELAY, SWALLOW
from pycopy.wire.address import map_address, unmap_address

_VALUE_BYTES = 4
_DEFAULT_KEY = bytes(4)


class VerdictMap(Protocol):
    """A map of a loaded program (pycopy.loader.Map)."""

    max_entries: int

    def update(self, key: bytes, value: bytes) -> None:
        """Set the value under ``key``; raises OSError."""


class NoRoom(PycopyError):
    """The map has no room for all these prefixes; none of them was taken."""


def range_of(network: Network) -> Range:
    """A block of addresses as it travels and as the map wants it."""
    bits = network.prefixlen + (96 if network.version == 4 else 0)
    return Range(map_address(network.network_address), bits)


def describe(item: Range) -> str:
    """``item`` as a user writes it: 10.0.0.0/8, 2001:db8::/32."""
    address = unmap_address(item.addr)
    if address.version == 4 and item.prefix_bits >= 96:
        return str(ipaddress.ip_network((address, item.prefix_bits - 96)))
    return str(ipaddress.ip_network((ipaddress.IPv6Address(item.addr), item.prefix_bits)))


class Verdicts:
    """Verdicts, kept alike in the maps ``(claims, claims_default)`` of every loaded program."""

    def __init__(self, tables: Sequence[tuple[VerdictMap, VerdictMap]] = ()) -> None:
        self._tables = list(tables)
        self._verdicts: dict[Range, int] = {}
        self._default = PASS
        self._set_default(PASS)

    @property
    def default(self) -> int:
        """The verdict (PASS, SWALLOW, or RELAY + n) on destinations that no range names."""
        return self._default

    def add(self, table: tuple[VerdictMap, VerdictMap]) -> None:
        """One more loaded program: it gets the verdicts that the others have."""
        self._tables.append(table)
        for item, verdict in self._verdicts.items():
            key = CLAIM_KEY.pack(item.prefix_bits, item.addr)
            table[0].update(key, verdict.to_bytes(_VALUE_BYTES, "little"))
        self._set_default(self._default)

    def pass_addresses(self, addresses: Iterable[bytes]) -> None:
        """This host's own: what is for them is no copied client's."""
        self._set([Range(address, 128) for address in addresses], PASS)

    def pass_networks(self, networks: Iterable[Network]) -> None:
        """What ``--pass`` lists; raises ClaimsFull."""
        self._set([range_of(network) for network in networks], PASS)

    def claim_ranges(self, ranges: Iterable[Range]) -> list[Range]:
        """A replay's ``-c``. Returns those left as they were because they pass.

        Never taken back: after the replay has left, the target still sends what is late
        and retransmits, and a real client must not get that either.
        """
        wanted = list(ranges)
        passing = [item for item in wanted if self._verdicts.get(item) == PASS]
        self._set([item for item in wanted if item not in passing], SWALLOW)
        return passing

    def relay_ranges(self, ranges: Iterable[Range], relay: int | None) -> None:
        """What is swallowed for these goes by that relay; None: into the ring."""
        claimed = [item for item in ranges if self._verdicts.get(item, PASS) != PASS]
        self._set(claimed, _by(relay))

    def relay_strangers(self, relay: int | None) -> None:
        """What is swallowed outside every range goes by that relay; None: into the ring."""
        if self._default not in (PASS, _by(relay)):
            self._set_default(_by(relay))

    def claim_strangers(self) -> None:
        """A replay of true client addresses was here: until exit, who is not known to pass
        is taken for a copied client. A stray response to a real client is worse than a slow
        test."""
        if self._default == PASS:
            self._set_default(SWALLOW)

    def _set(self, items: Iterable[Range], verdict: int) -> None:
        new = [item for item in dict.fromkeys(items) if self._verdicts.get(item) != verdict]
        room = min(claims.max_entries for claims, _ in self._tables)
        if len(self._verdicts) + sum(item not in self._verdicts for item in new) > room:
            raise NoRoom(
                f"no room for {len(new)} more address ranges, {room} are the limit",
                "name fewer and wider ranges",
            )
        value = verdict.to_bytes(_VALUE_BYTES, "little")
        for item in new:
            key = CLAIM_KEY.pack(item.prefix_bits, item.addr)
            for claims, _ in self._tables:
                claims.update(key, value)
            self._verdicts[item] = verdict

    def _set_default(self, verdict: int) -> None:
        for _, default in self._tables:
            default.update(_DEFAULT_KEY, verdict.to_bytes(_VALUE_BYTES, "little"))
        self._default = verdict


def _by(relay: int | None) -> int:
    return SWALLOW if relay is None else RELAY + relay
