"""The seeds' own command lines, letter by letter, with the route rule they name."""

import os
import signal
import sys

import pytest

from pycopy.lab.copying import Placement

RANGE = "62.135.200.0/24"


def test_tcpcopys_example(scenario, lab):
    """-x 80-TARGET:8080 -s ASSISTANT -c 62.135.200.x, intercept -i DEV -F '...'."""
    run = scenario(Placement.ASSISTANT, 4, pool="62.135.200.x", pool_network=RANGE)
    target, assistant = lab.address("target", 4), lab.address("assistant", 4)
    replay, intercept = run.copying.replays[0], run.copying.intercepts[0]
    replay.arguments = [
        "replay", "-x", f"80-{target}:8080", "-s", assistant, "-c", "62.135.200.x", "--json",
    ]  # fmt: skip
    intercept.arguments = ["intercept", "-i", "eth0", "-F", "tcp and src port 8080", "--json"]
    run.start()
    run.load(1009, 101, short=31, rate=1000)
    run.finish()
    addresses = lab.run("target", ["ip", "route", "show", RANGE]).stdout
    assert f"via {assistant}" in addresses


def test_mapped_clients_leave_the_real_ones_alone(scenario, lab):
    """With a range, real clients of the target are answered while copies are taken."""
    # A response must find a next hop before it passes the hook; hosts have a default route.
    lab.route_through_assistant(RANGE)
    try:
        run = scenario(Placement.TARGET, 4, pool="62.135.200.x").start()
        copied = run.load(503, 101, wait=False, rate=500, id="copied")
        direct = run.load(
            101, 101, role="target", port=8080, wait=False, short=101, rate=100, id="direct"
        )
        run.checked(copied, 503)
        run.checked(direct, 101)
        assert run.eventually(lambda: run.copied_count() == 604)
        assert run.copying.stop().balanced
        assert run.copied().matching("id=copied").requests == run.asked().requests
        assert run.copied().matching("id=direct").count == 101
    finally:
        lab.route_through_assistant(RANGE, on=False)


@pytest.mark.parametrize("family", (4, 6))
def test_the_older_form(scenario, lab, family):
    """pycopy replay local_ip local_port remote_ip remote_port."""
    run = scenario(Placement.SELF, family)
    run.copying.replays[0].arguments = [
        "replay", lab.address("online", family), "80", lab.address("target", family), "8080",
        "--json",
    ]  # fmt: skip
    run.start()
    run.load(503, 101, short=31, rate=1000)
    run.finish()


def test_daemons(scenario, lab):
    """-d on both, as in the seeds: the command returns when copying has begun."""
    run = scenario(Placement.ASSISTANT, 4)
    pid_files = []
    lab.route_through_assistant(lab.prefix("client", 4))
    try:
        for program in run.copying.programs:
            pid_files.append(lab.state_dir / f"{program.role}.pid")
            ending = ["-d", "-P", str(pid_files[-1]), "-l", str(lab.state_dir / "daemon.log")]
            lab.run(program.role, [sys.executable, "-m", "pycopy", *program.arguments, *ending])
        run.load(503, 101, short=31, rate=1000)
        assert run.settle() == 503
        for pid_file in reversed(pid_files):
            pid = int(pid_file.read_text())
            os.kill(pid, signal.SIGTERM)
            assert run.eventually(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), 10)
            assert not pid_file.exists()
        assert run.copied().requests == run.asked().requests
        assert run.attached() == []
    finally:
        for pid_file in pid_files:
            if pid_file.exists():
                os.kill(int(pid_file.read_text()), signal.SIGKILL)
        lab.route_through_assistant(lab.prefix("client", 4), on=False)
