"""What is shown first, and that it fits: the live view's picture and the interval line."""

import pytest

from pycopy.kernel.abi import InterceptCount
from pycopy.report.ledger import Ledger
from pycopy.report.picture import familiar_line, picture, troubles
from pycopy.session.fates import Count, Fate


def a_ledger(*fates):
    ledger = Ledger()
    ledger.counts[Count.CAPTURED] = 1009
    ledger.counts[Count.SENT_SEGMENTS] = 15
    ledger.counts[Count.SYN] = 4
    ledger.counts[Count.ESTABLISHED] = 4
    ledger.counts[Count.RESPONSES] = 12
    ledger.active = 3
    for fate in fates:
        ledger.fates[fate] = 7
    return ledger


def texts(now, before=None, columns=79, rows=23):
    return [text for text, _ in picture("80-10.0.0.2:8080", 3723.9, now, before or now, 2.0,
                                        columns, rows)]  # fmt: skip


def test_an_interval_line_has_what_is_not_zero_under_familiar_names():
    line = familiar_line(a_ledger().snapshot())
    assert line == "all clt:1009, syn cnt:4, conns:4, resp:12, send:15, active:3"
    assert familiar_line(Ledger().snapshot()) == "nothing yet"


def test_an_interval_line_names_what_went_wrong_and_what_waits():
    ledger = a_ledger(Fate.HELD, Fate.DROPPED_GAP, Fate.REFUSED_MID_STREAM)
    ledger.kernel_capture[8] = 5
    line = familiar_line(ledger.snapshot())
    assert line.endswith("refused_mid_stream:7, dropped_gap:7, ring_full:5, held:7")


def test_an_interval_line_is_never_too_long():
    ledger = a_ledger(*Fate)
    line = familiar_line(ledger.snapshot())
    assert len(line) <= 160 - len("2026-01-01T00:00:00Z ")
    assert line.startswith("all clt:1009, ") and line.endswith(" more")


def test_a_full_ring_is_one_trouble_and_each_ring_has_its_own():
    ledger = a_ledger()
    ledger.kernel_capture[8] = 5
    assert [each.key for each in troubles(ledger.snapshot())] == ["ring_full"]
    ledger.kernel_intercept = [0] * len(InterceptCount)
    ledger.kernel_intercept[6] = 9
    wrong = troubles(ledger.snapshot())
    assert [each.name(wrong) for each in wrong] == [
        "kernel ring_full", "kernel_intercept ring_full",
    ]  # fmt: skip


def test_the_picture_begins_with_what_matters():
    lines = texts(a_ledger(Fate.HELD).snapshot(), Ledger().snapshot())
    assert lines[0].startswith("80-10.0.0.2:8080 ")
    assert lines[0].endswith(" 1:02:03  Ctrl-C ends")
    assert lines[1] == "nothing lost"
    assert [line.split() for line in lines[2:5]] == [
        ["captured", "1009", "504/s"], ["sent", "15", "8/s"], ["responses", "12", "6/s"],
    ]  # fmt: skip
    assert lines[5] == "active 3, established 4, held 7"


def test_the_picture_says_what_was_lost_before_all_else():
    now = a_ledger(Fate.DROPPED_GAP, Fate.REFUSED_MEMORY_LIMIT)
    now.send_errors["ENOBUFS"] = 3
    lines = texts(now.snapshot())
    assert lines[1] == "lost and refused"
    assert [line.split()[:2] for line in lines[2:5]] == [
        ["refused_memory_limit", "7"], ["dropped_gap", "7"], ["error_ENOBUFS", "3"],
    ]  # fmt: skip
    assert lines[5].startswith("captured")


@pytest.mark.parametrize(("columns", "rows"), [(79, 23), (40, 10), (200, 60), (20, 3), (5, 1)])
def test_the_picture_always_fits(columns, rows):
    everything = a_ledger(*Fate)
    everything.outcomes = dict.fromkeys(everything.outcomes, 10**9)
    everything.hold = [10**9] * len(everything.hold)
    for ledger in (Ledger(), everything):
        lines = texts(ledger.snapshot(), columns=columns, rows=rows)
        assert len(lines) <= rows
        assert max(map(len, lines)) <= columns
        assert columns < 20 or lines[0].endswith("Ctrl-C ends")


def test_an_intercept_has_a_picture_too():
    now = {
        "kernel": {"matched": 12, "passed": 2, "ring_full": 0},
        "responses": {"read": 10, "no_replay": 1},
        "copies": {"made": 9, "sent": 9, "dropped_slow": 2},
        "connections": {"replays": 1},
    }
    lines = texts(now)
    assert [line.split()[0] for line in lines[1:4]] == ["lost", "dropped_slow", "matched"]
    assert "replays 1" in lines
    assert any("responses no_replay" in line for line in lines)


def test_a_ledger_that_does_not_balance_is_said_first():
    assert texts({"responses": {"read": 1, "balanced": "no"}})[1] == "the ledger does not balance"
