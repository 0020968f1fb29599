"""Sessions that change hands at the limits: the first positions, zeros, the largest values."""

import pytest

from pycopy.fastpath.handover import adopt, describe
from pycopy.kernel.abi import Owner
from pycopy.session.fields import Known
from pycopy.session.rules import MS, SECOND
from pycopy.session.states import State
from pycopy.session.views import NEVER
from pycopy.wire.segment import PIECE_BYTES, PSH
from tests.unit.test_handover import Host, Story, kernel_session, opened, record

ACKED = 0xFFFFFF01  # ``kernel_session``: what the client has acknowledged, nothing but the SYN


def given(*played, irs=5000, online_irs=7000):
    """The kernel's description of a session that is quiet behind what was ``played``."""
    session = opened(irs, online_irs)
    story = Story(session, irs, online_irs)
    for action, size in [*played, ("time", 41)]:
        story.play(action, size)
    return session, describe(session)


def test_the_first_position_is_not_4_gigabytes_on():
    """Handed over before the ACK of the handshake left."""
    irs = kernel_session().irs
    kernel = kernel_session(known=Known.IRS, rcv_nxt=irs + 1 & 0xFFFFFFFF, rcv_acked=irs)
    target = adopt(Host(), kernel, [], SECOND).target
    assert (target.rcv_nxt, target.rcv_acked) == (1, 0)


def test_nothing_was_said_before_the_first_position():
    """What the kernel's numbers put there was said 4 GB later."""
    irs = kernel_session().irs
    kernel = kernel_session(known=Known.IRS, rcv_nxt=irs + 5 & 0xFFFFFFFF, rcv_acked=irs - 10)
    target = adopt(Host(), kernel, [], SECOND).target
    assert (target.rcv_nxt, target.rcv_acked) == ((1 << 32) + 5, (1 << 32) - 10)


def test_the_window_was_last_changed_before_the_latest_acknowledgement():
    assert adopt(Host(), kernel_session(snd_wl2=75), [], SECOND).target.snd_wl2 == 91


@pytest.mark.parametrize("sent", [0, 10])
def test_a_first_request_needs_nothing(sent):
    """Neither in flight nor held: a client that speaks first has received nothing."""
    kernel = kernel_session(snd_nxt=85 + sent, online_snd_nxt=95, rto_at=9 * SECOND)
    session = adopt(Host(), kernel, [record(85, bytes(10), ACKED, boundary=True)], SECOND)
    (chunk,) = session.target.flight or session.online.queue
    assert chunk.need == 0


def test_what_is_just_acknowledged_is_not_in_flight():
    session = adopt(Host(), kernel_session(), [record(75, bytes(10), ACKED)], SECOND)
    assert not session.target.flight and session.rto_at == NEVER
    assert not session.online.queue


def test_one_piece_is_not_cut():
    kernel = kernel_session(online_snd_nxt=85 + PIECE_BYTES)
    session = adopt(Host(), kernel, [record(85, bytes(PIECE_BYTES), ACKED)], SECOND)
    assert [len(chunk.data) for chunk in session.online.queue] == [PIECE_BYTES]


def test_the_end_of_time_wait_is_no_timeout():
    """The kernel keeps both in one field."""
    kernel = kernel_session(
        state=State.TIME_WAIT.value, rto_at=9 * SECOND,
        known=Known.IRS | Known.NEED | Known.SENT | Known.FIN,
    )  # fmt: skip
    assert adopt(Host(), kernel, [], SECOND).rto_at == NEVER


def test_without_a_timer_nothing_is_due():
    kernel = kernel_session(snd_nxt=95, online_snd_nxt=95, rto_at=0)
    session = adopt(Host(), kernel, [record(85, bytes(10), ACKED)], SECOND)
    assert session.target.flight and session.rto_at == NEVER


def test_what_begins_at_zero_in_the_kernel():
    """Nothing is held, in flight, timed or written down; no ACK is due."""
    _, kernel = given()
    names = (
        "lock", "generation", "held", "left", "timed_end", "held_sent", "timed_ns", "rto_at",
        "ack_at", "log_last", "held_at", "answered", "said_before", "online_need", "need_base",
    )  # fmt: skip
    assert {name: getattr(kernel, name) for name in names} == dict.fromkeys(names, 0)
    assert kernel.owner == Owner.KERNEL


def test_an_ack_that_is_due_stays_due():
    session = opened()
    session.ack_at = 7 * MS
    assert describe(session).ack_at == 7 * MS


def test_a_server_may_begin_at_zero():
    _, kernel = given(online_irs=0)
    assert (kernel.online_irs, kernel.online_rcv_nxt) == (0, 1)


def test_what_is_known_behind_a_request_that_needed_nothing():
    session, kernel = given(("ask", 10), ("answer", 20))
    assert kernel.known == Known.IRS | Known.NEED | Known.SENT
    assert kernel.online_need == kernel.sent_need == 7001
    session.online.overlapping = True
    assert describe(session).known == Known.IRS | Known.NEED | Known.SENT | Known.OVERLAP
    session.online.overlapping, session.target.doubtful = False, True
    assert describe(session).known == Known.IRS | Known.NEED | Known.SENT | Known.DOUBT


def test_the_windows_as_they_are_and_the_largest():
    session = opened()
    session.target.ssthresh = 5000
    kernel = describe(session)
    assert (kernel.cwnd, kernel.ssthresh) == (session.target.cwnd, 5000)
    session.target.cwnd = session.target.ssthresh = 1 << 31
    kernel = describe(session)
    assert (kernel.cwnd, kernel.ssthresh) == (1 << 30, 1 << 30)


def test_flags_come_along():
    kernel = kernel_session(online_snd_nxt=95)
    session = adopt(Host(), kernel, [record(85, bytes(10), ACKED)], SECOND)
    assert session.online.queue[0].flags & PSH
