"""Slots of the kernel's sessions: a pass looks only as far as any were ever used."""

import ipaddress

import pytest

from pycopy.kernel.abi import Left
from tests.bpf.fast import Bench
from tests.bpf.harness import Namespaces, mapped

SLOTS = 1 << 14


@pytest.fixture
def bench():
    namespaces = Namespaces()
    namespaces.new()
    made = Bench(slots=SLOTS)
    made.kernel.use_ports([])
    yield made
    made.close()
    namespaces.close()


def test_every_session_is_found_however_many_there_are(bench):
    """Also those that lie far beyond what the pass before has seen."""
    connection = bench.connection(4)
    frame = connection.client_frame("S", options=connection._options)
    clients = map(str, ipaddress.ip_network("10.64.0.0/12").hosts())
    opened = 0
    for number in (1, 3000, 1, 5000):
        assert bench.tick()[1] == []
        for client, _ in zip(clients, range(number), strict=False):
            assert bench.client(frame[:26] + mapped(client)[-4:] + frame[30:])
        opened += number
    bench.advance(bench.rules.rto_initial_ns)
    fetched = []
    while more := bench.tick()[1]:
        fetched += more
    assert len(fetched) == opened
    assert {session.left for session, _ in fetched} == {Left.TIMEOUT}
