"""What scripts cannot say: timers, sweeps, addresses running out, memory."""

import struct

import pytest

from pycopy.report.ledger import Ledger
from pycopy.session import table as table_module
from pycopy.session.addresses import KeptAddresses, SelfPorts
from pycopy.session.fates import Count, Fate
from pycopy.session.rules import MS, SECOND, Rules
from pycopy.session.states import Outcome, State
from pycopy.session.table import Table
from pycopy.wire.segment import ACK, FIN, KIND_CLIENT, KIND_TARGET, PSH, RST, SYN, Segment

TARGET = bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 9])
ZERO = Segment(0, *[0] * 15, b"", bytes(32))


class Bench:
    """A table, and the few segments these tests need."""

    def __init__(self, addresses=None, path_mss=lambda addr: 1460, **rules):
        self.ledger, self.now_ns = Ledger(), 0
        self.claimed, self.released = [], []
        self.table = Table(
            Rules(**rules), self.ledger, addresses or KeptAddresses(), [(TARGET, 80)],
            path_mss, 0, self,
        )  # fmt: skip

    def claim(self, target_key):
        self.claimed.append(target_key)

    def give(self, target_key):
        raise AssertionError("there is no keeper")

    def release(self, target_key):
        self.released.append(target_key)

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


def test_a_target_that_ticks_does_not_hold_a_close_for_ever():
    """It owes much and says ten bytes twice a second: there is no long silence to wait for."""
    bench = Bench()
    key = bench.open(1).target_key
    bench.client(1, PSH | ACK, 1, 1, b"request")
    bench.target(key, ACK, 1, 8, 2920)
    bench.client(1, FIN | ACK, 8, 100_001)
    said, closed_ns = 2921, 0
    while not closed_ns and bench.now_ns < 2 * bench.table.rules.doubt_max_ns:
        bench.until(bench.now_ns + SECOND // 2)
        bench.target(key, PSH | ACK, said, 8, 10)
        said += 10
        if any(each.flags & FIN for each in bench.table.outbox):
            closed_ns = bench.now_ns
    assert 0 <= closed_ns - bench.table.rules.doubt_max_ns <= SECOND
    assert bench.ledger.fates[Fate.HELD] == 0


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


def test_what_happens_twice_is_counted_twice():
    bench = Bench()
    for number in 1, 2:
        key = bench.open(number).target_key
        bench.client(number, SYN)  # repeated by the client
        bench.client(number, SYN | ACK)
        bench.client(number, PSH | ACK, 1, 1, b"request")
        bench.target(key, PSH | ACK, 1, 8, 10)
        bench.target(key, FIN | ACK, 11, 8)
        bench.target(bytes(36), RST)
    counts, fates = bench.ledger.counts, bench.ledger.fates
    for name in "ESTABLISHED SESSIONS PAYLOAD RESPONSE_PAYLOAD RESPONSE_FIN RESPONSE_RST".split():
        assert counts[Count[name]] == 2, name
    assert counts[Count.SYN] == 6 and counts[Count.PAYLOAD_BYTES] == 14
    assert fates[Fate.DUPLICATE] == fates[Fate.STRAY] == 2
    assert not bench.ledger.balance()[1:]


def test_refusals_and_joins_are_counted_each_time():
    bench = Bench(SelfPorts([5000, 5001], lambda target: TARGET))
    bench.now_ns = SECOND
    for number in range(4):
        bench.client(number, PSH | ACK, 100, 100, b"joining")
    for number in range(4, 6):
        bench.client(number, SYN)
    assert bench.ledger.counts[Count.MID_STREAM] == 2
    assert bench.ledger.fates[Fate.REFUSED_NO_ADDRESS] == 4


def test_releases_and_repairs_are_counted_each_time():
    bench = Bench()
    for number in 1, 2:
        key = bench.open(number).target_key
        bench.client(number, PSH | ACK, 1, 1, b"1st")
        bench.target(key, PSH | ACK, 1, 4, 10)
        bench.client(number, PSH | ACK, 4, 99, b"2nd")
        bench.until(bench.now_ns + SECOND // 10)  # the answer was shorter
        for _ in range(3):
            bench.target(key, ACK, 11, 4)
    assert bench.ledger.counts[Count.RELEASED_BY_QUIET] == 2
    assert bench.ledger.counts[Count.FAST_RETRANSMITS] == 2


def test_addresses_run_out():
    bench = Bench(SelfPorts([5000], lambda target: TARGET))
    bench.open(1)
    bench.client(2, SYN)
    assert bench.ledger.fates[Fate.REFUSED_NO_ADDRESS] == 1
    bench.now_ns = SECOND
    bench.client(3, PSH | ACK, 100, 100, b"joining")
    assert bench.ledger.fates[Fate.REFUSED_NO_ADDRESS] == 2
    assert not bench.ledger.balance()[1:]


def test_addresses_run_out_for_a_second_connection():
    """The port of the first one would do by number, and what is delayed of it would fit in."""
    bench = Bench(SelfPorts([5000], lambda target: TARGET))
    key = bench.open(1).target_key
    bench.target(key, FIN | ACK, 1, 1)
    bench.client(1, PSH | ACK, 1, 1, b"request")
    assert bench.ledger.fates[Fate.REFUSED_NO_ADDRESS] == 1
    assert bench.ledger.counts[Count.REOPENED] == 0
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


def gap_and_answers(bench, session, times):
    """A gap's timer lies far ahead while ACK timers come and go below it."""
    for number in range(times):
        bench.target(session.target_key, PSH | ACK, 1 + number, 1, 1)
        bench.client(1, PSH | ACK, 100 + 2 * number, 1, b"x")
        bench.until(bench.now_ns + 45 * MS)
        bench.client(1, PSH | ACK, 1 + number, 1, b"y")
        bench.target(session.target_key, ACK, 2 + number, 2 + number)
        yield


def test_timers_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(table_module, "STALE_TIMERS", 16)
    bench = Bench()
    for _ in gap_and_answers(bench, bench.open(1), 1000):
        assert len(bench.table._timers) <= 2 + 16


def test_cleaning_the_timers_keeps_those_that_are_to_come(monkeypatch):
    monkeypatch.setattr(table_module, "STALE_TIMERS", 4)
    bench = Bench()
    session, waiting = bench.open(1), []
    for number in range(2, 9):  # until their SYNs are due again, the last first
        bench.now_ns = (9 - number) * MS
        bench.client(number, SYN)
        waiting.insert(0, bench.table.outbox[-1].session)
    for _ in gap_and_answers(bench, session, 20):
        timers = bench.table._timers
        assert len(timers) <= 2 * 8 + 4
        assert timers[0] == min(timers, key=lambda each: each[:2])
    bench.table.outbox.clear()
    bench.until(SECOND + 10 * MS)
    assert [each.session for each in bench.table.outbox if each.session in waiting] == waiting


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


def test_the_path_to_the_target_limits_the_mss():
    bench = Bench(path_mss={TARGET: 1000}.__getitem__)
    assert bench.open(1).target.mss == 1000


@pytest.mark.parametrize("why", [Outcome.INTERCEPT_ENDED, Outcome.TARGET_SILENT])
def test_sessions_that_were_ended_are_not_joined_in_the_middle(why):
    """The intercept comes back while the client is still sending its request."""
    bench = Bench()
    bench.open(1)
    bench.client(1, PSH | ACK, 1, 1, b"half a ")
    bench.now_ns = SECOND
    bench.table.end_all(bench.now_ns, why, Fate.DROPPED_TARGET_SILENT)
    bench.client(1, PSH | ACK, 8, 1, b"request")
    assert bench.ledger.fates[Fate.REFUSED_MID_STREAM] == 1
    bench.client(1, PSH | ACK, 15, 501, b"another")
    assert bench.ledger.counts[Count.MID_STREAM] == 1


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


def test_an_idle_session_gives_up_what_the_sender_made_for_it():
    """It is a fifth of what an idle session costs; the sender makes it anew when it is None."""
    bench = Bench()
    session = bench.open(1)
    session.flow, session.hop = "flow", "hop"
    bench.until(bench.table.rules.keepalive_ns - SECOND)
    assert (session.flow, session.hop) == ("flow", "hop")
    bench.until(bench.table.rules.keepalive_ns + 5 * SECOND)
    assert session.flow is None and session.hop is None


@pytest.mark.parametrize("sessions", [2000])
def test_an_idle_session_is_small(sessions):
    """100,000 fit into 200 MB, the sender's part of a session included."""
    import tracemalloc

    from pycopy.wire.headers import Flow

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
