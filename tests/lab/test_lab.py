"""The lab without pycopy: its hosts, servers and load are what every other lab test trusts."""

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from pycopy import lab as lab_commands
from pycopy.errors import PycopyError, UsageError
from pycopy.lab import offloads, processes
from pycopy.lab.copying import LoadRun
from pycopy.lab.servers import Nginx
from pycopy.lab.topology import DEVICE, SWITCH, Lab, environment
from tests.lab.conftest import Resets
from tests.lab.exact import Exact

FAMILIES = (4, 6)
ETHTOOL_GGSO = 0x23


def unique(suffix):
    return f"pycopy-test-{os.getpid()}-{suffix}"


def connects(lab, source, destination, family, port):
    """Whether a TCP handshake completes, from each role's own primary address."""
    with lab.inside(source):
        sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6)
    with sock:
        sock.settimeout(0.5)
        with contextlib.suppress(OSError):
            sock.bind((lab.address(source, family), 0))
            return sock.connect_ex((lab.address(destination, family), port)) == 0
    return False


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stray_response_is_noticed(lab, family):
    """The target speaks to a port of the client that is none: the client's kernel resets it."""
    resets = Resets(lab, "client")
    assert not connects(lab, "client", "target", family, 9)  # of the target's, not the client's
    assert resets.count() == 0
    assert not connects(lab, "target", "client", family, 9)
    assert resets.count() == 1
    resets.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_host_reaches_every_other(lab, family):
    with Nginx(lab, "online", 80), Nginx(lab, "target", 8080), Nginx(lab, "assistant", 80):
        for source in lab.roles:
            for destination, port in (("online", 80), ("target", 8080), ("assistant", 80)):
                assert connects(lab, source, destination, family, port), (source, destination)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_route_leads_responses_to_the_assistant(lab, family):
    """Dropped there without ip_forward, delivered with it, direct without the route."""
    with Nginx(lab, "target", 8080):
        lab.route_through_assistant(lab.prefix("client", family))
        try:
            assert not connects(lab, "client", "target", family, 8080)
            assert connects(lab, "online", "target", family, 8080)
            lab.set_forwarding(True)
            assert connects(lab, "client", "target", family, 8080)
        finally:
            lab.set_forwarding(False)
            lab.route_through_assistant(lab.prefix("client", family), on=False)
        assert connects(lab, "client", "target", family, 8080)


def test_the_seeds_route_command_is_accepted_as_it_stands(lab):
    assistant = lab.address("assistant", 4)
    lab.run("target", ["ip", "route", "add", "62.135.200.0/24", "via", assistant])
    lab.run("target", ["ip", "route", "delete", "62.135.200.0/24"])


@pytest.mark.parametrize("family", FAMILIES)
def test_load_and_nginx_agree(lab, family):
    with Nginx(lab, "online", 80, [1, 1009, 100_003]) as nginx:
        load = LoadRun(
            lab, family, "online", 80, "--requests", "1009", "--connections", "101",
            "--short", "31", "--answers", "1,1009,100003", "--id", "agree",
        )  # fmt: skip
        result = load.result()
        assert result["ok"], result
        served = nginx.served()
        assert served.count == nginx.count() == 1009
        assert served.connections.total() == 101
        assert sum("id=agree" in request for request in served.requests) == 1009
        nginx.forget()
        assert nginx.count() == 0


@pytest.mark.parametrize("protocol", ["http", "line"])
@pytest.mark.parametrize("close", ["server", "client", "reset"])
def test_load_and_the_exact_server_agree(lab, protocol, close):
    with Exact(lab, "online", 81, protocol) as server:
        load = LoadRun(
            lab, 4, "online", 81, "--requests", "211", "--connections", "23", "--close", close,
            "--protocol", protocol, "--answers", "0,1,100003", "--uploads", "0,1,1009,1000003",
        )  # fmt: skip
        assert load.result()["ok"]
        quits = 23 if (protocol, close) == ("line", "server") else 0
        assert server.served().count == 211 + quits
        deadline = time.monotonic() + 2
        while server.served().connections.total() < 23 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.served().connections.total() == 23


def test_equal_answers_have_equal_digests_and_others_do_not(lab):
    with Nginx(lab, "online", 80, [1, 1009]):
        runs = [
            LoadRun(lab, 4, "online", 80, "--requests", "101", "--answers", sizes).result()
            for sizes in ("1,1009", "1,1009", "1009")
        ]
        assert all(run["ok"] for run in runs)
        assert runs[0]["answers_sha256"] == runs[1]["answers_sha256"]
        assert runs[0]["answers_sha256"] != runs[2]["answers_sha256"]


def test_load_reports_what_the_server_did_wrong(lab):
    refused = LoadRun(lab, 4, "online", 83, "--requests", "23", "--connections", "7").result()
    assert not refused["ok"] and refused["errors"] == {"connection refused": 7}
    with Nginx(lab, "online", 80, [1]):
        missing = LoadRun(
            lab, 4, "online", 80, "--requests", "7", "--connections", "7", "--answers", "1009"
        ).result()
        assert not missing["ok"] and missing["requests"] == 0
        assert any("404" in error for error in missing["errors"])


def test_load_keeps_a_constant_rate_and_its_time_limit(lab):
    with Nginx(lab, "online", 80, [1009]) as nginx:
        load = LoadRun(
            lab, 4, "online", 80, "--requests", "503", "--connections", "503", "--short", "503",
            "--rate", "1000",
        )  # fmt: skip
        result = load.result()
        assert result["ok"] and 0.45 < result["seconds"] < 2
        os.kill(nginx.pid, signal.SIGSTOP)
        with lab.inside("online"):
            workers = subprocess.run(
                ["ps", "--ppid", str(nginx.pid), "-o", "pid="], capture_output=True, text=True
            ).stdout.split()
        try:
            for worker in workers:
                os.kill(int(worker), signal.SIGSTOP)
            load = LoadRun(
                lab, 4, "online", 80, "--requests", "7", "--connections", "7",
                "--time-limit", "0.5",
            )  # fmt: skip
            stuck = load.result(timeout_s=5)
            assert stuck["errors"] == {"unfinished at the time limit": 7}
        finally:
            for pid in (*workers, nginx.pid):
                os.kill(int(pid), signal.SIGCONT)


def test_two_labs_do_not_meet_and_leave_nothing():
    with Lab(unique("a"), mtu=1400, offloads=False) as first, Lab(unique("b")) as second:
        with Nginx(first, "online", 80):
            assert connects(first, "client", "online", 4, 80)
            assert not connects(second, "client", "online", 4, 80)
        for lab, large in ((first, False), (second, True)):
            for role, device in (("client", DEVICE), ("target", DEVICE), (SWITCH, "online")):
                with lab.inside(role):
                    assert bool(offloads.ethtool(device, ETHTOOL_GGSO, 0)) is large
        shown = first.run("online", ["ip", "link", "show", DEVICE]).stdout
        assert "mtu 1400" in shown
    assert not first.exists() and not second.exists()
    assert not first.state_dir.exists()


def test_a_role_may_have_cpus_of_its_own():
    """Its processes run there, and what others send it is received there."""
    last = max(os.sched_getaffinity(0))
    with Lab(unique("cpus"), cpus={"target": [last]}) as lab:
        for role, wanted in (("target", {last}), ("online", os.sched_getaffinity(0))):
            sleeper = lab.popen(role, ["sleep", "60"])
            assert os.sched_getaffinity(sleeper.pid) == wanted
        mask = "cat /sys/class/net/eth0/queues/rx-0/rps_cpus"
        assert int(lab.run("target", ["sh", "-c", mask]).stdout.replace(",", ""), 16) == 1 << last
        assert int(lab.run("online", ["sh", "-c", mask]).stdout.replace(",", ""), 16) == 0


def test_a_failure_while_building_leaves_nothing(monkeypatch):
    lab = Lab(unique("broken"))
    monkeypatch.setattr(lab, "_configure_host", lambda _role: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lab.up()
    assert not lab.exists()


def test_down_ends_what_was_started_inside_even_from_another_process():
    lab = Lab(unique("down"))
    lab.up()
    try:
        child = lab.popen("client", ["sh", "-c", "sleep 97 & sleep 97"])
        with pytest.raises(PycopyError, match="exists already"):
            Lab(lab.name).up()
        removed = Lab(lab.name).down()
        assert f"process {child.pid}" in removed
        assert child.wait(timeout=5) == -signal.SIGKILL
        assert not lab.exists()
        assert Lab(lab.name).down() == []
    finally:
        lab.down()


def pycopy_lab(*argv):
    return subprocess.run(
        [sys.executable, "-m", "pycopy", "lab", *argv],
        capture_output=True, text=True, timeout=30, env=environment(),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["", "..", ".", "../x", "/tmp/x", "-x", "a/b", "a b", "x" * 65])
def test_names_that_are_more_than_a_name_are_refused(name, tmp_path):
    (tmp_path / "precious").touch()
    for wrong in (name, str(tmp_path)):
        with pytest.raises(UsageError, match="cannot be the name of a lab"):
            Lab(wrong)
    done = pycopy_lab(f"--name={tmp_path}", "down")
    assert (done.returncode, done.stdout) == (2, "")
    assert (tmp_path / "precious").exists()


def test_removing_a_lab_that_is_not_there():
    name = unique("absent")
    for action in (["down"], ["status"], ["exec", "client", "true"]):
        done = pycopy_lab("--name", name, *action)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"pycopy: error: there is no lab named {name}\n")


def test_the_way_out_names_the_lab_that_is_meant():
    name = unique("cure")
    with Lab(name):
        done = pycopy_lab("--name", name, "up")
        assert done.returncode == 1
        assert f"exists already, in use by process {os.getpid()}" in done.stderr
        assert f"pycopy lab --name {name} down" in done.stderr
    assert Lab().command("down") == "pycopy lab down"


def build_and_hold(name, results, release):
    try:
        with Lab(name) as lab:
            results.put(("built", len(list(lab._namespaces_found()))))
            release.wait(20)
            results.put(("held", len(list(lab._namespaces_found()))))
    except PycopyError as error:
        results.put(("refused", error.cause))


def test_of_two_at_once_one_gets_the_name_and_keeps_it():
    """The loser must not take down what the winner is building."""
    name = unique("twice")
    context = multiprocessing.get_context("spawn")
    results, release = context.Queue(), context.Event()
    both = [context.Process(target=build_and_hold, args=(name, results, release)) for _ in range(2)]
    try:
        for one in both:
            one.start()
        first, second = sorted(results.get(timeout=20) for _ in range(2))
        assert first == ("built", 5)
        assert second[0] == "refused" and f"a lab named {name} exists already" in second[1]
        release.set()
        assert results.get(timeout=20) == ("held", 5)
        for one in both:
            one.join(20)
            assert one.exitcode == 0
        assert not Lab(name).exists()
    finally:
        for one in both:
            if one.is_alive():
                one.kill()
        Lab(name).down()


def test_a_namespace_of_somebody_else_is_left_alone():
    name = unique("foreign")
    lab = Lab(name)
    subprocess.run(["ip", "netns", "add", f"{name}-target"], check=True)
    try:
        with pytest.raises(PycopyError, match=f"{name}-target already, of no lab"):
            lab.up()
        assert not lab.is_built()
        assert pycopy_lab("--name", name, "down").returncode == 1
        assert list(lab._namespaces_found()) == ["target"]
    finally:
        subprocess.run(["ip", "netns", "delete", f"{name}-target"], check=True)


def test_down_ends_what_exec_left_in_the_background():
    name = unique("background")
    lab = Lab(name)
    bystander = subprocess.Popen(["sleep", "97"])
    lab.up()
    try:
        code = "trap '' TERM; sleep 97 & sleep 97 & echo $! $$; wait"
        child = subprocess.Popen(
            [sys.executable, "-m", "pycopy", "lab", "--name", name, "exec", "online",
             "sh", "-c", code],
            stdout=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        pids = [int(word) for word in child.stdout.readline().split()]
        child.stdout.close()
        removed = lab.down()
        for pid in pids:
            assert f"process {pid}" in removed
            assert not processes.is_alive(pid)
        assert child.wait(timeout=5) == -signal.SIGKILL
        assert bystander.poll() is None
    finally:
        lab.down()
        bystander.kill()
        bystander.wait()


def test_a_lab_is_not_removed_from_one_of_its_hosts():
    name = unique("within")
    with Lab(name) as lab:
        argv = [sys.executable, "-m", "pycopy", "lab", "--name", name, "down"]
        done = pycopy_lab("--name", name, "exec", "client", *argv)
        assert done.returncode == 1
        assert "cannot remove the lab around it" in done.stderr
        assert len(list(lab._namespaces_found())) == 5


def test_exec_gives_the_status_of_the_command(tmp_path):
    name = unique("status")
    (tmp_path / "text").touch()
    with Lab(name):
        for argv, status in (
            (["true"], 0),
            (["sh", "-c", "exit 7"], 7),
            (["no-such-command"], 127),
            ([str(tmp_path / "no-such-file")], 127),
            ([str(tmp_path / "text")], 126),
        ):
            done = pycopy_lab("--name", name, "exec", "client", *argv)
            assert done.returncode == status, argv
            assert "Traceback" not in done.stderr
        done = pycopy_lab("--name", name, "exec", "switch", "true")
        assert done.returncode == 2
        assert "the lab has no host 'switch'" in done.stderr


def test_a_lab_whose_builder_was_killed_ends_its_processes_and_is_built_anew():
    name = unique("stale")
    code = (
        "import os, signal; from pycopy.lab.topology import Lab\n"
        f"with Lab({name!r}) as lab:\n"
        "    lab.popen('client', ['sleep', '97'])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    try:
        assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
        assert Lab(name).exists()
        (pid,) = (Lab(name).state_dir / "processes").read_text().split()[:1]
        deadline = time.monotonic() + 2
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not os.path.exists(f"/proc/{pid}")
        with Lab(name) as lab:
            assert connects(lab, "client", "online", 4, 80) is False
    finally:
        Lab(name).down()


def test_commands(capfd):
    name = unique("cli")
    try:
        with pytest.raises(PycopyError, match="there is no lab"):
            lab_commands.command("status", None, [], name)
        assert lab_commands.command("up", None, [], name) == 0
        up = capfd.readouterr().out
        assert "10.91.2.10" in up and f"{name}-online" in up
        assert lab_commands.command("status", None, [], name) == 0
        assert capfd.readouterr().out == up
        with pytest.raises(UsageError, match="no host 'nobody'"):
            lab_commands.command("exec", "nobody", ["true"], name)
        with pytest.raises(UsageError, match="nothing to run"):
            lab_commands.command("exec", "client", [], name)
        code = (
            "from pycopy import lab;"
            f"lab.command('exec', 'target', ['ip', '-o', 'address'], {name!r})"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "10.91.3.10/24" in result.stdout
    finally:
        assert lab_commands.command("down", None, [], name) == 0
    assert not Lab(name).exists()
