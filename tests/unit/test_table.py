"""What scripts cannot say: timers, sweeps, addresses running out, memory."""

import struct

import pytest

from pycopy.abi import ACK, KIND_CLIENT, KIND_TARGET, PSH, RST, SYN, Segment
from pycopy.ledger import Count, Fate, Ledger
from pycopy.session import table as table_module
from pycopy.session.addresses import KeptAddresses, SelfPorts
from pycopy.session.rules import MS, SECOND, Rules
from pycopy.session.states import Outcome, State
from pycopy.session.table import Table

TARGET = bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 9])
ZERO = Segment(0, *[0] * 15, b"", bytes(32))


class Bench:
    """A table, and the few segments these tests need."""

    def __init__(self, addresses=None, **rules):
        self.ledger, self.now_ns = Ledger(), 0
        self.table = Table(
            Rules(**rules), self.ledger, addresses or KeptAddresses(), [(TARGET, 80)],
            lambda addr: 1460, 0,
        )  # fmt: skip
        self.claimed, self.released = [], []
        self.table.on_claim = self.claimed.append
        self.table.on_release = self.released.append

    def key(self, number):
        client = bytes(10) + b"\xff\xff" + struct.pack("!I", 0x0A000000 + number // 50_000)
        return (
            client
            + bytes(12)
            + bytes([10, 0, 0, 8])
            + struct.pack("!HH", 10_000 + number % 50_000, 80)
        )

    def client(self, number, flags, seq=0, ack=0, payload=b""):
        size = len(payload)
        seg = ZERO._replace(
            kind=KIND_CLIENT, key=self.key(number), family=4, tcp_flags=flags, seq=seq, ack=ack,
            seg_len=size, payload_bytes=size, mss=1460, time_ns=self.now_ns,
        )  # fmt: skip
        self.table.on_client(seg, payload, self.now_ns)

    def target(self, key, flags, seq=0, ack=0, size=0):
        seg = ZERO._replace(
            kind=KIND_TARGET, key=key, family=4, tcp_flags=flags, seq=seq, ack=ack, seg_len=size,
            wnd=65535, mss=1460,
        )  # fmt: skip
        self.table.on_target(seg, self.now_ns)

    def open(self, number):
        self.client(number, SYN)
        key = self.table.outbox[-1].session.target_key
        self.target(key, SYN | ACK, 0, 1)
        self.client(number, ACK, 1, 1)
        self.table.outbox.clear()
        return self.table.by_target[key]

    def until(self, when_ns):
        while self.table.deadline_ns() <= when_ns:
            self.now_ns = max(self.now_ns, self.table.deadline_ns())
            self.table.on_time(self.now_ns)
        self.now_ns = when_ns


def test_claims_come_before_the_syn_and_are_released_at_the_end():
    bench = Bench()
    session = bench.open(1)
    assert bench.claimed == [session.target_key] and not bench.released
    bench.table.end_all(0)
    assert bench.released == bench.claimed
    assert bench.ledger.outcomes[Outcome.RUN_ENDED] == 1


def test_responses_of_nobody():
    bench = Bench()
    bench.target(bytes(36), ACK)
    assert sum(bench.ledger.responses) == bench.ledger.counts[Count.RESPONSES] == 1


def test_response_counts():
    bench = Bench()
    key = bench.open(1).target_key
    bench.target(key, PSH | ACK, 1, 1, 10)
    bench.target(key, 1 | ACK, 11, 1)
    bench.target(key, RST, 12, 0)
    counts = bench.ledger.counts
    assert counts[Count.RESPONSE_PAYLOAD] == counts[Count.RESPONSE_FIN] == 1
    assert counts[Count.RESPONSE_RST] == 1


def test_addresses_run_out():
    bench = Bench(SelfPorts([5000], lambda target: TARGET))
    bench.open(1)
    bench.client(2, SYN)
    assert bench.ledger.fates[Fate.REFUSED_NO_ADDRESS] == 1
    bench.now_ns = SECOND
    bench.client(3, PSH | ACK, 100, 100, b"joining")
    assert bench.ledger.fates[Fate.REFUSED_NO_ADDRESS] == 2
    assert not bench.ledger.balance()[1:]


def test_a_lingering_session_gives_way():
    bench = Bench(SelfPorts([5000], lambda target: TARGET))
    bench.open(1)
    bench.client(1, RST | ACK, 1, 1)
    assert len(bench.table.by_target) == 1 and not bench.released
    bench.open(2)
    assert bench.ledger.counts[Count.SESSIONS] == 2 and len(bench.released) == 1
    bench.until(3 * SECOND)
    assert len(bench.table.by_target) == 1


def test_timers_do_not_pile_up(monkeypatch):
    """A gap's timer lies far ahead while ACK timers come and go below it."""
    monkeypatch.setattr(table_module, "STALE_TIMERS", 16)
    bench = Bench()
    session = bench.open(1)
    for number in range(1000):
        bench.target(session.target_key, PSH | ACK, 1 + number, 1, 1)
        bench.client(1, PSH | ACK, 100 + 2 * number, 1, b"x")
        bench.until(bench.now_ns + 45 * MS)
        bench.client(1, PSH | ACK, 1 + number, 1, b"y")
        bench.target(session.target_key, ACK, 2 + number, 2 + number)
        assert len(bench.table._timers) <= 2 + 16


def test_ended_sessions_leave_the_timers(monkeypatch):
    monkeypatch.setattr(table_module, "STALE_TIMERS", 16)
    bench = Bench()
    for number in range(500):
        bench.open(number)
        bench.client(number, PSH | ACK, 1, 1, b"request")
        bench.client(number, RST | ACK, 8, 1)
        bench.target(bench.claimed[-1], ACK, 1, 8)
        bench.until(bench.now_ns + 10 * MS)
    assert len(bench.table.by_target) <= 201
    assert len(bench.table._timers) <= 2 * 201 + 16
    bench.until(bench.now_ns + 3 * SECOND)
    assert not bench.table.by_target and not bench.table._lingering


def test_sweeping_many_sessions_takes_many_turns(monkeypatch):
    monkeypatch.setattr(table_module, "SWEEP_SESSIONS", 10)
    bench = Bench(idle_ns=SECOND)
    for number in range(35):
        bench.open(number)
    bench.client(0, RST | ACK, 1, 1)
    bench.until(table_module.SWEEP_NS)
    assert bench.ledger.outcomes[Outcome.IDLE] == 10
    bench.until(table_module.SWEEP_NS + 3 * table_module.SWEEP_STEP_NS)
    assert bench.ledger.outcomes[Outcome.IDLE] == 34
    assert all(session.outcome for session in bench.table.by_target.values())


def test_busy_counts_what_is_not_through():
    bench = Bench()
    for number in range(3):
        bench.open(number)
    assert bench.table.busy() == 0
    bench.client(0, PSH | ACK, 1, 1, b"in flight")
    bench.client(1, PSH | ACK, 1, 99, b"held")
    bench.client(2, PSH | ACK, 5, 1, b"early")
    assert bench.table.busy() == 3
    bench.table.end_all(0)
    assert bench.table.busy() == 0


def test_a_session_says_where_it_is():
    session = Bench().open(1)
    assert session.state is State.ESTABLISHED and session.outcome is None
    assert session.hop is None and session.flow is None


@pytest.mark.parametrize("sessions", [2000])
def test_an_idle_session_is_small(sessions):
    """100,000 fit into 200 MB, the sender's part of a session included."""
    import tracemalloc

    from pycopy.wire import Flow

    bench = Bench()
    tracemalloc.start()
    for number in range(sessions):
        session = bench.open(number)
        source, target = session.target_key[:16], session.target_key[16:32]
        session.flow = Flow(4, source, target, 10_000, 80)
        for turn in range(3):
            at, answered = 1 + 100 * turn, 1 + 500 * turn
            bench.client(number, PSH | ACK, at, answered, bytes(100))
            bench.target(session.target_key, PSH | ACK, answered, at + 100, 500)
        bench.table.outbox.clear()
    bench.until(30 * SECOND)
    bench.table.outbox.clear()
    used_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(bench.table.by_target) == sessions
    assert used_bytes / sessions < 1600


def test_over_the_memory_limit_the_largest_holders_go_first():
    """Whole sessions, counted; the others keep all they hold."""
    bench = Bench()
    for number, size in ((1, 100), (2, 3000), (3, 500)):
        bench.open(number)
        # Held: the target has not yet said what the client has acknowledged.
        bench.client(number, ACK | PSH, 1, 50, b"x" * size)
    bench.table.shed(600, bench.now_ns)
    held = sorted(each.online.held_bytes for each in bench.table.by_target.values())
    assert [size for size in held if size] == [100, 500]
    assert bench.ledger.outcomes[Outcome.QUEUE_FULL] == 1
    assert bench.ledger.fates[Fate.DROPPED_QUEUE_FULL] == 1
    bench.table.shed(600, bench.now_ns)
    assert bench.ledger.outcomes[Outcome.QUEUE_FULL] == 1
    assert not bench.ledger.balance()[1:]


def test_a_syn_repeated_after_a_reset_still_wants_its_connection():
    """The server was in TIME_WAIT and answered for the connection before: that was reset."""
    bench = Bench()
    bench.client(1, SYN, 1000)
    bench.client(1, RST, 5000)  # the number that the server's answer had acknowledged
    bench.client(1, SYN, 1000)
    bench.client(1, ACK, 1001, 1)
    bench.client(1, PSH | ACK, 1001, 1, b"request")
    session = bench.table.outbox[0].session
    bench.target(session.target_key, SYN | ACK, 0, 1001)
    sent = [(each.flags & RST, each.data) for each in bench.table.outbox]
    assert (0, b"request") in sent and not any(reset for reset, _ in sent)
    assert session.outcome is None and bench.ledger.fates[Fate.DUPLICATE] == 1
    assert not bench.ledger.balance()[1:]
    # Without a reset that is held there is nothing to withdraw.
    bench.client(1, SYN, 1000)
    assert bench.ledger.fates[Fate.DUPLICATE] == 2 and session.outcome is None
