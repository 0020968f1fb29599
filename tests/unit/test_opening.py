"""What the opening and the sweeping of sessions tell a kernel that keeps sessions of its own."""

import struct

import pytest

from pycopy.fastpath.handover import Keeper
from pycopy.session import table as table_module
from pycopy.session.fates import Count, Fate
from pycopy.session.rules import SECOND
from pycopy.session.states import Outcome, State
from pycopy.wire.segment import ACK, FIN, PSH, RST, SYN
from tests.unit.test_table_kernel import Bench, Kernel


class LingeringKernel(Kernel):
    """A session of its own that is over still has one of the ports."""

    def __init__(self, port):
        super().__init__()
        self.port = struct.pack("!H", port)

    def claim(self, target_key, over_lingering=False):
        if target_key[32:34] == self.port and not over_lingering:
            return False
        return super().claim(target_key)


def lingering(port):
    return Bench(LingeringKernel(port))


def port_of_key(key):
    return struct.unpack("!H", key[32:34])[0]


def port_of(session):
    return port_of_key(session.target_key)


def no_port_is_free(bench):
    bench.kernel.claim = lambda target_key, over_lingering=False: False


@pytest.mark.parametrize(
    ("flags", "payload", "fate"),
    [
        (SYN, b"", Fate.REFUSED_SESSION_LIMIT),
        (PSH | ACK, b"request", Fate.REFUSED_SESSION_LIMIT),
        (FIN | ACK, b"", Fate.STRAY),
        (SYN, b"", Fate.REFUSED_NO_ADDRESS),
        (PSH | ACK, b"request", Fate.REFUSED_NO_ADDRESS),
    ],
)
def test_the_kernel_may_open_the_next_one_of_a_client_that_is_refused(flags, payload, fate):
    bench = Bench()
    bench.now_ns = 10 * SECOND
    bench.kernel.online = {Bench.key(1), Bench.key(2)}
    if fate is Fate.REFUSED_NO_ADDRESS:
        no_port_is_free(bench)
    elif fate is not Fate.STRAY:
        bench.table.refuse(fate)
    bench.client(flags, 1, 1, payload)
    assert bench.ledger.fates[fate] == 1 and not bench.table.by_target
    assert bench.kernel.online == {Bench.key(2)}


def test_a_new_connection_takes_the_port_of_one_that_lingers():
    assert port_of(lingering(10_001).open()) == 10_001


def test_a_reopened_connection_does_not():
    """What was delayed of the one before would fit into its numbers."""
    bench = lingering(10_002)
    session = bench.open()
    bench.client(PSH | ACK, 1, 1, b"first")
    bench.target(session.target_key, PSH | ACK, 1, 6, 10)
    bench.target(session.target_key, RST | ACK, 11, 6)
    bench.client(PSH | ACK, 6, 11, b"second")
    assert bench.ledger.counts[Count.REOPENED] == 1
    assert port_of(bench.table.outbox[-1].session) == 10_003


def test_where_another_replay_has_the_port_the_session_begins_from_the_next():
    bench = Bench()
    bench.client(SYN)
    session = bench.table.outbox[-1].session
    before = session.target_key
    bench.now_ns = SECOND // 100
    bench.table.on_taken([before], bench.now_ns)
    assert port_of(session) != port_of_key(before) and session.target_key[:32] == before[:32]
    assert bench.owner.claimed == [before, session.target_key]
    assert bench.kernel.claimed == {session.target_key}
    assert list(bench.table.by_target) == [session.target_key]
    first, second = bench.table.outbox
    assert (second.flags, second.seq) == (first.flags, first.seq)
    bench.target(before, SYN | ACK, 0, 1)
    assert session.state is State.SYN_SENT
    bench.target(session.target_key, SYN | ACK, 0, 1)
    assert session.state is State.ESTABLISHED
    counts = bench.ledger.counts
    assert counts[Count.PORT_TAKEN] == counts[Count.SESSIONS] == counts[Count.ESTABLISHED] == 1
    assert counts[Count.RETRANSMITTED] == 0


def test_ports_are_tried_as_often_as_a_syn_is_repeated():
    """Each another one: a whole run of them may be the other replay's."""
    bench = Bench()
    bench.client(SYN, 0x12345678)
    session = bench.table.outbox[-1].session
    limit, seen = bench.table.rules.syn_retries, [session.target_key]
    for _ in range(2 * limit):
        bench.table.on_taken([session.target_key], bench.now_ns)
        seen.append(session.target_key)
    assert len(set(seen)) == len(bench.table.outbox) == 1 + limit
    assert bench.ledger.counts[Count.PORT_TAKEN] == limit
    assert max(map(port_of_key, seen)) - min(map(port_of_key, seen)) > 1000
    bench.now_ns = session.deadline_ns
    bench.table.on_time(bench.now_ns)
    assert bench.ledger.outcomes[Outcome.TARGET_SILENT] == 0
    assert session.state is State.CLOSED and session.lost_to is Outcome.TARGET_SILENT


def test_a_session_that_the_target_has_answered_stays():
    bench = Bench()
    session = bench.open()
    before = session.target_key
    bench.table.on_taken([before, bytes(36)], bench.now_ns)
    assert session.target_key == before and not bench.table.outbox


def test_where_no_other_port_is_free_the_syn_is_repeated():
    bench = Bench()
    bench.client(SYN)
    session = bench.table.outbox[-1].session
    no_port_is_free(bench)
    bench.table.on_taken([session.target_key], bench.now_ns)
    bench.table.outbox.clear()
    bench.owner.claimed.clear()
    bench.now_ns = session.deadline_ns
    bench.table.on_time(bench.now_ns)
    assert bench.owner.claimed == [session.target_key]
    assert [each.flags for each in bench.table.outbox] == [SYN]


def test_the_round_trip_to_the_client_begins_with_its_syn():
    """Whatever the clock stood at."""
    bench = Bench()
    bench.now_ns = 10 * SECOND
    bench.client(SYN)
    bench.now_ns += 7
    bench.client(ACK, 1, 1)
    (session,) = bench.table.by_target.values()
    assert session.online.rtt_ns == 7


def test_one_that_is_kept_does_not_keep_the_others():
    bench = Bench()
    busy, calm = bench.open(1), bench.open(2)
    bench.client(PSH | ACK, 1, 1, b"request", number=1)
    bench.table.give_back()
    assert set(bench.table.by_target.values()) == {busy}
    assert set(bench.kernel.sessions) == {calm.target_key}


def test_without_a_kernel_it_is_not_remembered_what_was_quiet():
    bench = Bench()
    bench.table.keeper = None
    bench.open()
    bench.table.keeper = Keeper(bench.kernel)
    bench.table.give_back()
    assert not bench.kernel.sessions


def test_what_was_given_is_not_swept(monkeypatch):
    monkeypatch.setattr(table_module, "SWEEP_SESSIONS", 1)
    bench = Bench(idle_ns=SECOND)
    bench.kernel.room = False
    bench.open(1)
    bench.table.give_back()
    bench.open(2)
    bench.table.on_time(table_module.SWEEP_NS)
    assert bench.ledger.outcomes[Outcome.IDLE] == 1
    bench.kernel.room = True
    bench.table.give_back()
    assert len(bench.kernel.sessions) == 1
    bench.table.on_time(table_module.SWEEP_NS + table_module.SWEEP_STEP_NS)
    assert bench.ledger.outcomes[Outcome.IDLE] == 1


def test_what_is_over_is_not_swept():
    bench = Bench(idle_ns=SECOND)
    session = bench.open()
    bench.now_ns = table_module.SWEEP_NS - 3 * SECOND // 2
    bench.client(RST | ACK, 1, 1)
    bench.table.on_time(table_module.SWEEP_NS)
    assert bench.table.by_target[session.target_key] is session
    assert sum(bench.ledger.outcomes.values()) == 1


def test_a_handshake_of_the_kernels_is_swept_at_once():
    bench = Bench()
    given = bench.given()
    syn_sent = given._replace(
        state=State.SYN_SENT.value,
        known=0,
        snd_una=0,
        snd_nxt=1,
        online_snd_nxt=1,
        rto_at=SECOND,
        ack_at=0,
    )
    bench.adopt(syn_sent, [], 0)
    assert bench.table.by_target[given.target].state is State.SYN_SENT
    bench.table.on_time(SECOND)
    assert bench.table.outbox[-1].flags == SYN
