"""Whose response it is: ranges, claimed sessions, everybody's; bounded, and forgotten in time."""

import ipaddress

from pycopy.channel.codec import Range
from pycopy.channel.routes import Routes
from pycopy.wire.segment import KEY


def mapped(text: str) -> bytes:
    address = ipaddress.ip_address(text)
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


def cidr(text: str) -> Range:
    network = ipaddress.ip_network(text)
    extra = 96 if network.version == 4 else 0
    return Range(mapped(str(network.network_address)), network.prefixlen + extra)


def key(number: int) -> bytes:
    return KEY.pack(mapped("10.1.2.3"), mapped("10.0.0.2"), number, 80)


def test_longest_range_wins_and_equal_ranges_share():
    routes = Routes()
    routes.add("wide", [cidr("10.0.0.0/8"), cidr("fd00::/16")])
    routes.add("narrow", [cidr("10.1.0.0/16")])
    routes.add("also narrow", [cidr("10.1.0.0/16")])
    assert routes.owners_by_range(mapped("10.2.3.4")) == ("wide",)
    assert routes.owners_by_range(mapped("10.1.3.4")) == ("narrow", "also narrow")
    assert routes.owners_by_range(mapped("fd00::7")) == ("wide",)
    assert routes.owners_by_range(mapped("192.0.2.1")) == ()
    assert routes.by_addr[mapped("192.0.2.1")] == ()
    routes.remove("narrow")
    assert routes.by_addr == {}
    assert routes.owners_by_range(mapped("10.1.3.4")) == ("also narrow",)
    routes.remove("also narrow")
    assert routes.owners_by_range(mapped("10.1.3.4")) == ("wide",)
    assert routes.per_session == ()


def test_ipv4_is_not_ipv6():
    routes = Routes()
    routes.add("six", [cidr("2001:db8::/32")])
    routes.add("four", [cidr("0.0.0.0/0")])
    assert routes.owners_by_range(mapped("32.1.13.184")) == ("four",)
    assert routes.owners_by_range(mapped("2001:db8::1")) == ("six",)
    assert routes.owners_by_range(mapped("2001:db9::1")) == ()


def test_claims_are_their_replays_only():
    routes = Routes()
    routes.add("a", [])
    routes.add("b", [])
    assert routes.per_session == ("a", "b")
    routes.claim("a", [key(1), key(2)])
    routes.claim("b", [key(3)])
    routes.release("b", [key(1)])
    assert routes.claims[key(1)] == "a"
    routes.release("a", [key(1)])
    assert key(1) not in routes.claims
    assert routes.claim("b", [key(2), key(4)]) == [key(2)]
    assert routes.claim("a", [key(2)]) == []
    assert routes.refused == 1
    assert routes.claims == {key(2): "a", key(3): "b", key(4): "b"}
    routes.release("a", [key(2)])
    assert routes.claim("b", [key(2)]) == []
    routes.remove("b")
    assert routes.claims == {}
    assert routes.per_session == ("a",)


def test_the_table_is_bounded_and_the_oldest_go():
    routes = Routes(max_claims=128)
    routes.add("a", [])
    for number in range(1000):
        routes.claim("a", [key(number)])
        assert len(routes.claims) <= 128
    assert key(999) in routes.claims
    assert key(0) not in routes.claims
    assert routes.evicted + len(routes.claims) == 1000
    routes.remove("a")
    assert routes.claims == {}
