"""Whatever the capture, the network and a conforming target do: the target's application
reads the client's bytes, in order, each session ends, and every segment has its fate.
"""

import random
from dataclasses import dataclass

from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from pycopy.report.ledger import Ledger
from pycopy.session.addresses import KeptAddresses
from pycopy.session.fates import Count, Fate
from pycopy.session.rules import Rules
from pycopy.session.states import Outcome
from pycopy.session.table import Table
from pycopy.wire.segment import KEY, KIND_CLIENT, KIND_TARGET, Segment
from tests.sessions.model import (
    ACK,
    FIN,
    MASK,
    MS,
    PSH,
    RST,
    SYN,
    Clock,
    Manners,
    Server,
    ahead,
    pack_sack,
)

ADDRESSES = [bytes(10) + b"\xff\xff" + bytes([10, 0, 0, n]) for n in range(3)]
KEY_ONLINE = KEY.pack(ADDRESSES[0], ADDRESSES[1], 40001, 80)
ZERO = Segment(0, *[0] * 15, b"", bytes(32))
SECOND = 1000 * MS


@dataclass
class Exchange:
    """One request as it was online, and what the target answers to it."""

    request: int
    online_answer: int
    target_answer: int
    pipelined: bool  # sent before the answer to the one before was there


@dataclass
class Weather:
    """Of a network or of the capture: probabilities, decided by a seeded generator."""

    loss: float
    duplication: float
    reordering: float


sizes = st.one_of(st.integers(1, 300), st.integers(1, 9000), st.just(1460))
weathers = st.builds(
    Weather,
    loss=st.sampled_from([0, 0.01, 0.05, 0.2]),
    duplication=st.sampled_from([0, 0.05]),
    reordering=st.sampled_from([0, 0.05, 0.3]),
)
manners = st.builds(
    Manners,
    buffer_bytes=st.sampled_from([1, 100, 1000, 5000, 65535]),
    read_bytes=st.sampled_from([1, 700, 1 << 20]),
    read_every_ns=st.sampled_from([0, MS, 50 * MS]),
    ack_delay_ns=st.sampled_from([0, 5 * MS, 40 * MS]),
    mss=st.sampled_from([88, 536, 1460]),
    options=st.sampled_from([1, 5, 9, 13]),
    think_ns=st.sampled_from([0, MS, 300 * MS]),
)


@st.composite
def conversations(draw):
    exchanges = []
    for _ in range(draw(st.integers(1, 6))):
        online = draw(st.integers(0, 4000))
        target = draw(st.one_of(st.just(online), st.integers(min(online, 1), 5000)))
        exchanges.append(Exchange(draw(sizes), online, target, draw(st.booleans())))
    return exchanges


class World:
    """Client, capture, table, network and target in one simulated time.

    Who executes the rules is the table; tests/bpf/test_conversations.py puts others in its place.
    """

    #: Sizes of the client's segments, a super-segment among them.
    PIECES = (1, 100, 1460, 16384)

    def __init__(self, exchanges, manners, network, capture, seed, **rules):
        self.random = random.Random(seed)
        self.clock = Clock()
        self.ledger = Ledger()
        self.manners, self.network = manners, network
        # Slow, but not so slow that the test is.
        least = sum(each.request for each in exchanges) // 50
        manners.buffer_bytes = max(manners.buffer_bytes, least)
        manners.read_bytes = max(manners.read_bytes, least)
        rules = Rules(syn_retries=30, retries=30, rto_max_ns=2 * SECOND, **rules)
        self.key = KEY_ONLINE
        self.table = self.begin(rules)
        self.iss = self.random.getrandbits(32)
        self.online_irs = self.random.getrandbits(32)
        self.stream = self.random.randbytes(sum(each.request for each in exchanges))
        self.ends, at = [], 1
        for each in exchanges:
            at += each.request
            self.ends.append(((self.iss + at) & MASK, each.target_answer))
        self.servers = {}
        self.all_servers = []
        self.record(exchanges, capture)

    # -- who executes the rules ---------------------------------------------------------------

    def begin(self, rules):
        services = [(ADDRESSES[2], 80)]
        return Table(rules, self.ledger, KeptAddresses(), services, lambda addr: 1460, 0)

    def on_client(self, seg, payload):
        self.table.on_client(seg, payload, self.clock.now_ns)

    def on_target(self, seg):
        self.table.on_target(seg, self.clock.now_ns)

    def deadline_ns(self):
        return self.table.deadline_ns()

    def on_time(self):
        self.table.on_time(self.clock.now_ns)

    def is_over(self):
        return not self.table.by_target

    def flush(self):
        for session, flags, seq, ack, tsval, data in self.table.outbox:
            target = session.target
            self.send(session.target_key, flags, seq, ack, data, target.mss, target.options, tsval)
        self.table.outbox.clear()

    # -- the client as captured ---------------------------------------------------------------

    def record(self, exchanges, capture):
        at, answered, known, when, since = 0, 0, 0, 10 * MS, 0
        segments = [(0, SYN, 0, 0, 0, 0), (MS, ACK, 1, 1, 0, 0)]
        for each in exchanges:
            if not each.pipelined:
                if known != answered:
                    known, since = answered, at
                when += self.random.choice([0, MS, 100 * MS])
            end = at + each.request
            while at < end:
                size = min(end - at, self.random.choice(self.PIECES))
                size = max(size, each.request // 20)
                size = min(size, end - at)
                segments.append((when, PSH | ACK, 1 + at, 1 + known, size, at - since))
                at += size
                when += self.random.choice([0, 0, MS])
            answered += each.online_answer
        segments.append((when + MS, FIN | ACK, 1 + at, 1 + answered, 0, 0))
        for when, flags, seq, ack, size, before in segments:
            if flags != SYN:
                when, size = self.capture_badly(capture, when, flags, seq, ack, size, before)
            self.clock.at(when, self.captured, flags, seq, ack, size)

    def capture_badly(self, capture, when, flags, seq, ack, size, before):
        """Reorder it, see it twice, lose it until the client sends it again, cut otherwise.

        A repetition may begin with as much as ``before`` earlier bytes: those that were sent
        with the same ack. Bytes that the client got an answer to it does not repeat.
        """
        chance = self.random.random
        if chance() < capture.reordering:
            when += self.random.randrange(20 * MS)
        if chance() < capture.duplication:
            again = when + self.random.randrange(SECOND)
            back = self.random.randrange(before + 1) if size else 0
            self.clock.at(again, self.captured, flags & ~FIN, seq - back, ack, size + back)
        if chance() < capture.loss:
            when += self.random.choice([200 * MS, SECOND, 3 * SECOND])
            if size > 1 and chance() < 0.5:  # the client sends it again in two pieces
                front = self.random.randrange(1, size)
                self.clock.at(when, self.captured, flags & ~FIN, seq, ack, front)
        return when, size

    def captured(self, flags, seq, ack, size):
        syn = bool(flags & SYN)
        seg = ZERO._replace(
            time_ns=self.clock.now_ns, kind=KIND_CLIENT, key=self.key, family=4,
            tcp_flags=flags, seq=(self.iss + seq) & MASK,
            ack=0 if syn else (self.online_irs + ack) & MASK, seg_len=size, payload_bytes=size,
            mss=1460 if syn else 0, options=13 if syn else 8, wnd=65535,
        )  # fmt: skip
        self.on_client(seg, self.stream[seq - 1 : seq - 1 + size])

    # -- the network ----------------------------------------------------------------------------

    def carry(self, call, *args):
        chance, network = self.random.random, self.network
        for _ in range(2 if chance() < network.duplication else 1):
            if chance() < network.loss:
                continue
            delay_ns = MS
            if chance() < network.reordering:
                delay_ns += self.random.randrange(10 * MS)
            self.clock.at(self.clock.now_ns + delay_ns, call, *args)

    def send(self, key, flags, seq, ack, data, mss, options, tsval):
        for at in range(0, max(len(data), 1), mss):  # as the kernel cuts it
            piece = data[at : at + mss]
            last = at + len(piece) == len(data)
            self.carry(
                self.at_target, key, flags if last else flags & ~FIN, (seq + at) & MASK, ack,
                piece, mss, options, tsval,
            )  # fmt: skip

    def at_target(self, key, flags, seq, *rest):
        server = self.servers.get(key)
        if flags & SYN and (server is None or server.dead):
            first = 0
            while first < len(self.ends) and ahead(self.ends[first][0], seq + 1) <= 0:
                first += 1
            server = Server(
                self.clock, self.manners, self.ends, first,
                lambda answer: self.carry(self.answered, key, answer), self.random.getrandbits(32),
            )  # fmt: skip
            self.servers[key] = server
            self.all_servers.append(server)
        if server is None or server.dead:
            if not flags & RST:
                self.carry(self.answered, key, Server.nobody(rest[0]))
            return
        server.on_segment(flags, seq, *rest)

    def answered(self, key, answer):
        stamped = answer.options & 8
        seg = ZERO._replace(
            time_ns=self.clock.now_ns, kind=KIND_TARGET, key=key, family=4,
            tcp_flags=answer.flags, seq=answer.seq, ack=answer.ack, wnd=answer.wnd,
            seg_len=answer.seg_len, mss=answer.mss, options=answer.options,
            tsval=answer.tsval if stamped else 0, tsecr=answer.tsecr if stamped else 0,
            sack=pack_sack(answer.sack), sack_blocks=len(answer.sack),
        )  # fmt: skip
        self.on_target(seg)

    # -- time -------------------------------------------------------------------------------------

    def run(self):
        """Until nothing is left to happen, or far too late."""
        self.flush()
        while self.clock.next_ns() < 1 << 62 or not self.is_over():
            due_ns = self.deadline_ns()
            if due_ns < self.clock.next_ns():
                self.clock.now_ns = max(self.clock.now_ns, due_ns)
                self.on_time()
            else:
                self.clock.step()
            self.flush()
            assert self.clock.now_ns < 3000 * SECOND, "this does not end"


def check_end(world):
    ledger = world.ledger
    assert not world.table.by_online and world.is_over()
    assert ledger.fates[Fate.HELD] == 0
    assert ledger.counts[Count.CAPTURED] == sum(ledger.fates)
    assert ledger.counts[Count.RESPONSES] == sum(ledger.responses)


def describe(world):
    note(str({fate.name: n for fate, n in zip(Fate, world.ledger.fates, strict=True) if n}))
    note(str({end.value: n for end, n in world.ledger.outcomes.items() if n}))


COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


def check_all_is_read(world):
    """Run it: over one connection, the target reads what the client wrote, and its close."""
    try:
        world.run()
    finally:
        describe(world)
    check_end(world)
    assert [bytes(server.stream) for server in world.all_servers] == [world.stream]
    assert world.all_servers[0].client_fin
    assert world.ledger.outcomes[Outcome.CLOSED] == 1


def close_early(exchanges, manners, answers, with_reset):
    """A target that ends each connection after so many answers."""
    for each in exchanges:
        # A request that is sent before the answer to the one before may arrive half when the
        # target closes: no client could save that one.
        each.pipelined = False
        each.online_answer = max(each.online_answer, 1)
        each.target_answer = min(max(each.target_answer, 1), each.online_answer)
    manners.answers_per_connection = answers
    manners.close_with_reset = with_reset


def check_every_request_is_read(world):
    """Run it: over however many connections."""
    try:
        world.run()
    finally:
        describe(world)
    check_end(world)
    served = []
    for server in world.all_servers:
        start = (server.irs + 1 - world.iss - 1) & MASK
        assert bytes(server.stream) == world.stream[start : start + len(server.stream)]
        served += [each for each in server.served if each not in served]
    assert served == list(range(len(world.ends)))


@settings(max_examples=150, **COMMON)
@given(conversations(), manners, weathers, weathers, st.integers(0, 1 << 30))
def test_the_target_reads_what_the_client_wrote(exchanges, manners, network, capture, seed):
    check_all_is_read(World(exchanges, manners, network, capture, seed))


@settings(max_examples=150, **COMMON)
@given(
    conversations(), manners, weathers, weathers, st.integers(0, 1 << 30),
    st.integers(1, 3), st.booleans(),
)  # fmt: skip
def test_a_target_that_closes_early_reads_every_request(
    exchanges, manners, network, capture, seed, answers, with_reset
):
    close_early(exchanges, manners, answers, with_reset)
    # Nor one that leaves before an answer whose tail was lost: silence must outlast the repeat.
    check_every_request_is_read(World(exchanges, manners, network, capture, seed, quiet_ns=SECOND))
