"""How replay starts and ends: hooks, memory, refusals, an interface that goes away."""

import json
import signal
import subprocess
import sys
import time

import pytest

from pycopy.lab.copying import Placement

MEMORY_LIMIT_KB = 40 * 1024


def resident_kb(pid):
    with open(f"/proc/{pid}/status") as status:
        return int(status.read().split("VmRSS:")[1].split()[0])


def refused(lab, role, *arguments):
    """Status and message of a command that must not start."""
    done = subprocess.run(
        ["ip", "netns", "exec", lab.namespace(role), sys.executable, "-m", "pycopy", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("family", [4, 6])
def test_xdp_by_choice(scenario, family):
    run = scenario(Placement.SELF, family, replay_arguments=("--hook", "xdp"))
    run.start()
    assert "native xdp" in run.copying.replays[0].messages
    run.load(211, 23, short=7, answers=(1, 10_007, 100_003))
    run.finish()


@pytest.mark.parametrize("placement", list(Placement), ids=lambda one: one.value)
def test_memory_at_start(scenario, placement):
    run = scenario(placement, 4).start()
    for program in run.copying.programs:
        assert resident_kb(program.pid) < MEMORY_LIMIT_KB, program
    run.load(11, 5)
    run.finish()


def test_without_i_the_service_is_found(scenario):
    run = scenario(Placement.SELF, 4)
    arguments = run.copying.replays[0].arguments
    at = arguments.index("-i")
    del arguments[at : at + 2]
    run.start()
    run.load(101, 23)
    run.finish()


def test_ports_of_the_users_own(scenario):
    run = scenario(Placement.SELF, 4, replay_arguments=("--ports", "20011-20040")).start()
    run.load(101, 101, concurrency=5, rate=200, short=101)
    run.finish()


def test_more_connections_than_ports_are_refused_and_counted(scenario):
    run = scenario(Placement.SELF, 4, replay_arguments=("--ports", "20011-20013")).start()
    load = run.load(61, 7, concurrency=7)
    assert load["ok"]
    outcome = run.copying.stop()
    segments = outcome.replays[0]["ledger"]["segments"]
    assert outcome.balanced
    assert segments["refused_no_address"] > 0


@pytest.mark.parametrize(
    ("arguments", "status", "cause"),
    [
        (["-x", "80-10.91.3.10:8080", "-i", "eth7"], 2, "no such network device"),
        (["-x", "80-10.91.2.10:80"], 4, "this host itself"),
        (["-x", "80-no-such-host.invalid:80"], 2, "cannot resolve"),
        (["-x", "80-8.8.8.8:80"], 4, "public internet address"),
        (["-x", "80-10.91.3.99:8080"], 1, "does not answer ARP"),
        (["-x", "80-10.91.3.10:8080", "-s", "10.91.4.10"], 1, "pycopy intercept"),
        (["-x", "80-10.91.3.10:8080", "-F", "tcp and and"], 2, "syntax"),
        (["-x", "80-10.91.3.10:8080", "--ports", "40000-40010"], 2, "ephemeral"),
        (["-x", "80-10.91.3.10:8080", "--no-such-option"], 2, "--no-such-option"),
        (["-x", "80-10.91.3.10:8080", "-n", "3"], 2, "-n"),
    ],
)
def test_what_cannot_start_says_why_and_leaves_nothing(scenario, lab, arguments, status, cause):
    run = scenario(Placement.SELF, 4)
    ended, said = refused(lab, "online", "replay", *arguments)
    assert (ended, cause in said) == (status, True), said
    lines = [line for line in said.splitlines() if not line.startswith("still ")]
    assert lines[0].startswith("pycopy: error: ")
    assert len(lines) >= 2  # the cure
    assert run.attached() == []


def test_an_interface_that_goes_away_ends_replay_with_a_reason(scenario, lab):
    run = scenario(Placement.SELF, 4)
    # A device of its own, so that the lab keeps eth0.
    lab.run("online", ["ip", "link", "add", "gone0", "type", "veth", "peer", "name", "gone1"])
    lab.run("online", ["ip", "link", "set", "gone0", "up"])
    program = run.copying.replays[0]
    program.arguments[program.arguments.index("-i") + 1] = "gone0"
    run.start()
    lab.run("online", ["ip", "link", "del", "gone0"])
    assert program.process.wait(timeout=10) == 1
    assert "gone0 is gone" in program.messages
    # Accounts first, then the error.
    summary = json.loads(program.output.splitlines()[-1])
    assert (summary["event"], summary["balanced"]) == ("summary", True)
    last = program.messages.splitlines()[-2:]
    assert last[0] == "pycopy: error: every interface that was captured is gone"
    assert run.attached() == []


def test_usr1_prints_the_ledger_while_it_runs(scenario):
    run = scenario(Placement.SELF, 4)
    program = run.copying.replays[0]
    program.arguments.remove("--json")
    run.start()
    run.load(101, 23)
    program.process.send_signal(signal.SIGUSR1)
    assert run.eventually(lambda: "all clt" in program.messages, 5)
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(timeout=20) == 0
    assert program.messages.endswith("ledger balanced: yes\n")


def test_two_signals_end_it_at_once(scenario):
    run = scenario(Placement.SELF, 4, delay_s=5, servers=((80, "http"),)).start()
    load = run.load(7, 7, wait=False, concurrency=7)
    program = run.copying.replays[0]
    time.sleep(0.5)
    begin_s = time.monotonic()
    program.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    program.process.send_signal(signal.SIGINT)
    program.process.wait(timeout=10)
    assert time.monotonic() - begin_s < 2
    assert run.attached() == []
    load.result()
