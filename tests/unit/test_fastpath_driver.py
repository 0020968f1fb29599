"""What the driver makes of the kernel's counters and of the run's choices; no kernel here."""

import random

import pytest

from pycopy import cli
from pycopy.fastpath.driver import HOLDING_NS, NOT_SENT, REST_NS, SWEEP_NS, TICK_NS, FastPath
from pycopy.fastpath.kernel import active
from pycopy.host.nexthop import Hop
from pycopy.kernel.abi import FAST_COUNTS, FastCount, Left
from pycopy.report.ledger import Ledger
from pycopy.session.fates import Count, Fate, ResponseFate
from pycopy.session.rules import Rules
from pycopy.session.states import Outcome

LINE = "-x 80-10.0.0.2:8080 --max-sessions 99"

#: Counters that stand nowhere in the ledger by themselves: they say how many sessions are the
#: kernel's now, and why others are not (ledger section "fastpath").
NOT_IN_THE_LEDGER = {FastCount.TAKEN, FastCount.GIVEN, FastCount.LEFT}


class Kernel:
    """Counters that a test sets, and what it was told."""

    def __init__(self):
        self.now = [0] * FAST_COUNTS
        self.pending, self.holding, self.told = False, False, []

    def counters(self):
        return list(self.now)

    def __getattr__(self, name):
        return lambda *args: self.told.append((name, *args)) or ()


class Table:
    rules = Rules()

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args: self.calls.append((name, *args))


class Hops:
    """The next hops of a test's own, each told of when it changes."""

    def __init__(self):
        self.hops, self.mss = {}, 1460

    def resolve(self, destination):
        if destination not in self.hops:
            self.hops[destination] = Hop(destination)
            self.hops[destination].usable = True
        return self.hops[destination]

    def path_mss(self, _):
        return self.mss


def fast_path(line, families=frozenset({4, 6})):
    """Over a ledger; nothing else is real."""
    hops = Hops()
    return FastPath(
        cli.replay_config(line.split()), Kernel(), Table(), Ledger(), hops, hops, families, ""
    )


@pytest.fixture
def make():
    """``make(more words of a command line)``: a fast path; what it told at the start is left out"""

    def one(*words):
        path = fast_path(" ".join((LINE, *words)))
        path._kernel.told.clear()
        return path

    return one


def grow(path, **counts):
    for name, number in counts.items():
        path._kernel.now[FastCount[name]] += number
    path._ledger.active = 0
    path.refresh()
    return path._ledger


def numbers(ledger):
    """Everything in the ledger that a counter can move."""
    return [
        *ledger.counts, *ledger.fates, *ledger.responses, *ledger.hold,
        *ledger.outcomes.values(), sum(ledger.send_errors.values()),
    ]  # fmt: skip


@pytest.mark.parametrize("count", FastCount, ids=lambda one: one.name)
def test_every_counter_stands_in_the_ledger_or_need_not(make, count):
    path = make()
    before = numbers(path._ledger)
    ledger = grow(path, **{count.name: 3})
    assert (numbers(ledger) == before) == (count in NOT_IN_THE_LEDGER)


def test_every_bucket_of_hold_times_and_every_reason(make):
    path = make()
    path._kernel.now = list(range(FAST_COUNTS))
    path.refresh()
    first = FastCount.HOLD_TIME
    assert path._ledger.hold == list(range(first, first + len(path._ledger.hold)))
    section = path._ledger.fastpath
    for left in Left:
        assert section[f"left_{left.name.lower()}"] == FastCount.LEFT + left
    assert section["sessions_taken"] == FastCount.TAKEN
    assert section["sessions_given"] == FastCount.GIVEN


def test_the_ledger_balances_as_the_kernel_does(make):
    path, noise = make(), random.Random(7)
    for _ in range(20):
        sent, held, steered, repeated = (noise.randrange(100) for _ in range(4))
        grow(
            path, CLIENT=sent + held + steered + repeated, SENT_AT_ONCE=sent, HELD=held,
            STEERED=steered, DUPLICATE=repeated, RELEASED=noise.randrange(held + 1),
            RESPONSES=steered + repeated, RESPONSES_STEERED=steered, RESPONSES_DUPLICATE=repeated,
        )  # fmt: skip
    ledger = path._ledger
    assert ledger.counts[Count.CAPTURED] == sum(ledger.fates)
    assert ledger.counts[Count.RESPONSES] == sum(ledger.responses)
    assert (
        ledger.fates[Fate.HELD]
        == path._kernel.now[FastCount.HELD] - (path._kernel.now[FastCount.RELEASED])
    )
    assert ledger.responses[ResponseFate.STEERED] == path._kernel.now[FastCount.RESPONSES_STEERED]


def test_counters_are_added_once(make):
    path = make()
    grow(path, OPENED=5, CLOSED=2, OUT_FAILED=3)
    ledger = grow(path, OUT_FAILED=1)
    assert ledger.counts[Count.SESSIONS] == 5 and ledger.outcomes[Outcome.CLOSED] == 2
    assert ledger.send_errors == {NOT_SENT: 4}
    assert ledger.active == 3


def test_sessions_of_the_kernels():
    counts = [0] * FAST_COUNTS
    for name, number in {"OPENED": 10, "GIVEN": 3, "TAKEN": 5, "CLOSED": 2}.items():
        counts[FastCount[name]] = number
    assert active(counts) == 6


def test_the_share_that_stayed_in_the_kernel(make):
    path = make()
    assert grow(path).fastpath["kernel_percent"] == 0.0
    path._ledger.counts[Count.CAPTURED] += 1
    section = grow(path, CLIENT=2, SENT_AT_ONCE=2, RESPONSES=1, RESPONSES_STEERED=1).fastpath
    assert (section["kernel_segments"], section["user_segments"]) == (3, 1)
    assert section["kernel_percent"] == 75.0
    assert "left_order" not in section


@pytest.mark.parametrize(("words", "closed"), [((), False), (("-r", "50"), True), (("-g",), True)])
def test_sampling_is_user_spaces(make, words, closed):
    """And so is everything while sessions may not be opened."""
    path = make(*words)
    path.refuse(False)
    path.after_turn(lambda: False)
    assert ("set_closed", closed) in path._kernel.told
    path.refuse(True)
    assert path._kernel.told[-1] == ("set_closed", True)


def test_what_is_unread_is_not_overtaken(make):
    """Opened again only when all is read; closed at once."""
    path = make()
    path.refuse(False)
    assert path._kernel.told == []
    path.after_turn(lambda: False)
    assert [what for what, *_ in path._kernel.told] == ["set_closed", "forget_disowned"]
    assert path._kernel.told[0] == ("set_closed", False)


def test_time_passes_faster_while_something_is_pending(make):
    path = make()
    path.on_timer(7)
    assert path.deadline_ns == 7 + REST_NS
    assert path._kernel.told == [("sweep",), ("on_timer",)]
    path._kernel.pending = True
    path.on_timer(8)
    assert path.deadline_ns == 8 + TICK_NS and len(path._kernel.told) == 3
    path._kernel.holding = True
    path.on_timer(9)
    assert path.deadline_ns == 9 + HOLDING_NS and len(path._kernel.told) == 4
    path.on_timer(7 + SWEEP_NS)
    assert path._kernel.told[4:] == [("sweep",), ("on_timer",)]
    assert path._table.calls[-1] == ("adopt_all", [], 7 + SWEEP_NS)


def test_the_end_of_the_run(make):
    path = make()
    path.stop(9)
    path.after_turn(lambda: False)
    assert path._kernel.told[:2] == [("set_closed", True), ("fetch_all",)]
    assert path._table.calls == [("adopt_all", [], 9), ("give_back",)]


def test_no_fastpath_is_an_option_of_replay():
    assert cli.replay_config(LINE.split()).fastpath
    assert not cli.replay_config([*LINE.split(), "--no-fastpath"]).fastpath


def test_where_no_response_reaches_the_kernel_it_has_no_session(make):
    path = make()
    path.set_relayed("nothing arrives")
    path.after_turn(lambda: False)
    assert path._kernel.told[0] == ("accept", frozenset())
    assert {call[1] for call in path._kernel.told if call[0] == "set_closed"} == {True}
    path._kernel.told.clear()
    path.set_relayed("")
    assert path._kernel.told == [("accept", {4, 6})]  # no more: a SYN may be unread
    path.after_turn(lambda: False)
    assert ("set_closed", False) in path._kernel.told


def told(path):
    """The services whose way was written since last asked, with port and whether allowed."""
    calls, path._kernel.told = path._kernel.told, []
    return [(call[1], call[4], call[6]) for call in calls if call[0] == "set_hop"]


THOUSANDS = "-x 1000-1999-10.0.0.2:1,3000-3999-10.0.0.3:7-7,80-[fd00::2]:9"


@pytest.fixture
def thousands():
    """Towards three targets: 1,000 services, 1,000 others, and one by IPv6."""
    path = fast_path(THOUSANDS)
    return path, [path._hops.resolve(addr) for addr in path._services_of]


def test_every_service_has_its_way_once(thousands):
    path, _ = thousands
    every = [*((n, 1 + n, True) for n in range(1000)), *((1000 + n, 7, True) for n in range(1000)),
             (2000, 9, True)]  # fmt: skip
    assert told(path) == every
    path.on_hop_change()
    assert told(path) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("ifindex", 9), ("l2", bytes(14)), ("usable", False), ("source", bytes(15) + b"\7")],
)
def test_a_change_of_one_hop_is_its_services_only(thousands, field, value):
    path, (_, second, last) = thousands
    told(path)
    setattr(last, field, value)
    path.on_hop_change(second)  # nothing that the programs know of has changed
    assert told(path) == []
    path.on_hop_change(last)
    assert told(path) == [(2000, 9, True)]
    path.on_hop_change(Hop(bytes(15) + b"\x63"))  # of another than the targets
    assert told(path) == []


def test_of_a_family_that_is_not_relayed_the_kernel_has_no_sessions():
    path = fast_path(THOUSANDS, frozenset({4}))
    assert ("accept", {4}) in path._kernel.told
    assert [allowed for _, _, allowed in told(path)] == [True] * 2000 + [False]


def test_what_concerns_all_services_is_told_of_those_it_changes(thousands):
    path, _ = thousands
    told(path)
    path.set_silenced(True)
    assert [allowed for _, _, allowed in told(path)] == [False] * 2001
    path.set_silenced(False)
    assert len(told(path)) == 2001
    path._egress.mss = 1400
    path.on_hop_change()
    assert len(told(path)) == 2001
