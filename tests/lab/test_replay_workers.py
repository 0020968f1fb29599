"""--workers: several processes, one run, one account of it."""

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from pycopy.lab.copying import Placement
from tests.lab.odd import Odd
from tests.lab.test_replay_start import refused

TWO = ("--workers", "2")
RANGE = "62.135.200.0/24"

self_and_target = pytest.mark.parametrize(
    "placement", [Placement.SELF, Placement.TARGET], ids=lambda one: one.value
)


def workers_of(program):
    """Process ids of its workers."""
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


def gone(pid):
    """Ended, whether or not somebody has taken note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def loads(run):
    run.load(1009, 23, rate=1000, id="keep", answers=(1, 1009, 10_007))
    run.load(503, 503, short=503, rate=500, id="short", answers=(1, 1009))


@pytest.mark.parametrize(
    ("placement", "family", "fast"),
    [
        (Placement.SELF, 4, True),
        (Placement.SELF, 6, True),
        (Placement.SELF, 4, False),
        (Placement.TARGET, 4, False),
        (Placement.TARGET, 6, False),
    ],
    ids=str,
)
def test_keep_alive_and_short_connections(scenario, placement, family, fast):
    options = () if fast or placement is not Placement.SELF else ("--no-fastpath",)
    run = scenario(placement, family, replay_arguments=(*TWO, *options)).start()
    program = run.copying.replays[0]
    pids = workers_of(program)
    assert len(pids) == 2
    loads(run)
    outcome = run.finish()
    ledger = outcome.replays[0]["ledger"]
    assert ledger["sessions"]["opened"] == 23 + 503
    assert ledger["process"]["workers"] == 0
    if fast:
        assert ledger["fastpath"]["kernel_percent"] > 90
    summaries = [json.loads(line)["event"] for line in program.output.splitlines()]
    assert summaries.count("summary") == 1
    assert all(map(gone, pids))
    said = Counter(program.messages.splitlines())
    assert max(said.values()) == 1, program.messages
    assert sum(line.startswith("ready: ") for line in said) == 1


def test_ranges_that_both_claim(scenario, lab):
    """Either gets every response, and leaves the other's alone."""
    run = scenario(
        Placement.ASSISTANT, 4, pool="62.135.200.x", pool_network=RANGE, replay_arguments=TWO
    ).start()
    loads(run)
    responses = run.finish().replays[0]["ledger"]["responses"]
    assert responses["other_workers"] > 0
    assert responses["unknown"] < responses["other_workers"] / 100


def test_clients_that_meet_in_one_address(scenario, lab):
    """All clients as one, whose ports the workers must not take from each other."""
    lab.route_through_assistant("62.135.200.7/32")
    try:
        run = scenario(
            Placement.TARGET, 4, servers=((80, "http"), (81, "http")), pool="62.135.200.7",
            replay_arguments=TWO,
        )  # fmt: skip
        target = lab.address("target", 4)
        run.copying.replays[0].arguments[2] = f"80-{target}:8080,81-{target}:8080"
        place = run.copying.intercepts[0].arguments.index("-F") + 1
        run.copying.intercepts[0].arguments[place] = "tcp and src port 8080"
        run.start()
        both = [run.load(503, 503, short=503, port=port, wait=False, id=f"p{port}", rate=500)
                for port in (80, 81)]  # fmt: skip
        for load in both:
            run.checked(load, 503)
        run.finish()
    finally:
        lab.route_through_assistant("62.135.200.7/32", on=False)


def test_one_more_port_for_a_connection_made_anew(scenario, lab):
    """A target that closes after each answer, kept addresses: every request a port of its own."""
    run = scenario(Placement.TARGET, 4, servers=((80, "http"),), replay_arguments=TWO)
    run.target[0].stop()
    run.target[0] = Odd(lab, "target", run.target[0].port, "closes")
    run.target[0].start()
    run.start()
    run.load(503, 23, rate=1000, answers=(1, 1009))
    run.settle()
    outcome = run.copying.stop()
    assert outcome.balanced
    assert not run.asked().lost(run.copied())
    assert outcome.replays[0]["ledger"]["sessions"]["reopened"] >= 503 - 23


@self_and_target
def test_a_worker_that_is_killed_ends_the_run(scenario, placement):
    run = scenario(placement, 4, replay_arguments=TWO).start()
    program = run.copying.replays[0]
    run.load(101, 23)
    run.settle()
    victim, other = workers_of(program)
    os.kill(victim, signal.SIGKILL)
    assert program.process.wait(timeout=20) == 1
    assert gone(other)
    last = program.messages.splitlines()[-1]
    assert last == "pycopy: error: worker 1 was killed by signal 9 (Killed)", program.messages
    summary = json.loads(program.output.splitlines()[-1])
    assert (summary["event"], summary["balanced"]) == ("summary", False)
    for intercept in run.copying.intercepts:
        intercept.stop()
    assert run.attached() == []


@self_and_target
def test_a_master_that_is_killed_takes_its_workers_along(scenario, placement):
    run = scenario(placement, 4, replay_arguments=TWO).start()
    program = run.copying.replays[0]
    run.load(101, 23)
    pids = workers_of(program)
    program.kill()
    assert run.eventually(lambda: all(map(gone, pids)), 10)
    for intercept in run.copying.intercepts:
        intercept.stop()
    assert run.attached() == []


def test_usr1_prints_the_sum_of_now(scenario):
    run = scenario(Placement.SELF, 4, replay_arguments=TWO).start()
    program = run.copying.replays[0]
    run.load(503, 23)
    program.process.send_signal(signal.SIGUSR1)
    assert run.eventually(lambda: '"summary"' in program.output)
    ledger = json.loads(program.output.splitlines()[-1])["ledger"]
    assert ledger["sessions"]["opened"] == 23
    assert ledger["process"]["workers"] == 2
    run.finish()


def test_the_same_signal_from_two_sides_still_drains(scenario):
    """As a service manager does it: to the workers and to their master."""
    run = scenario(Placement.SELF, 4, replay_arguments=TWO).start()
    run.load(503, 101, short=51, close="client")
    for pid in workers_of(run.copying.replays[0]):
        os.kill(pid, signal.SIGTERM)
    run.finish(settle=False)


def test_a_stopped_master_does_not_stop_its_workers(scenario):
    """As after Ctrl-Z: what they have to say waits, or is left out."""
    run = scenario(Placement.SELF, 4, replay_arguments=(*TWO, "--no-fastpath")).start()
    program = run.copying.replays[0]
    program.process.send_signal(signal.SIGSTOP)
    try:
        run.load(1009, 23, rate=500)
        run.settle()
        assert run.copied_count() == 1009
    finally:
        program.process.send_signal(signal.SIGCONT)
    run.finish()


def test_two_signals_end_all_at_once(scenario):
    run = scenario(
        Placement.SELF, 4, delay_s=5, servers=((80, "http"),), replay_arguments=TWO
    ).start()
    run.load(21, 7)
    program = run.copying.replays[0]
    pids = workers_of(program)
    program.process.send_signal(signal.SIGINT)
    # What is held for the target's answers keeps it.
    assert not run.eventually(lambda: program.process.poll() is not None, 0.5)
    begin_s = time.monotonic()
    program.process.send_signal(signal.SIGINT)
    assert program.process.wait(timeout=4) == 130
    assert time.monotonic() - begin_s < 2
    assert all(map(gone, pids))
    assert run.attached() == []


@pytest.mark.parametrize(
    ("arguments", "status", "cause"),
    [
        (["-x", "80-10.91.3.99:8080"], 1, "does not answer ARP"),
        (["-x", "80-10.91.3.10:8080", "-s", "10.91.4.10"], 1, "pycopy intercept"),
        (["-x", "80-10.91.3.10:8080", "-F", "tcp and and"], 2, "syntax"),
        (["-x", "80-10.91.3.10:8080", "--ports", "40000-40010"], 2, "ephemeral"),
        (["-x", "80-10.91.3.10:8080", "--ports", "20000-20000"], 2, "too few"),
    ],
)
def test_what_cannot_start_says_why_once(scenario, lab, arguments, status, cause):
    run = scenario(Placement.SELF, 4)
    ended, said = refused(lab, "online", "replay", *arguments, *TWO)
    assert (ended, said.count("pycopy: error: ")) == (status, 1), said
    assert cause in said
    assert run.attached() == []
