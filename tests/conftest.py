"""What all tiers share: who may run what, and the verdict on tiers that did not run.

A tier is a directory of tests/. Fixtures of one tier belong into its own conftest.py.
"""

import os
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
#: Tiers that must exist; further directories with tests in them are tiers as well.
TIERS = {"unit", "bpf", "lab"}
NEED_ROOT = {"bpf", "lab"}

_passed = pytest.StashKey[Counter]()


def tier_of(path):
    return Path(path).relative_to(TESTS).parts[0]


def pytest_addoption(parser):
    parser.addoption(
        "--all-tiers", action="store_true", help="fail if in any tier of tests nothing passed"
    )


def pytest_configure(config):
    config.stash[_passed] = Counter()


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


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    outcome = yield
    report = outcome.get_result()
    if report.when == "call" and report.passed and TESTS in item.path.parents:
        item.config.stash[_passed][tier_of(item.path)] += 1


def _silent_tiers(config):
    tiers = TIERS | {path.parent.name for path in TESTS.glob("*/test_*.py")}
    return sorted(tier for tier in tiers if not config.stash[_passed][tier])


def pytest_sessionfinish(session, exitstatus):
    wanted = session.config.getoption("--all-tiers") and exitstatus == pytest.ExitCode.OK
    if wanted and _silent_tiers(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--all-tiers"):
        passed = config.stash[_passed]
        terminalreporter.write_line(
            "tiers: " + ", ".join(f"{tier} {passed[tier]} passed" for tier in sorted(passed))
        )
        for tier in _silent_tiers(config):
            terminalreporter.write_line(f"FAILED: in the tier {tier} nothing passed", red=True)
