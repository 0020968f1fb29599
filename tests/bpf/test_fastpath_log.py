"""The log of sent segments: given up in order, never too early; when it is full, sessions leave."""

import contextlib
import os
import random

import pytest

from pycopy.fastpath import maps as maps_module
from pycopy.kernel.abi import HELD_MAX, LOG_CPU_SHIFT, FastCount, Left
from tests.bpf.fast import Bench
from tests.bpf.harness import Namespaces

#: Small, so that it is full soon; with room for as many records as one session may hold.
LOG_BYTES = 1 << 16
HELD_LOG_BYTES = 1 << 20
#: Megabytes through scapy: on a busy machine that takes its time.
pytestmark = pytest.mark.timeout(240)

MATERIAL = bytes(number * 7 & 0xFF for number in range(70_000))


@contextlib.contextmanager
def logs_of(log_bytes):
    """A bench whose logs have so many bytes."""
    patch = pytest.MonkeyPatch()
    patch.setattr(maps_module, "LOG_TOTAL_BYTES", log_bytes * os.cpu_count())
    patch.setattr(maps_module, "LOG_MIN_BYTES", log_bytes)
    namespaces = Namespaces()
    namespaces.new()
    made = Bench()
    patch.undo()
    assert made.kernel.maps.log_bytes == log_bytes
    with contextlib.closing(namespaces), contextlib.closing(made):
        yield made


@pytest.fixture(scope="module")
def bench():
    with logs_of(LOG_BYTES) as made:
        yield made


@pytest.fixture(autouse=True)
def _one_cpu(bench):
    """Each CPU has a log of its own."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    yield
    os.sched_setaffinity(0, cpus)
    bench.clear()
    assert bench.free_slots() == bench.kernel.maps.slots


def exchange(connection, request, answer=b"answer"):
    """A request that leaves at once and is answered."""
    (sent,) = connection.ask(request)
    assert bytes(sent.payload) == request
    connection.answered_online(len(answer))
    connection.answer(answer)


def test_millions_of_bytes_pass_through(bench):
    noise, left = random.Random(1), bench.left()
    connections = [bench.connection(4 + 2 * (number % 2)) for number in range(7)]
    for connection in connections:
        connection.open()
    sent_bytes = 0
    while sent_bytes < 40 * LOG_BYTES:
        size = noise.choice((1, 7, 8, 100, 1000, 1447, 1448))
        at = noise.randrange(len(MATERIAL) - size)
        exchange(noise.choice(connections), MATERIAL[at : at + size])
        sent_bytes += size
    assert bench.left() == left


def test_held_segments_come_out_as_they_went_in_after_the_log_went_round(bench):
    """They stop the ring; what else there is room for goes on."""
    connection, other = bench.connection(4), bench.connection(6)
    connection.open()
    other.open()
    exchange(connection, b"first")
    connection.answered_online(100)
    acked = connection.seq
    for number in range(4):
        assert connection.ask(MATERIAL[number : number + 1000]) == []
    sent_bytes = 0
    while sent_bytes < LOG_BYTES // 2:
        exchange(other, MATERIAL[:1448])
        sent_bytes += 1448
    sent = connection.answer(b"a" * 100, acked=acked)
    assert [bytes(each.payload) for each in sent] == [
        MATERIAL[number : number + 1000] for number in range(4)
    ]


def test_a_full_log_loses_nothing(bench):
    """Who holds keeps what it holds; who finds no room leaves with all it has not got through."""
    left, counts = bench.left().get(Left.LOG, 0), bench.counts()
    holders = [bench.connection(4) for _ in range(8)]
    for holder in holders:
        holder.open()
        exchange(holder, b"first")
        holder.answered_online(100)
    expected = {}
    for number, holder in enumerate(holders):
        for turn in range(7):
            request = MATERIAL[100 * number + turn :][:1400]
            assert holder.ask(request) == []
            expected.setdefault(holder.port, []).append(request)
    late = bench.connection(6)
    late.open()
    assert late.ask(MATERIAL[:1400]) == []
    assert bench.left()[Left.LOG] > left
    records = {}
    for segment, payload in bench.capture.records():
        records.setdefault(segment.key[32:34], []).append(payload)
    gone_to_user = 0
    for number, holder in enumerate(holders):
        (found,) = [each for each in bench.kernel_sessions() if each[0].online[32:34]
                    == holder.port.to_bytes(2, "big")]  # fmt: skip
        session, logged = found
        held = [data for record, data in logged
                if (record.seq - session.snd_una) & 0xFFFFFFFF < 1 << 31]  # fmt: skip
        rest = records.get(holder.port.to_bytes(2, "big"), [])
        assert held + rest == expected[holder.port], number
        gone_to_user += len(rest)
        bench.disown(session)
    assert gone_to_user > 0
    grown = bench.counts()
    assert (
        grown[FastCount.HELD] - counts[FastCount.HELD] + gone_to_user
        == sum(map(len, expected.values()))
    )  # fmt: skip


def test_a_sessions_segments_may_be_in_the_logs_of_all_cpus(bench):
    cpus = sorted(os.sched_getaffinity(0) | set(range(os.cpu_count())))
    if len(cpus) < 2:
        pytest.skip("there is one CPU only")
    connection = bench.connection(4)
    connection.open()
    exchange(connection, b"first")
    connection.answered_online(100)
    acked = connection.seq
    for number in range(8):
        os.sched_setaffinity(0, {cpus[number % 2]})
        assert connection.ask(b"%d" % number * 100) == []
    sent = connection.answer(b"a" * 100, acked=acked)
    frames, handed_over = bench.tick()
    sent += [connection.check(frame) for frame in frames]
    assert [bytes(each.payload) for each in sent[:8]] == [b"%d" % n * 100 for n in range(8)]
    assert handed_over == []
    # In flight on both CPUs: user space gets them in order.
    ((session, logged),) = bench.kernel_sessions()
    assert [data for _, data in logged][-8:] == [b"%d" % n * 100 for n in range(8)]
    assert {record.before >> LOG_CPU_SHIFT for record, _ in logged[-7:]} == {0, 1}
    bench.disown(session)


def test_a_session_holds_so_many_and_leaves_with_all_of_them():
    with logs_of(HELD_LOG_BYTES) as roomy:
        connection = roomy.connection(4)
        connection.open()
        exchange(connection, b"first")
        connection.answered_online(100)
        requests = [b"%d" % number for number in range(HELD_MAX)]
        for request in requests:
            assert connection.ask(request) == []
        assert connection.state().held == HELD_MAX and not roomy.left()
        assert connection.ask(b"one more") == []
        assert roomy.left() == {Left.QUEUE: 1}
        ((_, payload),) = roomy.capture.records()
        assert payload == b"one more"
        ((session, logged),) = roomy.kernel_sessions()
        assert [data for _, data in logged][-HELD_MAX:] == requests
        roomy.disown(session)
