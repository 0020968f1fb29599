"""Sessions that change hands: what the kernel describes is adopted, and described again alike.

The measure is the twin: a session that is given to the kernel and comes back at once does
from then on exactly what one does that was never away.
"""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pycopy.fastpath.handover import adopt, describe, may_give, unfinished
from pycopy.kernel.abi import LOG_BOUNDARY, LogRecord, Owner
from pycopy.report.ledger import Ledger
from pycopy.session.fields import KERNEL_SESSION, KernelSession, Known
from pycopy.session.rules import MS, SECOND, Rules
from pycopy.session.session import Session
from pycopy.session.states import State
from pycopy.session.views import NEVER, NO_POSITION, Chunk, Online, Target
from pycopy.wire.segment import ACK, FIN, PIECE_BYTES, PSH, RST, SYN, Segment
from pycopy.wire.seq import MASK

ONLINE_KEY, TARGET_KEY = bytes(range(36)), bytes(range(100, 136))
ZERO = Segment(0, *[0] * 15, b"", bytes(32))
NOTHING = KernelSession(*[0] * 50, ONLINE_KEY, TARGET_KEY)


class Host:
    """Writes down what it is asked for."""

    def __init__(self):
        self.rules, self.ledger, self.outbox, self.refusing = Rules(), Ledger(), [], None
        self.owner, self.calls = self, []

    def __getattr__(self, name):
        return lambda session, *args: self.calls.append((name, *args))


# -- what the kernel describes ------------------------------------------------------------------


def kernel_session(**fields):
    """An established one: 100 bytes sent and acknowledged, 500 received; numbers wrap."""
    values = dict(
        owner=Owner.USER, state=State.ESTABLISHED.value, family=4, options=15, snd_wscale=7,
        rcv_wscale=6, service=3, mss=1400, smss=1388, stretch=-5,
        known=Known.IRS | Known.NEED | Known.SENT, iss=0xFFFFFFF0,
        online_irs=0xFFFFFF00, online_snd_nxt=85, online_rcv_nxt=0xFFFFFF01,
        online_need=0xFFFFFF01, sent_need=0xFFFFFF01, irs=0xFFFFFFFE, snd_una=85, snd_nxt=85,
        snd_wnd=60_000, snd_wl1=0xFFFFFFFF, snd_wl2=85, rcv_nxt=499, rcv_acked=0xFFFFFFFF,
        ts_recent=7, answered=0xFFFFFFFF, cwnd=13_880, ssthresh=1 << 30,
        srtt_ns=3 * MS, rttvar_ns=MS, rto_ns=200 * MS, progress_ns=5 * SECOND,
        client_ns=4 * SECOND,
    )  # fmt: skip
    return NOTHING._replace(**(values | fields))


def record(seq, data, ack, flags=PSH | ACK, *, boundary=False, time_ns=SECOND):
    end = seq + len(data) + (flags & FIN) & MASK
    bits = flags | (LOG_BOUNDARY if boundary else 0)
    return LogRecord(0, 0, 0, seq, ack, len(data), bits, end, time_ns, 0, 0), data


def test_a_held_segment_of_which_a_part_has_left():
    """One super-segment: a frame of it acknowledged, one sent, the rest held, in pieces."""
    size = PIECE_BYTES + 3000
    kernel = kernel_session(
        iss=0, snd_una=1401, snd_nxt=2801, online_snd_nxt=1 + size, rto_at=9 * SECOND,
        known=Known.IRS | Known.NEED | Known.SENT, held=1, held_sent=2800,
    )  # fmt: skip
    data = bytes(number % 251 for number in range(size))
    session = adopt(
        Host(), kernel, [record(1, data, kernel.online_rcv_nxt, boundary=True)], 6 * SECOND
    )
    (sent,), queue = session.target.flight, session.online.queue
    assert (sent.pos, sent.data, sent.resent, sent.boundary) == (
        1401, data[1400:2800], True, False
    )  # fmt: skip
    assert [chunk.pos for chunk in queue] == [2801, 2801 + PIECE_BYTES]
    assert b"".join(chunk.data for chunk in queue) == data[2800:]
    assert [chunk.records for chunk in queue] == [0, 1]
    assert session.online.held_bytes == size - 2800


def test_what_is_known_of_the_client_comes_along():
    kernel = kernel_session(
        known=Known.IRS | Known.NEED | Known.SENT | Known.OVERLAP | Known.DOUBT,
        asked=80, asked_ns=3 * SECOND, client_rtt_ns=20 * MS, answered=498, said_before=497,
    )  # fmt: skip
    session = adopt(Host(), kernel, [], 6 * SECOND)
    online, target = session.online, session.target
    assert (online.overlapping, online.asked_ns, online.rtt_ns) == (True, 3 * SECOND, 20 * MS)
    assert (target.asked, target.answered, target.said_before) == (96, 500, 499)
    again = describe(session)
    assert target.doubtful
    assert again.known & Known.OVERLAP and again.known & Known.DOUBT
    assert (again.asked, again.answered, again.said_before) == (80, 498, 497)


def test_an_idle_session():
    session = adopt(Host(), kernel_session(ack_at=7 * SECOND), [], 6 * SECOND)
    online, target = session.online, session.target
    assert (session.key, session.target_key) == (ONLINE_KEY, TARGET_KEY)
    assert (session.family, session.service) == (4, 3)
    assert session.state is State.ESTABLISHED and session.outcome is None
    assert (online.irs, online.snd_nxt, online.rcv_nxt, online.queue_need) == (
        0xFFFFFF00,
        101,
        1,
        0,
    )
    assert online.fin_pos == target.fin_pos == NO_POSITION
    assert (target.snd_una, target.snd_nxt) == (101, 101)
    assert (target.rcv_nxt, target.rcv_acked, target.answered) == (501, 1, 1)
    assert (target.snd_wl1, target.snd_wl2, target.snd_wnd) == (1, 101, 60_000)
    assert (target.mss, target.smss, target.cwnd) == (1400, 1388, 13_880)
    assert (target.snd_wscale, target.rcv_wscale, target.options) == (7, 6, 15)
    assert (session.rto_at, session.ack_at) == (NEVER, 7 * SECOND)
    assert (session.progress_ns, session.last_client_ns) == (5 * SECOND, 4 * SECOND)
    assert not target.flight and not online.queue and may_give(session)


def test_what_was_sent_and_what_was_held():
    """One record half acknowledged, one sent, two held, the last with FIN."""
    online_ack = 0xFFFFFF01
    kernel = kernel_session(
        snd_una=90, snd_nxt=105, online_snd_nxt=113, rto_at=9 * SECOND, known=0x1F,
        online_rcv_nxt=online_ack + 50 & MASK, online_need=online_ack + 50 & MASK,
    )  # fmt: skip
    logged = [
        record(75, b"0123456789", online_ack, boundary=True),  # acknowledged
        record(85, b"0123456789", online_ack),
        record(95, b"abcdefghij", online_ack + 20 & MASK, ACK, boundary=True),
        record(105, b"held", online_ack + 50 & MASK, boundary=True, time_ns=2 * SECOND),
        record(109, b"end", online_ack + 30 & MASK, FIN | ACK),  # it was overtaken
    ]
    session = adopt(Host(), kernel, logged, 6 * SECOND)
    online, target = session.online, session.target
    first, second = target.flight
    assert (first.pos, first.data, first.boundary) == (106, b"56789", False)
    assert (second.pos, second.data, second.boundary, second.need) == (111, b"abcdefghij", True, 20)
    assert second.sent_ns == SECOND and not second.resent
    held, end = online.queue
    assert (held.pos, held.data, held.need, held.boundary) == (121, b"held", 50, True)
    assert (end.flags, end.end, end.need, end.boundary) == (FIN | ACK, 129, 50, False)
    assert online.held_bytes == 7 and online.fin_pos == 128 and online.snd_nxt == 129
    assert session.rto_at == 9 * SECOND and not may_give(session)


def test_a_request_begins_where_its_record_says_so():
    """Whether or not the one before is still in the log."""
    kernel = kernel_session(snd_nxt=95, online_snd_nxt=95, rto_at=9 * SECOND)
    session = adopt(Host(), kernel, [record(85, bytes(10), 0xFFFFFF01, boundary=True)], SECOND)
    assert session.target.flight[0].boundary
    session = adopt(Host(), kernel, [record(85, bytes(10), 0xFFFFFF01)], SECOND)
    assert not session.target.flight[0].boundary


def test_before_the_syn_ack():
    kernel = kernel_session(
        state=State.SYN_SENT.value, snd_una=0xFFFFFFF0, snd_nxt=0xFFFFFFF1,
        online_snd_nxt=0xFFFFFFFB, known=0, rto_at=3 * SECOND, rto_ns=SECOND, timed_ns=2 * SECOND,
    )  # fmt: skip
    held = record(0xFFFFFFF1, bytes(10), 0xFFFFFF01, boundary=True)
    session = adopt(Host(), kernel, [held], 3 * SECOND)
    target, online = session.target, session.online
    (syn,) = target.flight
    assert (syn.pos, syn.end, syn.flags, syn.sent_ns) == (0, 1, SYN, 2 * SECOND)
    assert (target.snd_una, target.snd_nxt, target.mss, target.rto_ns) == (0, 1, 1400, SECOND)
    assert [chunk.pos for chunk in online.queue] == [1] and online.snd_nxt == 11
    assert online.irs is None and online.queue_need == -1
    session.on_timer(3 * SECOND)
    (again,) = session.host.outbox
    assert (again.flags, again.seq) == (SYN, 0xFFFFFFF0) and not may_give(session)


def test_before_the_client_has_acknowledged_anything():
    """The target was faster than the capture's next segment."""
    kernel = kernel_session(known=0, online_irs=0, online_rcv_nxt=0, need_base=0)
    session = adopt(Host(), kernel, [], SECOND)
    assert session.online.irs is None and session.target.need_base == 0
    assert session.online.queue_need == -1 and not may_give(session)


@pytest.mark.parametrize(
    "state", [State.CLOSE_WAIT, State.CLOSING, State.LAST_ACK, State.FIN_WAIT_1, State.FIN_WAIT_2]
)
def test_where_one_side_has_closed(state):
    fin = record(85, b"", 0xFFFFFF01, FIN | ACK)
    client_closed = state is not State.CLOSE_WAIT
    waiting = client_closed and state is not State.FIN_WAIT_2
    kernel = kernel_session(
        state=state.value, known=Known.IRS | Known.NEED | (Known.FIN if client_closed else 0),
        snd_una=86 if client_closed and not waiting else 85, snd_nxt=86 if client_closed else 85,
        online_snd_nxt=86 if client_closed else 85, rto_at=9 * SECOND if waiting else 0,
    )  # fmt: skip
    session = adopt(Host(), kernel, [fin] if waiting else [], 6 * SECOND)
    over = state in (State.CLOSE_WAIT, State.CLOSING, State.LAST_ACK)
    assert session.state is state and not may_give(session)
    assert session.target.fin_pos == (500 if over else NO_POSITION)
    assert session.online.fin_pos == (101 if client_closed else NO_POSITION)
    assert [chunk.flags & FIN for chunk in session.target.flight] == [FIN] * waiting
    assert session.rto_at == (9 * SECOND if waiting else NEVER)


def test_what_is_finished():
    kernel = kernel_session()
    assert not unfinished(kernel, record(75, bytes(10), 0)[0])
    assert unfinished(kernel, record(75, bytes(11), 0)[0])
    assert unfinished(kernel, record(85, b"", 0, FIN)[0])


# -- what the kernel may have -------------------------------------------------------------------


def opened(irs=5000, online_irs=7000, iss=1000):
    """An established session whose client has acknowledged the online server's SYN."""
    host = Host()
    target = Target(iss, 1, 1460, SECOND)
    target.options, target.rcv_wscale = 15, 7
    session = Session(host, ONLINE_KEY, TARGET_KEY, 4, 0, Online(iss), target, 0)
    session.open(0)
    answer = ZERO._replace(
        tcp_flags=SYN | ACK, seq=irs, ack=iss + 1 & MASK, wnd=65535, mss=1460, options=15, wscale=7
    )
    session.on_target_segment(answer, MS)
    session.on_client_segment(
        ZERO._replace(tcp_flags=ACK, seq=iss + 1 & MASK, ack=online_irs + 1 & MASK), b"", MS
    )
    return session


def _hold(session):
    session.online.queue.append(Chunk(1, b"x", ACK, 0, 0))


NOT_GIVEN = {
    "no handshake online": lambda each: setattr(each.online, "irs", None),
    "something held": _hold,
    "something early": lambda each: setattr(each.online, "early", [Chunk(5, b"x", ACK, 0, 0)]),
    "the client closed": lambda each: setattr(each.online, "fin_pos", 1),
    "something in flight": lambda each: each.target.flight.append(Chunk(1, b"x", ACK, 0, 0)),
    "a gap in the answer": lambda each: setattr(each.target, "early", ((5, 6),)),
    "SACK blocks": lambda each: setattr(each.target, "sacked", ((5, 6),)),
    "not all acknowledged": lambda each: setattr(each.target, "snd_nxt", 2),
    "recovery": lambda each: setattr(each.target, "recovery_end", 5),
    "the target closed": lambda each: setattr(each.target, "fin_pos", 5),
    "another state": lambda each: setattr(each, "state", State.CLOSE_WAIT),
    "an outcome": lambda each: setattr(each, "outcome", 1),
}


@pytest.mark.parametrize("what", NOT_GIVEN)
def test_what_is_out_of_the_ordinary_stays(what):
    session = opened()
    assert may_give(session)
    NOT_GIVEN[what](session)
    assert not may_give(session)


def test_what_has_no_request_yet():
    """The first one is a boundary and measures what the target has answered before."""
    kernel = describe(opened())
    assert kernel.known == Known.IRS and kernel.online_need == 0
    assert adopt(Host(), kernel, [], 0).online.queue_need == -1


# -- twins ----------------------------------------------------------------------------------------

near_the_end = st.one_of(st.integers(0, MASK), st.integers(MASK - 3000, MASK), st.integers(0, 10))
far = st.sampled_from([0, 0, 1 << 31, (1 << 32) - 300, 5_000_000_000])
sizes = st.sampled_from([1, 7, 300, 1400])
actions = st.one_of(
    st.tuples(st.just("ask"), sizes),
    st.tuples(st.just("answered online"), sizes),
    st.tuples(st.just("answer"), sizes),
    st.tuples(st.just("acknowledge"), st.just(0)),
    st.tuples(st.just("time"), st.sampled_from([1, 21, 41, 250, 1100])),
    st.tuples(st.just("twice"), sizes),
)
ends = st.sampled_from(["fin", "reset", "target fin", "target reset", "nothing"])


class Story:
    """What both sides say to one session or to several alike."""

    def __init__(self, session, irs, online_irs):
        self.sessions = [session]
        self.now_ns = 2 * MS
        self.iss = session.online.iss
        self.seq, self.online, self.target = self.iss + 1, online_irs + 1, irs + 1
        self.fates = []

    def client(self, flags, data=b"", back=0):
        seg = ZERO._replace(
            tcp_flags=flags, seq=self.seq - back & MASK, ack=self.online & MASK,
            seg_len=len(data), time_ns=self.now_ns,
        )  # fmt: skip
        for session in self.sessions:
            session.on_client_segment(seg, data, self.now_ns)
        self.seq += len(data) + (flags & FIN) - back

    def answer(self, flags, size=0):
        acked = self.sessions[0].target
        seg = ZERO._replace(
            tcp_flags=flags, seq=self.target & MASK, ack=acked.iss + acked.snd_nxt & MASK,
            seg_len=size, wnd=500, tsval=self.now_ns // MS, options=8,
        )  # fmt: skip
        self.fates.append([each.on_target_segment(seg, self.now_ns) for each in self.sessions])
        self.target += size + (flags & FIN)

    def play(self, action, size):
        match action:
            case "ask":
                self.client(PSH | ACK, bytes(size))
            case "twice":
                self.client(PSH | ACK, bytes(1), back=1)
            case "answered online":
                self.online += size
            case "answer":
                self.answer(PSH | ACK, size)
            case "acknowledge":
                self.answer(ACK)
            case "time":
                self.now_ns += size * MS
                for session in self.sessions:
                    if session.deadline_ns <= self.now_ns and session.outcome is None:
                        session.on_timer(self.now_ns)
            case "fin":
                self.client(FIN | ACK)
            case "reset":
                self.client(RST | ACK)
            case "target fin":
                self.answer(FIN | ACK)
            case "target reset":
                self.answer(RST | ACK)


def shift(story, sent, said_online, said_target):
    """As if so much had been said before: positions go on where numbers wrap."""
    (session,) = story.sessions
    online, target = session.online, session.target
    online.snd_nxt += sent
    target.snd_una = target.snd_nxt = target.snd_nxt + sent
    target.snd_wl2 += sent
    online.rcv_nxt += said_online
    if online.queue_need >= 0:
        online.queue_need += said_online
    target.need_base += said_online - said_target
    for name in ("rcv_nxt", "rcv_acked", "snd_wl1"):
        setattr(target, name, getattr(target, name) + said_target)
    if target.asked:
        target.asked += sent
        target.answered += said_target
        target.said_before += said_target
    story.seq, story.online = story.seq + sent, story.online + said_online
    story.target += said_target


@settings(max_examples=400, deadline=None)
@given(
    near_the_end, near_the_end, near_the_end, st.lists(actions, max_size=12),
    far, far, far, st.lists(actions, max_size=25), ends,
)  # fmt: skip
@example(  # the client has received 4 GB and a little: its last request lies before
    5, 0, 0, [("ask", 1), ("answered online", 300), ("twice", 1)], 0, (1 << 32) - 300, 0, [], "fin"
)
def test_one_that_was_away_does_as_one_that_was_not(
    iss, irs, online_irs, before, sent, said_online, said_target, after, end
):
    session = opened(irs, online_irs, iss)
    story = Story(session, irs, online_irs)
    for action, size in before:
        story.play(action, size)
    for _ in range(60):  # until it is quiet
        if may_give(session):
            break
        story.play("time", 250)
        story.answer(ACK)
    if not may_give(session):
        return  # the client has acknowledged what nobody answers: it is not quiet
    shift(story, sent, said_online, said_target)
    target = session.target
    if not target.asked and target.rcv_nxt > 1 and target.rcv_nxt & MASK == 1:
        return  # 4 GB to the byte, unasked: 32 bits take it for a target that has not greeted
    kernel = describe(session)
    KERNEL_SESSION.pack(*kernel)  # every number fits
    twin = adopt(Host(), kernel, [], story.now_ns)
    assert describe(twin) == kernel
    twin.deadline_ns = story.now_ns  # as the table does
    story.sessions.append(twin)
    session.host.outbox.clear()
    session.host.ledger = Ledger()
    for action, size in [*after, (end, 0), ("time", 41), ("time", 1100)]:
        story.play(action, size)
    mine, its = session.host, twin.host
    assert [each[1:] for each in its.outbox] == [each[1:] for each in mine.outbox]
    assert its.ledger.fates == mine.ledger.fates and its.ledger.counts == mine.ledger.counts
    assert all(fates[0] is fates[-1] for fates in story.fates)
    assert (twin.state, twin.outcome) == (session.state, session.outcome)
    assert min(twin.rto_at, twin.ack_at, twin.quiet_at) == min(
        session.rto_at, session.ack_at, session.quiet_at
    )
