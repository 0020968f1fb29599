"""A process that is stopped copies nothing, swallows nothing after a grace, and goes on later.

Which program lets what through after which time, tests/bpf/test_heartbeat.py has to the second;
what clients and the target see of it second by second, tests/kernels/still.py prints.
"""

import re
import signal
import time

import pytest

from pycopy.kernel.abi import GRACE_NS, LAPSE_NS
from pycopy.lab.copying import Placement

LAPSE_S, GRACE_S = LAPSE_NS / 1e9, GRACE_NS / 1e9


@pytest.fixture
def stopped():
    """Stop a program as Ctrl-Z would; whatever happens, it goes on in the end."""
    programs = []

    def stop(program):
        programs.append(program)
        program.process.send_signal(signal.SIGSTOP)

    yield stop
    for program in programs:
        if program.process.poll() is None:
            program.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("fast", [True, False], ids=["fast path", "user space"])
@pytest.mark.parametrize("placement", [Placement.SELF, Placement.TARGET], ids=lambda one: one.value)
def test_a_replay_that_is_stopped(scenario, placement, fast, stopped):
    run = scenario(placement, 4, replay_arguments=() if fast else ("--no-fastpath",)).start()
    run.load(101, 11, short=5, id="before")
    assert run.eventually(lambda: run.copied_count() == 101)
    replay = run.copying.replays[0]
    stopped(replay)
    time.sleep(LAPSE_S + 0.5)
    run.load(211, 23, short=11, id="meanwhile")  # served online as ever
    assert run.copied_count() == 101
    replay.process.send_signal(signal.SIGCONT)
    assert run.eventually(lambda: "stood still for" in replay.messages, 5)
    segments = int(re.search(r"(\d+) segments were not copied", replay.messages)[1])
    assert segments > 211
    run.load(101, 11, short=5, id="after")
    assert run.eventually(lambda: run.copied_count() >= 202)
    outcome = run.copying.stop()
    assert outcome.balanced, outcome
    ledger = outcome.replays[0]["ledger"]
    assert ledger["kernel"]["lapsed"] >= segments
    assert run.copied_count() == 202
    assert run.attached() == []


def test_an_intercept_that_is_stopped_lets_everything_through_in_the_end(scenario, stopped):
    """What it was to swallow, too: nothing of a process that hangs acts for ever."""
    run = scenario(Placement.TARGET, 4).start()
    run.load(101, 11, short=5)
    assert run.eventually(lambda: run.copied_count() == 101)
    intercept = run.copying.intercepts[0]
    stopped(intercept)
    begun = time.monotonic()
    # A connection to the target from where nobody claims: the programs' default is to swallow.
    command = [
        "curl",
        "-s",
        "-m",
        "1",
        "-o",
        "/dev/null",
        f"http://{run.lab.address('target', 4)}:8080/",
    ]
    outcomes = []
    while time.monotonic() - begun < GRACE_S + 6:
        result = run.lab.popen("client", command).wait(10) == 0
        outcomes.append((time.monotonic() - begun, result))
        if result:
            break
    assert outcomes[-1][1], outcomes
    assert not any(result for at_s, result in outcomes if at_s < GRACE_S - 1), outcomes
    intercept.process.send_signal(signal.SIGCONT)
    assert run.eventually(lambda: "stood still for" in intercept.messages, 5)
    outcome = run.copying.stop()
    assert outcome.balanced, outcome
    assert outcome.intercepts[0]["ledger"]["kernel"]["lapsed"] > 0
    assert run.attached() == []
