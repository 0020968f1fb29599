"""Whether responses come as datagrams: the one state, from all that can be heard of it."""

import pytest

from pycopy.channel import Relaying
from pycopy.responses.datagrams import FIRST_PROBE_NS, PROBE_NS, Datagrams

OFF, PROBING, ON = Relaying


class Peer:
    def __init__(self, name):
        self.name, self.connected, self.told = name, True, []

    def tell_relaying(self, wanted):
        self.told.append(wanted)


class Intake:
    """Has heard the probes that a test says."""

    port = 36524

    def __init__(self):
        self.heard = {}

    def is_open(self, index, now_ns):
        return index in self.heard and now_ns - self.heard[index] < PROBE_NS


class Bench:
    def __init__(self, number):
        self.intake, self.peers = Intake(), [Peer(f"i{n}") for n in range(number)]
        self.datagrams, self.now_ns = Datagrams(self.intake, self.peers), 10**12

    def say(self, number, relaying):
        self.datagrams.on_relaying(self.peers[number], relaying, self.now_ns)

    def probe(self, *numbers):
        self.intake.heard.update(dict.fromkeys(numbers, self.now_ns))

    def judge(self):
        return self.datagrams.judge(self.now_ns)


@pytest.fixture
def two():
    """Both on: offered, heard, asked for and confirmed."""
    bench = Bench(2)
    for number in range(2):
        bench.say(number, PROBING)
    bench.probe(0, 1)
    bench.judge()
    for number in range(2):
        bench.say(number, ON)
    assert bench.judge() is ON and bench.datagrams.why_not == ""
    return bench


def test_nothing_is_known_at_first():
    assert Bench(1).datagrams.why_not == "not yet"


def test_offered_heard_asked_for_confirmed():
    bench = Bench(1)
    assert bench.judge() is OFF and "over the channel only" in bench.datagrams.why
    bench.say(0, PROBING)
    assert bench.judge() is PROBING and bench.peers[0].told == []
    bench.probe(0)
    assert bench.judge() is PROBING and bench.peers[0].told == [ON]
    assert bench.judge() is PROBING and bench.peers[0].told == [ON]  # said once
    bench.say(0, ON)
    assert bench.judge() is ON


def test_what_is_not_heard_within_a_second_is_not_waited_for():
    bench = Bench(1)
    bench.say(0, PROBING)
    bench.now_ns += FIRST_PROBE_NS - 1
    assert bench.judge() is PROBING
    bench.now_ns += 1
    assert bench.judge() is OFF
    assert (
        bench.datagrams.why == "nothing arrives from intercept i0 on UDP port 36524 (a firewall?)"
    )


def test_one_that_is_not_heard_any_more_turns_all_off(two):
    two.now_ns += PROBE_NS
    two.probe(0)
    assert two.judge() is OFF and "from intercept i1" in two.datagrams.why_not
    assert [peer.told for peer in two.peers] == [[ON, OFF], [ON, OFF]]
    two.probe(1)
    assert two.judge() is ON  # both still say so, and are asked again
    assert [peer.told[-1] for peer in two.peers] == [ON, ON]


def test_one_that_is_lost_begins_anew(two):
    lost = two.peers[1]
    lost.connected = False
    two.datagrams.on_lost(lost)
    assert two.judge() is OFF and two.datagrams.why == "intercept i1 is not connected"
    assert lost.told == [ON] and two.peers[0].told == [ON, OFF]
    lost.connected = True
    two.say(1, PROBING)
    assert two.judge() is PROBING and lost.told == [ON, ON]
    two.say(1, ON)
    assert two.judge() is ON


def test_one_that_takes_its_offer_back(two):
    two.say(0, OFF)
    assert two.judge() is OFF and "i0 sends responses over the channel only" in two.datagrams.why


def test_a_second_address_of_one_intercept_does_not_count(two):
    two.datagrams.leave_out(two.peers[0])
    two.peers[0].connected = False
    assert two.judge() is ON
    two.now_ns += PROBE_NS
    two.probe(0)  # by the number it had
    assert two.judge() is OFF
