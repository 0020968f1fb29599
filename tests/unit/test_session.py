"""The contract of a session towards its host; what it does is in tests/sessions/."""

import ast
from pathlib import Path

import pytest

import pycopy.session
from pycopy.report.ledger import Ledger
from pycopy.session.connection import Emission
from pycopy.session.fates import Count, Fate
from pycopy.session.rules import SECOND, Rules
from pycopy.session.session import Session
from pycopy.session.states import Outcome, State
from pycopy.session.views import NEVER, Online, Target
from pycopy.wire.segment import ACK, OPT_WSCALE, PSH, SYN, Segment

ZERO = Segment(0, *[0] * 15, b"", bytes(32))


class Host:
    """Writes down what it is asked for."""

    def __init__(self):
        self.rules, self.ledger, self.outbox, self.refusing = Rules(), Ledger(), [], None
        self.owner, self.calls = self, []

    def __getattr__(self, name):
        return lambda session, *args: self.calls.append((name, *args))


def opened():
    host = Host()
    target = Target(1000, 1, 1460, SECOND)
    session = Session(host, bytes(36), bytes(36), 4, 0, Online(1000), target, 0)
    session.open(0)
    return host, session


def established():
    host, session = opened()
    answer = ZERO._replace(tcp_flags=SYN | ACK, seq=5000, ack=1001, wnd=65535, mss=1460)
    session.on_target_segment(answer, 1)
    host.outbox.clear()
    return host, session


def test_an_emission_is_a_tuple_in_a_fixed_order():
    host, session = opened()
    assert host.outbox == [(session, SYN, 1000, 0, 0, b"")]
    assert Emission._fields == ("session", "flags", "seq", "ack", "tsval", "data")
    assert isinstance(host.outbox[0], Emission)


def test_the_host_is_asked_to_come_back_once_for_a_deadline():
    host, session = opened()
    assert session.deadline_ns == SECOND and host.calls == [("schedule",)]
    session.scheduled_ns = SECOND
    session.on_timer(SECOND // 2)  # too early: nothing happens
    assert session.deadline_ns == SECOND and host.calls == [("schedule",)]
    assert len(host.outbox) == 1
    session.on_timer(SECOND)
    assert session.deadline_ns == 3 * SECOND and len(host.outbox) == 2


@pytest.mark.parametrize(
    "family, ours, theirs, agreed",
    [(4, 1460, 536, 536), (4, 536, 1460, 536), (4, 1460, 0, 536), (6, 1460, 0, 1220),
     (4, 1460, 1, 88)],
)  # fmt: skip
def test_the_smaller_mss_counts(family, ours, theirs, agreed):
    """RFC 9293 3.7.1: 536 and 1220 where the option is missing; RFC 6928: ten of them."""
    host = Host()
    target = Target(1000, 1, ours, SECOND)
    session = Session(host, bytes(36), bytes(36), family, 0, Online(1000), target, 0)
    session.open(0)
    answer = ZERO._replace(tcp_flags=SYN | ACK, seq=5000, ack=1001, wnd=65535, mss=theirs)
    session.on_target_segment(answer, 1)
    assert target.mss == target.smss == agreed and target.cwnd == 10 * agreed


@pytest.mark.parametrize("wscale, used", [(0, 0), (7, 7), (14, 14), (255, 14)])
def test_the_targets_window_scale(wscale, used):
    """RFC 7323 2.3: 14 at most."""
    host = Host()
    target = Target(1000, 1, 1460, SECOND)
    target.options = OPT_WSCALE
    session = Session(host, bytes(36), bytes(36), 4, 0, Online(1000), target, 0)
    session.open(0)
    answer = ZERO._replace(tcp_flags=SYN | ACK, seq=5000, ack=1001, wnd=100, wscale=wscale)
    session.on_target_segment(answer._replace(options=OPT_WSCALE), 1)
    assert target.snd_wscale == used and target.snd_wnd == 100  # never scaled in a SYN
    session.on_target_segment(ZERO._replace(tcp_flags=ACK, seq=5001, ack=1001, wnd=100), 2)
    assert target.snd_wnd == 100 << used


def test_nothing_to_wait_for_is_never():
    _, session = established()
    assert session.state is State.ESTABLISHED and session.deadline_ns == NEVER


def test_the_end_is_told_once_and_lingers():
    host, session = established()
    host.calls.clear()
    session.end(Outcome.IDLE, Fate.DROPPED_IDLE, 5)
    assert host.calls == [("ended", Outcome.IDLE), ("linger", 5 + session.host.rules.time_wait_ns)]
    session.expire()
    assert host.calls[2:] == [("forget",)]


def test_a_hold_is_measured_from_the_capture():
    host, session = established()
    seg = ZERO._replace(tcp_flags=PSH | ACK, seq=1001, ack=1, time_ns=100, seg_len=1)
    session.on_client_segment(seg, b"x", 5_000_100)
    assert host.ledger.hold[2] == 1 and sum(host.ledger.hold) == 1
    assert host.ledger.counts[Count.ESTABLISHED] == 1


def test_a_hold_is_what_lies_between_capture_and_sending():
    """The clock has run for an hour: what counts is the difference."""
    host, session = established()
    captured_ns = 3600 * SECOND
    seg = ZERO._replace(tcp_flags=PSH | ACK, seq=1001, ack=1, time_ns=captured_ns, seg_len=1)
    session.on_client_segment(seg, b"x", captured_ns + 5_000_000)
    assert host.ledger.hold[2] == 1 and sum(host.ledger.hold) == 1


def test_functions_fit_a_screen():
    for path in Path(pycopy.session.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                code = {each.lineno for each in ast.walk(node) if hasattr(each, "lineno")}
                assert len(code) <= 45, f"{path.name}: {node.name}"
