"""Which verdict for which destination, as the maps are told."""

import ipaddress

import pytest

from pycopy.channel import Range
from pycopy.interception.verdicts import NoRoom, Verdicts, describe, range_of
from pycopy.kernel.abi import CLAIM_KEY, PASS, RELAY, SWALLOW
from pycopy.wire.address import map_address

OWN = map_address(ipaddress.ip_address("10.0.0.2"))


class Table:
    """What claims.py needs of a map; looked up as an LPM trie would."""

    def __init__(self, max_entries=8):
        self.max_entries = max_entries
        self.entries = {}

    def update(self, key, value):
        self.entries[key] = value

    def verdict(self, address):
        wanted = int.from_bytes(map_address(ipaddress.ip_address(address)), "big")
        best = max(
            (
                (bits, value)
                for (bits, addr), value in self.parsed()
                if wanted >> (128 - bits) == int.from_bytes(addr, "big") >> (128 - bits)
            ),
            default=(0, None),
        )[1]
        return None if best is None else int.from_bytes(best, "little")

    def parsed(self):
        return [(CLAIM_KEY.unpack(key), value) for key, value in self.entries.items()]


def default_of(table):
    return int.from_bytes(table.entries[bytes(4)], "little")


def ranges(*texts):
    return [range_of(ipaddress.ip_network(text)) for text in texts]


@pytest.fixture
def table():
    return Table()


@pytest.fixture
def default():
    return Table(1)


@pytest.fixture
def claims(table, default):
    return Verdicts([(table, default)])


def test_ranges_are_swallowed_and_nothing_else(claims, table, default):
    assert claims.claim_ranges(ranges("62.135.200.0/24", "fd99::/64")) == []
    assert table.verdict("62.135.200.77") == SWALLOW
    assert table.verdict("fd99::1") == SWALLOW
    assert table.verdict("62.135.201.1") is None
    assert default_of(default) == PASS


def test_own_addresses_and_pass_win_over_wider_ranges(claims, table):
    claims.pass_addresses([OWN])
    claims.pass_networks([ipaddress.ip_network("10.0.7.0/24")])
    claims.claim_ranges(ranges("10.0.0.0/8"))
    assert table.verdict("10.0.0.2") == PASS
    assert table.verdict("10.0.7.1") == PASS
    assert table.verdict("10.0.0.3") == SWALLOW


def test_what_passes_cannot_be_claimed(claims, table):
    claims.pass_addresses([OWN])
    claims.pass_networks([ipaddress.ip_network("10.0.7.0/24")])
    wanted = ranges("10.0.0.2/32", "10.0.7.0/24", "10.0.8.0/24")
    assert claims.claim_ranges(wanted) == wanted[:2]
    assert table.verdict("10.0.0.2") == PASS
    assert table.verdict("10.0.7.9") == PASS
    assert table.verdict("10.0.8.9") == SWALLOW


def test_strangers_are_swallowed_once_somebody_replays_true_addresses(claims, default):
    assert claims.default == PASS
    claims.claim_strangers()
    assert claims.default == SWALLOW
    assert default_of(default) == SWALLOW


def test_every_program_gets_the_same():
    tables = [(Table(), Table(1)) for _ in range(2)]
    claims = Verdicts(tables)
    claims.pass_addresses([OWN])
    claims.claim_ranges(ranges("10.1.0.0/16"))
    claims.claim_strangers()
    assert tables[0][0].entries == tables[1][0].entries
    assert len(tables[0][0].entries) == 2
    assert [default_of(default) for _, default in tables] == [SWALLOW, SWALLOW]


def test_no_room_takes_nothing(claims, table):
    claims.pass_addresses([OWN])
    with pytest.raises(NoRoom, match="8 are the limit"):
        claims.claim_ranges(ranges(*(f"10.{n}.0.0/16" for n in range(8))))
    assert len(table.entries) == 1
    claims.claim_ranges(ranges(*(f"10.{n}.0.0/16" for n in range(7))))
    # Known ones need no room.
    claims.claim_ranges(ranges("10.3.0.0/16"))


def test_relays_stand_for_what_is_swallowed(claims, table, default):
    wanted = ranges("10.0.7.0/24", "10.0.8.0/24", "10.0.9.0/24")
    claims.pass_networks([ipaddress.ip_network("10.0.7.0/24")])
    claims.claim_ranges(wanted[:2])
    claims.relay_ranges(wanted, 5)
    assert table.verdict("10.0.7.1") == PASS
    assert table.verdict("10.0.8.1") == RELAY + 5
    assert table.verdict("10.0.9.1") is None  # nobody has claimed it
    claims.relay_ranges(wanted, None)
    assert table.verdict("10.0.8.1") == SWALLOW
    claims.relay_strangers(3)
    assert default_of(default) == PASS
    claims.claim_strangers()
    claims.relay_strangers(3)
    claims.claim_strangers()
    assert default_of(default) == RELAY + 3
    claims.relay_strangers(None)
    assert default_of(default) == SWALLOW


def test_ranges_in_words():
    assert [describe(item) for item in ranges("62.135.200.0/24", "fd99::/64")] == [
        "62.135.200.0/24",
        "fd99::/64",
    ]
    assert describe(Range(OWN, 128)) == "10.0.0.2/32"
