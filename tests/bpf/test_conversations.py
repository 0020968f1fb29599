"""Random conversations (tests/sessions/test_properties.py) driven through both executors at once.

The client's segments and the target's go through the loaded programs, sessions leave the kernel
and come back in the middle of whatever happens, and the target reads what the client wrote all the
same. An engine runs alone beside them, on the same input: for as long as both have sent the same,
each session of the kernel's stands where the engine's does (states.py). From then on, the network
answers what only one of them has said.
"""

import struct
from collections import Counter
from dataclasses import fields

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pycopy.kernel.abi import FastCount
from pycopy.wire.segment import OPT_MSS, OPT_SACK_PERM, OPT_TIMESTAMPS, OPT_WSCALE
from pycopy.wire.seq import MASK
from tests.bpf.conformance import MSS, START_NS, Pair
from tests.bpf.fastpath import Programs
from tests.bpf.harness import Namespaces
from tests.sessions.test_properties import (
    SECOND,
    World,
    check_all_is_read,
    check_every_request_is_read,
    close_early,
    conversations,
    manners,
    weathers,
)

_BITS = {2: OPT_MSS, 3: OPT_WSCALE, 4: OPT_SACK_PERM, 8: OPT_TIMESTAMPS}

#: The shapes are the same on every run, so that a failure is one of the change at hand.
COMMON = {
    "deadline": None, "derandomize": True, "database": None,
    "suppress_health_check": list(HealthCheck),
}  # fmt: skip


class Executors(Pair):
    """The kernel and the engine; what they send is not text but goes to the world's network."""

    def __init__(self, programs, rules):
        self.emitted = []
        super().__init__("", 4, programs)
        for each in fields(rules):
            value = getattr(rules, each.name)
            setattr(self.rules, each.name, value)
            setattr(self.alone_engine.rules, each.name, value)
        self.kernel.configure(self.rules)
        #: Both have sent the same so far.
        self.alike = True

    def connect(self, session, online_key, target_key, seq):
        self.iss.setdefault(online_key, [seq])
        return super().connect(session, online_key, target_key, seq)

    def write(self, connection, flags, seq, ack, options, data):
        mss = connection.session.target.mss if connection.session else MSS
        self.emitted.append((connection.key, flags, seq, ack, data, mss, options))

    def hold_against_the_engine(self, do):
        """Let the engine that runs alone ``do`` the same; compare unless they have parted."""
        alone = self.alone_engine
        if not self.alike:
            return
        alone.now_ns = self.now_ns
        do(alone.table)
        if alone.table.deadline_ns() <= self.now_ns:
            alone.table.on_time(self.now_ns)
        mine = sum((sent(*each[:5]) for each in self.emitted), Counter())
        its = sum((sent(each.session.target_key, each.flags, each.seq, each.ack, each.data)
                   for each in alone.table.outbox), Counter())  # fmt: skip
        alone.table.outbox.clear()
        self.alike = mine == its
        if self.alike:
            self.compare_states()


def sent(key, flags, seq, ack, data):
    """A segment byte by byte: the two may cut differently."""
    if not data:
        return Counter([(key, flags, seq, ack, None)])
    return Counter((key, 0, (seq + at) & MASK, ack, byte) for at, byte in enumerate(data))


class PairWorld(World):
    """The world with both executors in the table's place."""

    #: A test run takes no super-segment that a device would cut. Some fit the smaller targets, else
    #: the kernel has no part in these.
    PIECES = (1, 60, 500, MSS)

    def __init__(self, programs, *arguments, **rules):
        self.programs = programs
        super().__init__(*arguments, **rules)

    def begin(self, rules):
        self.pair = Executors(self.programs, rules)
        self.ledger, self.key = self.pair.ledger, self.pair.online_key(1, 0)
        return self.pair.table

    def now(self):
        """The pair's time: it begins later, since the kernel takes a clock of 0 for its own."""
        self.pair.now_ns = self.clock.now_ns + START_NS
        self.pair.kernel.set_clock(self.pair.now_ns)
        return self.pair.now_ns

    def on_client(self, seg, payload):
        now_ns = self.now()
        seg = seg._replace(time_ns=now_ns)
        self.pair.on_client(seg, payload)
        self.pair.collect()
        if not self.pair.was_idle:
            self.pair.hold_against_the_engine(lambda table: table.on_client(seg, payload, now_ns))

    def on_target(self, seg):
        now_ns = self.now()
        seg = seg._replace(time_ns=now_ns)
        self.pair.on_target(seg)
        self.pair.collect()
        self.pair.hold_against_the_engine(lambda table: table.on_target(seg, now_ns))

    def deadline_ns(self):
        due_ns = self.pair.next_deadline()
        if self.pair.alike:
            due_ns = min(due_ns, self.pair.alone_engine.table.deadline_ns())
        return due_ns - START_NS

    def on_time(self):
        self.now()
        self.pair.turn()
        self.pair.hold_against_the_engine(lambda table: None)

    def is_over(self):
        return not (self.table.by_target or self.pair.kept())

    def flush(self):
        for key, flags, seq, ack, data, mss, options in self.pair.emitted:
            present, tsval = read_options(options)
            self.send(key, flags, seq, ack, data, mss, present, tsval)
        self.pair.emitted.clear()


def read_options(options):
    """(which are there, the timestamp)"""
    present, tsval, at = 0, 0, 0
    while at < len(options):
        kind, size = options[at], options[at + 1] if options[at] > 1 else 1
        present |= _BITS.get(kind, 0)
        if kind == 8:
            (tsval,) = struct.unpack_from("!I", options, at + 2)
        at += size
    return present, tsval


@pytest.fixture(scope="module")
def programs():
    namespaces = Namespaces()
    namespaces.new()
    made = Programs()
    made.seen = Counter()
    yield made
    made.close()
    namespaces.close()


def finish(world):
    """Nothing is left; note how much of it the kernel has done."""
    pair = world.pair
    counts = pair.kernel.counters()
    seen = world.programs.seen
    seen["kernel"] += counts[FastCount.CLIENT] + counts[FastCount.RESPONSES]
    seen["given back"] += counts[FastCount.GIVEN]
    seen["compared"] += sum(pair.comparison.compared.values())
    seen["alike"] += pair.alike
    pair.clean()


@settings(max_examples=80, **COMMON)
@given(conversations(), manners, weathers, weathers, st.integers(0, 1 << 30))
def test_the_target_reads_what_the_client_wrote(
    programs, exchanges, manners, network, capture, seed
):
    world = PairWorld(programs, exchanges, manners, network, capture, seed)
    check_all_is_read(world)
    finish(world)


@settings(max_examples=80, **COMMON)
@given(
    conversations(), manners, weathers, weathers, st.integers(0, 1 << 30),
    st.integers(1, 3), st.booleans(),
)  # fmt: skip
def test_a_target_that_closes_early_reads_every_request(
    programs, exchanges, manners, network, capture, seed, answers, with_reset
):
    close_early(exchanges, manners, answers, with_reset)
    world = PairWorld(programs, exchanges, manners, network, capture, seed, quiet_ns=SECOND)
    check_every_request_is_read(world)
    finish(world)


def test_the_kernel_had_its_share(programs):
    """Of the two tests before: what never gets there is not tested."""
    seen = programs.seen
    if not seen:
        pytest.skip("the conversations were not run")
    print(seen)
    assert seen["kernel"] > 500 and seen["given back"] > 10 and seen["compared"] > 10_000
