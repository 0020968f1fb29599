"""Nothing that comes off the wire breaks the kernel's sessions, nor the packet at hand.

Frames of live sessions, changed at random (seeded), by the thousand: each goes on as it
came, each has one fate, and what no parser accepts moves no session.
"""

import random
from collections import Counter

import pytest

from pycopy.kernel import abi, syscall
from pycopy.kernel.abi import CaptureCount, FastCount, InterceptCount, Owner
from tests.bpf.fast import TC_REDIRECT, Bench
from tests.bpf.frames import SYN_OPTIONS
from tests.bpf.harness import TC_CONTINUE, TC_SHOT, Namespaces, runnable
from tests.bpf.oracle import WHOLE, look

families = pytest.mark.parametrize("family", (4, 6))
ROUNDS = 1500


@pytest.fixture(scope="module")
def bench():
    namespaces = Namespaces()
    namespaces.new()
    made = Bench(slots=64)
    yield made
    made.close()
    namespaces.close()


def alive(bench, family, number=5):
    """Sessions in different moments of their lives: idle, in flight, holding, half closed."""
    connections = [bench.connection(family, timestamps=at % 2 == 0) for at in range(number)]
    for at, connection in enumerate(connections):
        connection.open()
        connection.ask(b"request")
        if at != 1:
            connection.answered_online(100)
            connection.answer(b"a" * 100)
        if at == 2:
            connection.answered_online(100)
            connection.ask(b"held")
        if at == 3:
            connection.ask(b"", "FA")
    return connections


def mutate(noise, frame):
    """One to three bytes or bits changed behind the link header, or the frame cut."""
    changed = bytearray(frame)
    for _ in range(noise.randrange(1, 4)):
        place = noise.randrange(14, len(changed))
        if noise.random() < 0.5:
            changed[place] ^= 1 << noise.randrange(8)
        else:
            changed[place] = noise.choice((0, 1, 0x7F, 0x80, 0xFF))
    if noise.random() < 0.1:
        del changed[noise.randrange(14, len(changed)) :]
    return bytes(changed)


def frames_of(noise, connection, side):
    """Something that this side could say now."""
    payload = noise.choice((b"", b"x", b"y" * 100, b"z" * 1400))
    flags = noise.choice(("A", "PA", "A", "PA", "FA", "S", "SA", "R", "RA"))
    if side == "client":
        return connection.client_frame(flags, payload, back=noise.choice((0, 0, 0, 1, 7)))
    return connection.target_frame(
        flags, payload, acked=connection.seq - noise.choice((0, 0, 1, 100))
    )


@families
@pytest.mark.parametrize("side", ("client", "target"))
def test_mutations(bench, family, side):
    noise = random.Random(family * 1009 + (side == "client"))
    program = bench.capture if side == "client" else bench.intercept
    selected = CaptureCount.SELECTED if side == "client" else InterceptCount.MATCHED
    verdicts = {TC_CONTINUE} if side == "client" else {TC_CONTINUE, TC_SHOT, TC_REDIRECT}
    connections, fates = alive(bench, family), Counter()
    for number in range(ROUNDS):
        frame = mutate(noise, frames_of(noise, noise.choice(connections), side))
        if not runnable("tc", frame):
            continue
        refused = look(frame).fate != WHOLE
        before = bench.sessions() if refused and number % 7 == 0 else None
        had = program.counts()
        run = syscall.test_run(program.module.program_fd, frame, room_bytes=4096)
        assert run.retval in verdicts
        if run.retval != TC_REDIRECT:
            assert run.data == frame
        now = program.counts()
        program.check_balance(now)
        assert now[selected] - had[selected] <= 1
        fates.update({kind.name: now[kind] - had[kind] for kind in now if now[kind] != had[kind]})
        if before is not None:
            assert bench.sessions() == before, "what cannot be read has moved a session"
        if number % 50 == 49:
            check_accounts(bench)
            bench.wire.read()
            program.records()
            bench.clear()
            connections = alive(bench, family)
    check_accounts(bench)
    assert fates["KEPT"] > 50 and fates["CAPTURED"] > 100 and len(fates) >= 5, fates
    bench.clear()
    assert bench.free_slots() == bench.kernel.maps.slots


def check_accounts(bench):
    """Every segment that a program says was kept is counted once more by what became of it."""
    counts = bench.counts()
    assert bench.capture.counts()[CaptureCount.KEPT] == counts[FastCount.CLIENT]
    assert bench.intercept.counts()[InterceptCount.KEPT] == counts[FastCount.RESPONSES]
    owners = Counter(session.owner for session in bench.sessions())
    assert bench.free_slots() == owners[Owner.FREE]
    for session in bench.sessions():
        if session.owner == Owner.KERNEL:
            assert 0 <= session.held <= abi.HELD_MAX
            assert (session.snd_nxt - session.snd_una) & 0xFFFFFFFF < 1 << 20
            assert 1 < session.state <= 9


@families
def test_whatever_is_no_syn_opens_nothing(bench, family):
    noise = random.Random(family)
    opened = bench.counts()[FastCount.OPENED]
    for flags in range(256):
        if flags & 0x17 == 0x02:  # SYN without FIN, RST, ACK
            continue
        connection = bench.connection(family)
        frame = connection.client_frame(flags, noise.choice((b"", b"x")), options=[])
        assert bench.client(frame) == []
    assert bench.counts()[FastCount.OPENED] == opened
    bench.clear()


@families
def test_what_parsers_refuse_opens_nothing(bench, family):
    noise = random.Random(family)
    opened, tried = bench.counts()[FastCount.OPENED], 0
    while tried < 300:
        connection = bench.connection(family)
        frame = mutate(noise, connection.client_frame("S", options=connection._options))
        if runnable("tc", frame) and look(frame).fate != WHOLE:
            tried += 1
            assert bench.client(frame) == []
    assert bench.counts()[FastCount.OPENED] == opened
    bench.clear()


@families
def test_what_follows_the_segment_that_makes_a_session_leave_changes_nothing(bench, family):
    """User space reads both, in order: what was learnt of the second one would be too much."""
    connection = bench.connection(family)
    (syn,) = bench.client(connection.client_frame("S", options=SYN_OPTIONS))
    connection.copy_port = connection.check(syn).sport
    connection.seq = connection.seq + 1 & 0xFFFFFFFF
    before = connection.state()
    for size in (1, 500):
        connection.answered_online(size)
        assert bench.client(connection.client_frame("PA", b"beyond a gap", back=-100)) == []
    ((session, _),) = bench.kernel_sessions()
    left = before._replace(owner=Owner.LEAVING, left=abi.Left.ORDER)
    assert session[2:] == left[2:]  # behind lock and generation
    bench.clear()
