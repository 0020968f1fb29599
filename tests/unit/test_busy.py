"""When a run ends because the machine has no time for it, and when it does not."""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests import busy

CPUS = os.cpu_count()
HIGH, USUAL = 7 * CPUS, 2.5 * CPUS


def watch(load, *slowdowns):
    given = iter(slowdowns)
    return busy.Watch(lambda: load, lambda: next(given), pause_s=0)


def report(failed):
    return SimpleNamespace(failed=failed)


def test_a_busy_machine_ends_the_run_before_its_first_test():
    with pytest.raises(pytest.exit.Exception) as ended:
        watch(HIGH, 7, 6, 8).pytest_sessionstart()
    assert f"its load is {HIGH:.1f} on {CPUS} CPUs, and what computes takes 6 times" in str(ended)


@pytest.mark.parametrize("slowdowns", [(1.0,), (9, 2), (9, 9, 2.9)])
def test_a_load_that_takes_nothing_away_or_passes_does_not(slowdowns):
    one = watch(HIGH, *slowdowns)
    one.pytest_sessionstart()
    one.pytest_runtest_logfinish()  # it would ask for more: not so soon again


def test_a_usual_load_is_not_even_looked_at():
    one = watch(USUAL)
    one.pytest_sessionstart()
    one.pytest_runtest_logreport(report(failed=False))
    one.pytest_runtest_logfinish()


def test_a_failure_is_reason_to_look():
    one = watch(USUAL, 9, 9, 9)
    one.pytest_runtest_logreport(report(failed=True))
    with pytest.raises(pytest.exit.Exception, match="too busy"):
        one.pytest_runtest_logfinish()
    one = watch(USUAL, 5)  # such moments there are in every run
    one.pytest_runtest_logreport(report(failed=True))
    one.pytest_runtest_logfinish()


@pytest.mark.alone
def test_what_others_take_away_is_seen():
    """On one CPU, which six others want."""
    pin = f"import os; os.sched_setaffinity(0, {{{max(os.sched_getaffinity(0))}}})\n"
    probe = [sys.executable, "-c", f"{pin}from tests import busy; print(busy.slowdown())"]
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            burner = subprocess.Popen([sys.executable, "-c", f"{pin}while True: pass"])
            stack.callback(burner.wait)
            stack.callback(burner.kill)
        done = subprocess.run(
            probe, cwd=busy.__file__.rpartition("/tests/")[0], capture_output=True, text=True,
            timeout=50, check=True,
        )  # fmt: skip
    assert float(done.stdout) > busy.SLOWDOWN_MOST * 1.2
