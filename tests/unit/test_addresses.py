import ipaddress

import pytest

from pycopy.session.addresses import (
    PORT_HI,
    PORT_LO,
    TRIES,
    KeptAddresses,
    PooledAddresses,
    SelfPorts,
    usable_hosts,
)
from pycopy.wire.address import family_of, map_address
from pycopy.wire.segment import KEY


def address(text):
    return map_address(ipaddress.ip_address(text))


CLIENT, TARGET = address("10.0.0.7"), address("10.0.0.9")
CLIENT6, TARGET6 = address("fc00::7"), address("fc00::9")


def free(key):
    return True


def never(key):
    return False


class Used:
    """What is in use, as the table knows it."""

    def __init__(self):
        self.keys = set()

    def __call__(self, key):
        return key not in self.keys

    def take(self, addresses, client=CLIENT, port=40000, target=TARGET):
        key = addresses.allocate(client, port, target, 80, self)
        self.keys.add(key)
        return KEY.unpack(key) if key else None


def test_the_clients_own_while_it_is_free():
    used = Used()
    ports = [used.take(KeptAddresses())[2] for _ in range(3)]
    assert ports == [40000, 40001, 40002]
    assert used.take(KeptAddresses(), CLIENT6, 40000, TARGET6)[:2] == (CLIENT6, TARGET6)


def test_ports_go_round_above_the_well_known():
    used = Used()
    ports = [used.take(KeptAddresses(), port=PORT_HI)[2] for _ in range(2)]
    assert ports == [PORT_HI, PORT_LO]
    assert used.take(KeptAddresses(), port=80)[2] == 80
    assert used.take(KeptAddresses(), port=80)[2] >= PORT_LO


def test_a_client_of_the_other_family_has_no_address_to_keep():
    assert KeptAddresses().allocate(CLIENT6, 1, TARGET, 80, free) is None


def test_trying_ends():
    asked = []
    assert KeptAddresses().allocate(CLIENT, 1, TARGET, 80, asked.append) is None
    assert len(asked) == TRIES + 1


def pool(*networks, excluded=()):
    return PooledAddresses([ipaddress.ip_network(each) for each in networks], frozenset(excluded))


def test_a_pool_member_by_the_client_whatever_the_order():
    first, second = pool("10.9.0.0/24", "10.8.0.0/30"), pool("10.9.0.0/24", "10.8.0.0/30")
    clients = [address(f"192.0.2.{n}") for n in range(250)]
    mapping = {client: first.allocate(client, 5, TARGET, 80, free) for client in clients}
    for client in reversed(clients):
        assert second.allocate(client, 5, TARGET, 80, free) == mapping[client]
    assert {KEY.unpack(key)[2] for key in mapping.values()} == {5}  # the client's port is free
    sources = {KEY.unpack(key)[0] for key in mapping.values()}
    assert len(sources) > 100
    assert not sources & {address("10.9.0.0"), address("10.9.0.255"), address("10.8.0.3")}


def test_clients_that_share_a_member_do_not_share_a_port():
    used, addresses = Used(), pool("10.9.0.1/32")
    taken = {used.take(addresses, client=address(f"192.0.2.{n}")) for n in range(20)}
    assert len(taken) == 20 and {each[0] for each in taken} == {address("10.9.0.1")}


def test_a_member_without_a_free_port_gives_way_to_the_next():
    addresses, full = pool("10.9.0.1/32", "10.9.0.2/32"), address("10.9.0.1")
    for n in range(20):
        client = address(f"192.0.2.{n}")
        key = addresses.allocate(client, 5, TARGET, 80, lambda key: not key.startswith(full))
        assert KEY.unpack(key)[0] == address("10.9.0.2")


def test_pool_of_the_targets_family_and_without_the_target():
    addresses = pool("10.0.0.8/30", "fc01::/126", excluded=[TARGET])
    for n in range(50):
        client = address(f"192.0.2.{n}")
        assert addresses.allocate(client, 5, TARGET, 80, free)[:16] == address("10.0.0.10")
        assert addresses.allocate(client, 5, TARGET6, 80, free).startswith(b"\xfc\x01")
    assert pool("fc01::/126").allocate(CLIENT, 5, TARGET, 80, free) is None
    assert pool("10.0.0.8/30").allocate(CLIENT, 5, TARGET, 80, never) is None


def test_own_ports_in_turn():
    used, addresses = Used(), SelfPorts([5000, 5001, 5002], lambda target: CLIENT)
    assert [used.take(addresses)[2] for _ in range(3)] == [5000, 5001, 5002]
    assert used.take(addresses) is None
    used.keys.clear()
    used.keys.add(KEY.pack(CLIENT, TARGET, 5000, 80))
    assert [used.take(addresses)[2] for _ in range(2)] == [5001, 5002]


def test_own_address_is_the_one_towards_the_target():
    """A host has several: which one is routed to the target depends on the target."""
    addresses = SelfPorts([5000], {TARGET: CLIENT, TARGET6: CLIENT6}.get)
    assert addresses.allocate(CLIENT, 1, TARGET, 80, free).startswith(CLIENT)
    assert addresses.allocate(CLIENT, 1, TARGET6, 80, free).startswith(CLIENT6)


def test_own_ports_are_searched_a_part_at_a_time():
    addresses = SelfPorts(range(20_000, 30_000), lambda target: CLIENT)
    asked = []
    assert addresses.allocate(CLIENT, 1, TARGET, 80, asked.append) is None
    assert addresses.allocate(CLIENT, 1, TARGET, 80, asked.append) is None
    assert len(set(asked)) == len(asked) == 2 * TRIES


@pytest.mark.parametrize(
    "network, hosts",
    [
        ("10.0.0.0/24", 254),
        ("10.0.0.0/31", 2),
        ("10.0.0.1/32", 1),
        ("fc00::/126", 4),
        ("fc00::/16", 1 << 112),
    ],
)
def test_usable_hosts(network, hosts):
    assert usable_hosts(ipaddress.ip_network(network)) == hosts


def test_families():
    assert family_of(CLIENT) == 4 and family_of(CLIENT6) == 6 and len(CLIENT) == len(CLIENT6) == 16
