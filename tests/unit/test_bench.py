"""The arithmetic of tests/bench, where a mistake would be a wrong claim. It measures nothing."""

import pytest

from pycopy.errors import UsageError
from tests.bench import catalogue, ceiling, check, report
from tests.bench.cell import Cell


def cells(replayer, kind, machine_us, *, stage="cost", own_us=0.0, load="keepalive", **more):
    return [
        Cell(
            replayer, kind, load, 4000, stage, number, requests=100, answered=100, online=100,
            machine_us=value, replay_us=own_us, **{"idle_share": 0.5, **more},
        )
        for number, value in enumerate(machine_us)
    ]  # fmt: skip


def run_of(pycopy_us, **more):
    """Five rounds in which the machine grows slower from one to the next."""
    drift = (0, 10, 20, 30, 40)
    return [
        *cells("none", "baseline", [50 + d for d in drift], p99_us=100),
        *cells("both", "floor", [130 + d for d in drift], load_us=40),
        *cells("tcpcopy@dear", "original", [150 + d for d in drift], own_us=70),
        *cells("tcpcopy@cheap", "original", [130 + d for d in drift], own_us=50),
        *cells("pycopy-self", "pycopy", [pycopy_us + d for d in drift], balanced=True, **more),
    ]


def group_of(run):
    return report.groups(run)["cost", "keepalive", 4000]


def test_ratios_are_taken_round_by_round():
    group = group_of(run_of(80, own_us=5, p99_us=105))
    assert list(group.added_us("pycopy-self").values()) == [30] * 5
    assert group.cheapest(group.added_us) == "tcpcopy@cheap"
    assert group.ratio("pycopy-self", group.added_us) == pytest.approx(30 / 80)
    assert group.ratio("pycopy-self", group.own_us) == pytest.approx(0.1)
    assert group.p99_ratio("pycopy-self") == pytest.approx(1.05)
    assert group.floor_us() == pytest.approx(40)


def test_a_round_without_its_pair_does_not_count():
    run = [one for one in run_of(80) if one.replayer != "none" or one.round != 3]
    assert list(group_of(run).added_us("pycopy-self")) == [0, 1, 2, 4]


def test_what_never_began_is_in_no_median():
    broken = Cell("pycopy-self", "pycopy", "keepalive", 4000, "cost", 5, problems=["no"])
    group = group_of([*run_of(80), broken])
    assert len(group.cells("pycopy-self")) == 5
    assert "pycopy-self" in report.table([*run_of(80), broken])


def verdicts(run, ceilings=()):
    return {line.what: line.passed for line in check.check(run, list(ceilings))}


def test_check_passes_and_fails_at_its_limits():
    title = "machine time added per request, to the original's, keepalive 4,000/s, pycopy-self"
    own = "own CPU per request, to the original's, keepalive 4,000/s, pycopy-self"
    assert verdicts(run_of(90, own_us=7.5))[title] is True
    assert verdicts(run_of(90, own_us=7.5))[own] is True
    assert verdicts(run_of(91, own_us=7.6))[title] is False
    assert verdicts(run_of(91, own_us=7.6))[own] is False


def test_fewer_rounds_are_no_pass():
    run = [one for one in run_of(60) if one.round < 4]
    assert not any(passed for what, passed in verdicts(run).items() if "machine time" in what)


def test_on_a_full_machine_nothing_that_was_added_is_a_pass():
    full, half = run_of(60, idle_share=0.01), run_of(60)
    assert any(passed for what, passed in verdicts(half).items() if "machine time" in what)
    assert not any(passed for what, passed in verdicts(full).items() if "machine time" in what)
    assert "30.0!" not in report.table(half) and "10.0!" in report.table(full)


def test_the_ledger_says_what_stayed_in_the_kernel():
    title = "segments that stay in the kernel, keepalive 4,000/s, pycopy-self"
    assert verdicts(run_of(60))[title] is None
    assert verdicts(run_of(60, kernel_segments=990, user_segments=10))[title] is True
    assert verdicts(run_of(60, kernel_segments=989, user_segments=11))[title] is False


def test_one_lost_request_fails():
    title = "0 lost and the ledger balanced in every cell, pycopy-self"
    run = run_of(60)
    assert verdicts(run)[title] is True
    run[-1].lost = 1
    assert verdicts(run)[title] is False
    assert verdicts([])["uploads of 1 MB back to back complete"] is None


@pytest.mark.parametrize(
    ("mine", "servers", "passed"),
    [(20_000, 90_000, True), (19_999, 90_000, False), (15_000, 15_500, True)],
)
def test_a_ceiling_is_twice_the_originals_or_the_servers_own(mine, servers, passed):
    found = [
        report.Ceiling(name, kind, "keepalive", number, rate, "")
        for number in range(5)
        for name, kind, rate in (
            ("none", "baseline", 100_000), ("both", "floor", servers),
            ("tcpcopy", "original", 10_000), ("pycopy-self", "pycopy", mine),
        )
    ]  # fmt: skip
    assert verdicts([], found)["highest rate without loss, keepalive, pycopy-self"] is passed


@pytest.mark.parametrize("limit", [130, 4_000, 5_555, 77_000])
@pytest.mark.parametrize("start", [1_000, 8_000, 60_000])
@pytest.mark.parametrize("step", [1.2, 2.0])
def test_the_search_finds_a_ceiling(limit, start, step):
    rate, reason = ceiling.search(lambda rate: "lost" if rate > limit else "", start, step)
    assert limit / (1 + ceiling.PRECISION) - 1 <= rate <= limit
    assert reason.endswith("lost")


def test_a_hiccup_is_no_ceiling():
    hiccups = iter([True])
    trial = lambda rate: "lost" if rate > 9_000 or next(hiccups, False) else ""  # noqa: E731
    assert ceiling.search(trial, 4_000)[0] > 8_500


def test_every_adapter_can_be_read():
    found = catalogue.read()
    assert {"none", "direct", "both", "pycopy-self-slow", "tcpcopy-pcap"} <= found.keys()
    slow = found["pycopy-assistant-slow"].programs
    assert [one.argv[-1] == "--no-fastpath" for one in slow] == [False, True]
    assert found["pycopy-assistant"].programs[1].argv[-1] != "--no-fastpath"


@pytest.mark.parametrize(
    "text",
    ['kind = "none"', 'kind = "floor"\nload_to = "moon"', 'kind = "other"\nspeed = 1',
     'kind = "other"\n[[program]]\nhost = "online"\npart = "third"\nargv = []'],
)  # fmt: skip
def test_a_wrong_adapter_is_named(tmp_path, text):
    (tmp_path / "odd.toml").write_text(f'name = "odd"\nabout = ""\n{text}\n')
    with pytest.raises(UsageError, match=r"odd\.toml"):
        catalogue.read(tmp_path)


def test_a_replayer_that_is_not_there_is_told(tmp_path):
    _, bad = catalogue.available({"mine": str(tmp_path)})
    assert bad["tcpcopy@mine"] == f"there is no tcpcopy in {tmp_path}"
    with pytest.raises(UsageError, match="there is no tcpcopy in"):
        catalogue.choose("none,tcpcopy@mine", {"mine": str(tmp_path)}, [])
