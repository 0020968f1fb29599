"""What all tiers share: who may run what, and the verdict on tiers that did not run.

A tier is a directory of tests/. Fixtures of one tier belong into its own conftest.py; how
tests share the machine with each other is in tests/together.py, with others in tests/busy.py.
"""

import os
from collections import Counter
from pathlib import Path

import hypothesis
import pytest

from tests import busy, together

TESTS = Path(__file__).parent
#: Tiers that must exist; further directories with tests in them are tiers as well.
TIERS = {"unit", "bpf", "lab"}
NEED_ROOT = {"bpf", "lab"}

#: Tests that passed, by tier; counted where the reports arrive, which workers only send.
_passed = Counter()


def tier_of(path):
    return Path(path).relative_to(TESTS).parts[0]


def pytest_addoption(parser):
    parser.addoption(
        "--all-tiers", action="store_true", help="fail if in any tier of tests nothing passed"
    )
    parser.addoption(
        "--no-fastpath", action="store_true",
        help="the lab tier with every replay's fast path off, without what tests the fast path",
    )  # fmt: skip
    parser.addoption(
        "--even-if-busy",
        action="store_true",
        help="do not end the run on a busy machine",
    )
    parser.addoption(
        "--transport", choices=("ring", "perf"), help="the lab tier with records by that way"
    )


def pytest_configure(config):
    shared = getattr(config, "workerinput", None)
    config.pluginmanager.register(together.Worker(shared) if shared else together.Controller())
    if shared is None and not config.getoption("--even-if-busy"):
        config.pluginmanager.register(busy.Watch())
    together.interrupt_once()
    # How long an example took says how busy the machine was.
    hypothesis.settings.register_profile("shared", deadline=None)
    hypothesis.settings.load_profile("shared")


def pytest_collection_modifyitems(items):
    if os.geteuid() == 0:
        return
    for item in items:
        if TESTS in item.path.parents and tier_of(item.path) in NEED_ROOT:
            item.add_marker(pytest.mark.skip(reason="needs root: sudo ./contrib/setup test"))


@pytest.fixture
def root():
    """For the single test that needs root in a tier that does not."""
    if os.geteuid() != 0:
        pytest.skip("needs root: sudo ./contrib/setup test")


def pytest_runtest_logreport(report):
    path = TESTS.parent / report.location[0]
    if report.when == "call" and report.passed and TESTS in path.parents:
        _passed[tier_of(path)] += 1


def _silent_tiers():
    tiers = TIERS | {path.parent.name for path in TESTS.glob("*/test_*.py")}
    return sorted(tier for tier in tiers if not _passed[tier])


def pytest_sessionfinish(session, exitstatus):
    wanted = session.config.getoption("--all-tiers") and exitstatus == pytest.ExitCode.OK
    if wanted and not hasattr(session.config, "workerinput") and _silent_tiers():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--all-tiers"):
        terminalreporter.write_line(
            "tiers: " + ", ".join(f"{tier} {_passed[tier]} passed" for tier in sorted(_passed))
        )
        for tier in _silent_tiers():
            terminalreporter.write_line(f"FAILED: in the tier {tier} nothing passed", red=True)
