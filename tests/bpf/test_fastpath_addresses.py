"""Copies under the clients' own addresses, or a pool's: the kernel's choice and user space's."""

import ipaddress
import random

import pytest

from pycopy.kernel.abi import Owner
from pycopy.session.addresses import PooledAddresses
from pycopy.session.states import State
from pycopy.wire.segment import KEY
from tests.bpf.fast import TARGET, TARGET_PORT, Bench
from tests.bpf.harness import Namespaces, mapped

POOLS = {
    "one network": ["62.135.200.0/24", "fd99::/64"],
    "several": ["10.1.0.0/30", "10.2.0.0/31", "10.3.0.7/32", "10.4.0.0/16",
                "fd01::/126", "fd02::5/128", "fd03::ffff:ffff:ffff:fff0/124"],
    "16 of each": [f"10.9.{n}.0/{24 + n % 8}" for n in range(16)]
    + [f"fd09:{n}::/{64 + 4 * n}" for n in range(16)],
    "carries over": ["fd04::ffff:ffff:ffff:fff0/124", "10.255.255.240/28"],
    "wider than a hash": ["fd05::/32", "fd06::/64", "10.0.0.0/8"],
}  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    namespaces = Namespaces()
    namespaces.new()
    made = Bench(slots=256)
    made.kernel.use_ports([])
    yield made
    made.close()
    namespaces.close()


@pytest.fixture(autouse=True)
def _clear(bench):
    yield
    bench.kernel.use_pool([])
    bench.clear()


def syn_of(bench, connection, client):
    """A SYN of that client: the target key of the session it opened, or None."""
    frame = connection.client_frame("S", options=connection._options)
    at, size = (26, 4) if connection.family == 4 else (22, 16)
    bench.client(frame[:at] + mapped(client)[-size:] + frame[at + size :])
    online = [
        each
        for each in bench.sessions()
        if each.owner == Owner.KERNEL
        and KEY.unpack(each.online)[::2] == (mapped(client), connection.port)
    ]
    return online[-1].target if online else None


@pytest.mark.parametrize("family", (4, 6))
@pytest.mark.parametrize("pool", POOLS)
def test_the_same_member_as_in_user_space(bench, pool, family):
    networks = [ipaddress.ip_network(text) for text in POOLS[pool]]
    bench.kernel.use_pool(networks)
    choice = PooledAddresses(networks, frozenset())
    noise = random.Random(family)
    for _ in range(53):
        client = str(ipaddress.ip_address(noise.randbytes(4 if family == 4 else 16)))
        connection = bench.connection(family)
        expected = choice.allocate(
            mapped(client), connection.port, mapped(TARGET[family]), TARGET_PORT, lambda key: True
        )
        assert syn_of(bench, connection, client) == expected


@pytest.mark.parametrize("family", (4, 6))
def test_the_clients_own(bench, family):
    client = "198.51.100.7" if family == 4 else "2001:db8::77"
    connection = bench.connection(family)
    key = syn_of(bench, connection, client)
    expected = mapped(client), mapped(TARGET[family]), connection.port, TARGET_PORT
    assert KEY.unpack(key) == expected


def test_no_network_of_the_family_is_user_spaces_to_refuse(bench):
    bench.kernel.use_pool([ipaddress.ip_network("fd99::/64")])
    assert syn_of(bench, bench.connection(4), "198.51.100.7") is None


@pytest.mark.parametrize("family", (4, 6))
def test_a_taken_connection_is_user_spaces_to_avoid(bench, family):
    client = "198.51.100.9" if family == 4 else "2001:db8::99"
    connection = bench.connection(family)
    key = KEY.pack(mapped(client), mapped(TARGET[family]), connection.port, TARGET_PORT)
    assert bench.kernel.claim(key)
    assert syn_of(bench, connection, client) is None
    bench.kernel.release(key)


@pytest.mark.parametrize("family", (4, 6))
def test_when_every_port_was_used_the_one_that_lingers_gives_way(bench, family):
    bench.kernel.use_ports([20007])
    try:
        first, second, third = (bench.connection(family) for _ in range(3))
        first.open()
        free = bench.free_slots()
        frame = second.client_frame("S", options=second._options)
        assert bench.client(frame) == []  # nor is there a lingering one: user space's
        assert len(bench.capture.records()) == 1
        (fin,) = first.ask(b"", "FA")
        assert "F" in fin.flags
        assert [each.flags for each in first.answer(b"", "FA")] == ["A"]
        assert first.state().state == State.TIME_WAIT.value
        third.open()
        assert (third.copy_port, bench.free_slots()) == (20007, free)
        third.exchange(b"request", b"answer")
        bench.clear()
    finally:
        bench.kernel.use_ports([])
