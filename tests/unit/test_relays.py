"""The intercept's relays: who gets one, what the programs and the replays are told.

A real channel over loopback, the claims' and relays' maps as dictionaries, and a socket that
hears the probes.
"""

import ipaddress
import socket

import pytest

from pycopy.channel import ChannelServer, Hello, InterceptClient, Placement, Relaying
from pycopy.channel.server import MAX_REPLAYS
from pycopy.interception.relays import Relays
from pycopy.interception.verdicts import Verdicts, range_of
from pycopy.kernel import abi
from pycopy.kernel.abi import PASS, RELAY, SWALLOW
from pycopy.process.loop import Loop
from pycopy.wire.address import map_address
from tests.unit.test_verdicts import Table, default_of

COOKIE = 0xFEED_FACE_CAFE_F00D
POOL = range_of(ipaddress.ip_network("62.135.200.0/24"))
OTHER = range_of(ipaddress.ip_network("62.135.201.0/24"))
HERE = map_address(ipaddress.ip_address("127.0.0.1"))


class Bench:
    def __init__(self, maps=1):
        self.loop = Loop()
        self.log = []
        self.table, self.default = Table(), Table(1)
        self.claims = Verdicts([(self.table, self.default)])
        self.maps = [Table(abi.RELAYS) for _ in range(maps)]
        self.relays = Relays(self.loop, self.claims, self.log.append)
        self.server = ChannelServer(
            self.loop, "127.0.0.1", 0, placement=Placement.TARGET, instance=9,
            on_hello=self._on_hello, log=self.log.append,
            on_welcome=self.relays.welcome,
            on_relay=self.relays.want,
            on_leave=self.relays.leave,
        )  # fmt: skip
        for each in self.maps:
            self.relays.add_map(each)
        self.ears = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.ears.bind(("127.0.0.1", 0))
        self.ears.settimeout(5)
        self.clients = []
        #: What each client was told last.
        self.said = {}

    def _on_hello(self, hello, _name):
        self.claims.claim_ranges(hello.ranges)
        if not hello.ranges:
            self.claims.claim_strangers()

    def replay(self, *ranges, port=None):
        port = self.ears.getsockname()[1] if port is None else port
        client = InterceptClient(
            ("127.0.0.1", self.server.port),
            Hello(len(self.clients) + 1, ranges, port, COOKIE), self.loop,
            on_records=list, on_state=self.log.append, on_relaying=self.said.__setitem__,
        )  # fmt: skip
        client.start()
        self.clients.append(client)
        self.until(lambda: client.connected)
        return client

    def until(self, condition):
        for _ in range(500):
            if condition():
                return
            self.loop.wait(0)
            self.ears.settimeout(5)
        pytest.fail(f"waited in vain; log: {self.log}")

    def entries(self, index=0):
        """{number: entry} of what a program has, without the empty ones."""
        return {
            int.from_bytes(key, "little"): abi.RELAY_ENTRY.unpack(value)
            for key, value in self.maps[index].entries.items()
            if any(value)
        }

    def close(self):
        for client in self.clients:
            client.close()
        self.relays.close()
        self.server.close(0)
        self.ears.close()
        self.loop.close()


@pytest.fixture
def bench():
    made = Bench()
    yield made
    made.close()


def test_there_is_one_for_every_replay():
    assert MAX_REPLAYS <= abi.RELAYS


def on(bench, client):
    client.tell_relaying(Relaying.ON)
    return lambda: bench.said[client] is Relaying.ON


def test_probes_first_then_what_was_asked_for(bench):
    client = bench.replay()
    assert bench.said[client] is Relaying.PROBING
    assert default_of(bench.default) == SWALLOW
    probe, source = bench.ears.recvfrom(1000)
    assert source == ("127.0.0.1", bench.server.port)
    assert len(probe) == abi.DATAGRAM_BYTES
    assert abi.DATAGRAM_HEAD.unpack_from(probe) == (COOKIE, 0, abi.PROBE, 0)
    bench.until(on(bench, client))
    assert default_of(bench.default) == RELAY
    entry = bench.entries()[0]
    lo = socket.if_nametoindex("lo")
    assert entry[:4] == (COOKIE, lo, 4, 0)
    assert entry[4][12:] == b"\x08\x00"
    assert entry[5:7] == (HERE, HERE)
    ports = tuple(int.from_bytes(port, "big") for port in entry[7:])
    assert ports == (bench.server.port, bench.ears.getsockname()[1])
    client.tell_relaying(Relaying.OFF)
    bench.until(lambda: bench.said[client] is Relaying.PROBING)
    assert default_of(bench.default) == SWALLOW


def test_probes_go_on_once_a_second(bench):
    bench.replay()
    bench.relays.on_timer(1)
    bench.relays.on_timer(2)
    bench.relays.on_timer(1_000_000_001)
    heard = [bench.ears.recv(1000) for _ in range(3)]
    assert len(set(heard)) == 1
    bench.ears.settimeout(0.05)
    with pytest.raises(TimeoutError):
        bench.ears.recv(1000)


def test_who_wants_none_gets_none(bench):
    assert bench.said[bench.replay(port=0)] is Relaying.OFF
    assert bench.entries() == {}


def test_without_a_program_that_can(bench):
    made = Bench(maps=0)
    assert made.said[made.replay()] is Relaying.OFF
    made.close()


def test_two_that_keep_addresses_share_the_channel(bench):
    first = bench.replay()
    bench.until(on(bench, first))
    second = bench.replay()
    assert bench.said[second] is Relaying.OFF
    bench.until(lambda: bench.said[first] is Relaying.OFF)
    assert default_of(bench.default) == SWALLOW
    assert sum("several replays" in line for line in bench.log) == 1
    first.close()
    bench.until(lambda: bench.said[second] is Relaying.PROBING)
    bench.until(on(bench, second))
    assert default_of(bench.default) == RELAY + 1


def test_one_that_wants_none_counts_as_well(bench):
    """Its sessions are among those that nobody's range names."""
    first = bench.replay()
    bench.until(on(bench, first))
    bench.replay(port=0)
    bench.until(lambda: bench.said[first] is Relaying.OFF)
    assert default_of(bench.default) == SWALLOW


def test_ranges_have_relays_of_their_own(bench):
    first, second, third = bench.replay(POOL), bench.replay(OTHER), bench.replay()
    for client in (first, second, third):
        bench.until(on(bench, client))
    assert bench.table.verdict("62.135.200.1") == RELAY
    assert bench.table.verdict("62.135.201.1") == RELAY + 1
    assert default_of(bench.default) == RELAY + 2
    second.close()
    bench.until(lambda: bench.table.verdict("62.135.201.1") == SWALLOW)
    assert sorted(bench.entries()) == [0, 2]


def test_a_range_of_two_goes_over_the_channel(bench):
    first = bench.replay(POOL, OTHER)
    bench.until(on(bench, first))
    second = bench.replay(POOL)
    bench.until(lambda: bench.said[first] is Relaying.OFF)
    assert bench.table.verdict("62.135.200.1") == SWALLOW
    assert bench.table.verdict("62.135.201.1") == SWALLOW
    second.close()
    bench.until(lambda: bench.said[first] is Relaying.ON)
    assert bench.table.verdict("62.135.200.1") == RELAY


def test_what_passes_is_never_relayed(bench):
    bench.claims.pass_networks([ipaddress.ip_network("62.135.200.0/24")])
    client = bench.replay(POOL, OTHER)
    bench.until(on(bench, client))
    assert bench.table.verdict("62.135.200.1") == PASS
    assert bench.table.verdict("62.135.201.1") == RELAY


def test_the_number_of_one_that_left_is_used_again(bench):
    first = bench.replay(POOL)
    bench.until(on(bench, first))
    first.close()
    bench.until(lambda: not bench.entries())
    second = bench.replay(OTHER)
    bench.until(on(bench, second))
    assert sorted(bench.entries()) == [0]
    assert bench.table.verdict("62.135.200.1") == SWALLOW
    assert bench.table.verdict("62.135.201.1") == RELAY


def test_a_program_that_is_loaded_later(bench):
    bench.until(on(bench, bench.replay()))
    late = Table(abi.RELAYS)
    bench.relays.add_map(late)
    assert late.entries == bench.maps[0].entries


def test_a_way_that_is_lost_and_found(bench):
    client = bench.replay()
    bench.until(on(bench, client))
    (relay,) = bench.relays._relays.values()
    relay.hop.usable = False
    bench.relays._refresh()
    bench.until(lambda: bench.said[client] is Relaying.OFF)
    assert default_of(bench.default) == SWALLOW and bench.entries() == {}
    relay.hop.usable = True
    bench.relays._refresh()
    # What it wanted before it still wants.
    bench.until(lambda: bench.said[client] is Relaying.ON)
    assert default_of(bench.default) == RELAY and sorted(bench.entries()) == [0]
