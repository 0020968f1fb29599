"""Ends the run with one sentence where the machine is too busy for it, rather than with time-outs.

Tests have time limits, which only hangs are meant to breach. Where many others want the CPUs,
hundreds of tests fail of them, and nothing of what they say is true. What counts is what a
process gets: a machine may have a high load of what is nice and wait for nobody. So a short
computation is timed, at the start and after tests if the load is high or one of them has failed.
"""

import os
import time

import pytest

#: A load (processes that run or want to) for each CPU that the suite does not make itself: with
#: twice as many workers as CPUs it is 1 to 3, at times 4.
LOAD_MOST = 5.0
#: A computation that takes so many times its CPU time, where the load is high: time limits are
#: not to be believed. And where it is not, as the load average is behind by a minute, which is
#: the time limit of a test.
SLOWDOWN_MOST, SLOWDOWN_ALONE_MOST = 3.0, 6.0
PROBE_S = 0.1
#: All of so many must say so, a pause apart: every machine is busy for a moment.
PROBES, PAUSE_S = 3, 1.0
#: Not after every test: that would add to the load.
INTERVAL_S = 10.0


def slowdown():
    """How many times longer than its CPU time a computation of this process takes."""
    begin, cpu = time.perf_counter(), time.thread_time()
    while (used := time.thread_time() - cpu) < PROBE_S:
        pass
    return (time.perf_counter() - begin) / used


class Watch:
    """A plugin of the process that was started; with xdist it sees its workers' reports.

    ``load``: the load average of a minute; ``slowdown``: as above.
    """

    def __init__(self, load=lambda: os.getloadavg()[0], slowdown=slowdown, pause_s=PAUSE_S):
        self._load, self._slowdown, self._pause_s = load, slowdown, pause_s
        self._cpus = os.cpu_count() or 1  # the load is the whole machine's
        self._failed = False
        self._next_s = 0.0

    def pytest_sessionstart(self):
        self.look()

    def pytest_runtest_logreport(self, report):
        self._failed |= report.failed

    def pytest_runtest_logfinish(self):
        self.look()

    def look(self):
        """Ends the run (pytest.exit) if there is reason to look, and what is seen is bad."""
        now_s, loaded = time.monotonic(), self._load() > LOAD_MOST * self._cpus
        if now_s < self._next_s or not (self._failed or loaded):
            return
        self._failed, self._next_s = False, now_s + INTERVAL_S
        least = float("inf")
        for number in range(PROBES):
            time.sleep(self._pause_s if number else 0)
            least = min(least, self._slowdown())
            if least < (SLOWDOWN_MOST if loaded else SLOWDOWN_ALONE_MOST):
                return
        pytest.exit(
            f"this machine is too busy for tests with time limits: its load is {self._load():.1f} "
            f"on {self._cpus} CPUs, and what computes takes {least:.0f} times as long as it "
            "should. Run them again when it has less to do, or with --even-if-busy."
        )
