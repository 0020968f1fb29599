"""The table beside a kernel that keeps sessions: which segments fetch one, who owns what."""

import struct

import pytest

from pycopy.fastpath.handover import Keeper, adopt
from pycopy.kernel.abi import LogRecord
from pycopy.report.ledger import Ledger
from pycopy.session.addresses import KeptAddresses
from pycopy.session.fates import Count, Fate, ResponseFate
from pycopy.session.fields import KernelSession, Known
from pycopy.session.owner import Nobody
from pycopy.session.rules import MS, SECOND, Rules
from pycopy.session.states import Outcome, State
from pycopy.session.table import Table
from pycopy.session.views import AT_ONCE, NEVER
from pycopy.wire.segment import ACK, KIND_CLIENT, KIND_TARGET, PSH, RST, SYN, Segment

TARGET = bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 9])
ZERO = Segment(0, *[0] * 15, b"", bytes(32))


class Kernel:
    """Has the sessions that a test or the table gives it; all else it writes down."""

    def __init__(self):
        self.sessions, self.logged = {}, []
        self.online, self.claimed, self.taken_ports = set(), set(), set()
        self.room, self.active = True, 0

    def _fetch(self, wanted):
        for session in self.sessions.values():
            if wanted in (session.online, session.target):
                del self.sessions[session.target]
                return session, self.logged
        return None

    fetch_online = fetch_target = _fetch

    def give(self, session):
        if self.room:
            self.sessions[session.target] = session
        return self.room

    def claim(self, target_key, over_lingering=False):
        if target_key in self.taken_ports or target_key in self.claimed:
            return False
        self.claimed.add(target_key)
        return True

    def release(self, target_key):
        self.claimed.discard(target_key)

    def own_online(self, online_key):
        self.online.add(online_key)

    def disown_online(self, online_key):
        self.online.discard(online_key)

    def now_active(self):
        return self.active


class Owner(Nobody):
    """Writes down what is claimed."""

    def __init__(self):
        self.claimed = []

    def claim(self, target_key):
        self.claimed.append(target_key)


class Bench:
    """A table with a kernel; one client."""

    def __init__(self, kernel=None, **rules):
        self.ledger, self.now_ns, self.owner = Ledger(), 0, Owner()
        self.kernel = Kernel() if kernel is None else kernel
        self.table = Table(
            Rules(**rules), self.ledger, KeptAddresses(), [(TARGET, 80)], lambda addr: 1460, 0,
            self.owner, Keeper(self.kernel),
        )  # fmt: skip

    def adopt(self, kernel, logged, now_ns):
        """What the timer hands over."""
        self.table.adopt_all([adopt(self.table, kernel, logged, now_ns)], now_ns)

    @staticmethod
    def key(number=1):
        addresses = bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 1]) + bytes(12) + bytes(4)
        return addresses + struct.pack("!HH", 10_000 + number, 80)

    def client(self, flags, seq=0, ack=0, payload=b"", number=1):
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

    def open(self, number=1):
        self.client(SYN, number=number)
        session = self.table.outbox[-1].session
        self.target(session.target_key, SYN | ACK, 0, 1)
        self.client(ACK, 1, 1, number=number)
        self.table.outbox.clear()
        return session

    def given(self, number=1):
        """The kernel's session, after the table has given it."""
        session = self.open(number)
        self.table.give_back()
        assert session.target_key not in self.table.by_target
        return self.kernel.sessions[session.target_key]


def test_what_is_quiet_is_given():
    bench = Bench()
    session = bench.open()
    assert bench.kernel.sessions == {} and bench.kernel.online == {session.key}
    bench.table.give_back()
    (given,) = bench.kernel.sessions.values()
    assert (given.online, given.target) == (session.key, session.target_key)
    assert not bench.table.by_online and not bench.table.by_target
    assert session.scheduled_ns == NEVER
    # Still owned online, and its port still claimed: the kernel's session has both.
    assert bench.kernel.online == {session.key} and bench.kernel.claimed == {session.target_key}


def test_it_keeps_what_the_kernel_has_no_room_for():
    bench = Bench()
    bench.kernel.room = False
    session = bench.open()
    bench.table.give_back()
    assert bench.table.by_target == {session.target_key: session}
    assert bench.table.by_online == {session.key: session}


def test_what_is_not_quiet_any_more_is_kept():
    bench = Bench()
    session = bench.open()
    bench.client(PSH | ACK, 1, 1, b"request")
    bench.table.give_back()
    assert not bench.kernel.sessions and session.key in bench.table.by_online


def test_what_is_not_its_clients_any_more_is_kept():
    """The client has begun another connection: the old one only finishes."""
    bench = Bench()
    session = bench.open()
    bench.table.detach(session)
    assert bench.kernel.online == set()
    bench.table.give_back()
    assert not bench.kernel.sessions and session.target_key in bench.table.by_target


def test_without_a_kernel_nothing_is_given():
    bench = Bench()
    session = bench.open()
    bench.table.keeper = None
    bench.table.give_back()
    assert session.key in bench.table.by_online


def test_a_clients_segment_fetches_its_session():
    bench = Bench()
    given = bench.given()
    bench.client(PSH | ACK, 1, 1, b"request")
    assert bench.kernel.sessions == {}
    (emission,) = bench.table.outbox
    assert (emission.seq, emission.data) == (1, b"request")
    session = bench.table.by_target[given.target]
    assert bench.table.by_online[given.online] is session
    assert bench.ledger.counts[Count.SESSIONS] == 1
    # Answered and quiet, it goes back; the timers of its time here are stale.
    bench.target(given.target, ACK, 1, 8)
    bench.table.give_back()
    assert bench.kernel.sessions[given.target].snd_nxt == 8
    bench.table.on_time(SECOND)
    assert not bench.table.by_target and len(bench.table.outbox) == 1


def test_a_response_fetches_its_session():
    bench = Bench()
    given = bench.given()
    bench.target(given.target, RST | ACK, 1, 1)
    assert bench.ledger.responses[ResponseFate.STEERED] == 2
    assert bench.table.by_target[given.target].state is State.CLOSED
    bench.target(bytes(36), ACK)
    assert bench.ledger.responses[ResponseFate.UNKNOWN] == 1


def in_flight(given):
    """The same session with a request on its way, and its record."""
    kernel = given._replace(snd_nxt=8, online_snd_nxt=8, ack_at=0, rto_at=300 * MS, known=Known.IRS)
    return kernel, [(LogRecord(0, 0, 0, 1, 1, 7, PSH | ACK, 8, 0, 0, 0), b"request")]


def test_what_the_timer_hands_over_goes_on_at_once():
    bench = Bench()
    given = bench.given()
    kernel, logged = in_flight(given)
    bench.adopt(kernel, logged, 300 * MS)
    (again,) = bench.table.outbox
    assert (again.seq, again.data) == (1, b"request")
    assert bench.ledger.counts[Count.TIMEOUTS] == 1


def test_what_has_been_idle_for_too_long_ends():
    bench = Bench(idle_ns=10 * SECOND)
    given = bench.given()
    bench.adopt(given, [], 11 * SECOND)
    assert bench.ledger.outcomes[Outcome.IDLE] == 1
    assert bench.kernel.online == set()


@pytest.mark.parametrize("flags", [SYN, SYN | ACK])
def test_a_session_whose_segment_leads_to_nothing_has_its_timers(flags):
    """A repeated SYN, or one with ACK, is not handed on to the session that it fetched."""
    bench = Bench()
    given = bench.given()
    bench.kernel.sessions[given.target], bench.kernel.logged = in_flight(given)
    bench.client(flags)
    assert not bench.table.outbox and bench.table.deadline_ns() == 0
    bench.table.on_time(AT_ONCE)
    assert bench.table.deadline_ns() == 300 * MS
    bench.table.on_time(300 * MS)
    assert bench.table.outbox[-1].data == b"request"


def test_another_connection_from_the_same_port():
    """The old session is fetched to be cut off, and the port towards the target is free again."""
    bench = Bench()
    given = bench.given()
    bench.client(SYN, 5000)
    assert bench.ledger.outcomes[Outcome.SUPERSEDED] == 1
    first, second = bench.table.outbox
    assert first.flags & RST and second.flags == SYN
    assert second.session.target_key == given.target


def test_ports_that_the_kernel_has_are_not_free():
    bench = Bench()
    wanted = Bench.key()[:16] + TARGET + struct.pack("!HH", 10_001, 80)
    bench.kernel.taken_ports.add(wanted)
    session = bench.open()
    assert session.target_key != wanted
    assert struct.unpack("!H", session.target_key[32:34]) == (10_002,)


def test_a_reopened_connection_asks_the_kernel_for_its_port():
    bench = Bench()
    session = bench.open()
    taken = session.target_key[:32] + struct.pack("!HH", 10_002, 80)
    bench.kernel.taken_ports.add(taken)
    bench.client(PSH | ACK, 1, 1, b"first")
    bench.target(session.target_key, PSH | ACK, 1, 6, 10)
    bench.target(session.target_key, RST | ACK, 11, 6)
    bench.client(PSH | ACK, 6, 11, b"second")
    again = bench.table.outbox[-1].session
    assert again is not session and bench.ledger.counts[Count.REOPENED] == 1
    assert struct.unpack("!H", again.target_key[32:34]) == (10_003,)


def test_the_kernels_sessions_count_for_the_limit():
    bench = Bench(max_sessions=3)
    bench.kernel.active = 2
    bench.open(1)
    bench.client(SYN, number=2)
    assert bench.ledger.fates[Fate.REFUSED_SESSION_LIMIT] == 1


def test_the_first_of_two_sessions_of_one_client_keeps_its_segments():
    """One that comes from the kernel while the client has another here only finishes."""
    bench = Bench()
    given = bench.given()
    other = given._replace(target=given.target[:34] + b"\0\7")
    mine = bench.table._adopt(adopt(bench.table, other, [], 0), 0)
    bench.adopt(given, [], 0)
    assert bench.table.by_online[given.online] is mine
    assert len(bench.table.by_target) == 2
    assert isinstance(given, KernelSession)
