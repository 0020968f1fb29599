"""What replay says, and to whom: nobody who does not listen may hold it up or end it."""

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pycopy.lab.copying import Placement

ROOT = Path(__file__).resolve().parents[2]

#: Becomes a command whose controlling terminal is its stdin.
WITH_TERMINAL = (
    "import fcntl, os, sys, termios\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "os.execvp(sys.argv[1], sys.argv[1:])\n"
)


class Spawned:
    """The replay of a scenario, started with streams of the test's choice."""

    def __init__(self, run, tmp_path, *, stderr, stdin=subprocess.DEVNULL, prefix=(), extra=()):
        self.out = tmp_path / "out"
        command = [sys.executable, "-m", "pycopy", *run.copying.replays[0].arguments, *extra]
        with self.out.open("wb") as out:
            self.process = run.lab.popen(
                "online", [*prefix, *command], stdin=stdin, stdout=out, stderr=stderr
            )

    def documents(self):
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    def ended(self, status=0, timeout_s=20):
        assert self.process.wait(timeout_s) == status
        last = self.documents()[-1]
        assert (last["event"], last["balanced"]) == ("summary", True)
        return last


@pytest.fixture
def spawn(tmp_path):
    """``spawn(run, ...)``: a :class:`Spawned`, ended in any case."""
    made = []

    def make(run, **options):
        made.append(Spawned(run, tmp_path, **options))
        # It may have no way to say that it is ready.
        assert run.eventually(
            lambda: run.load(1, 1) and run.eventually(lambda: run.copied_count() > 0, 0.5), 30
        )
        return made[-1]

    yield make
    for spawned in made:
        spawned.process.kill()
        spawned.process.wait()


def full_pipe():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(65536))
    os.set_blocking(writer, True)
    return reader, writer


def copied_whole(run, number, **options):
    before = run.copied_count()
    run.load(number, 23, **options)
    assert run.eventually(lambda: run.copied_count() == before + number)


def copies_all(run, number):
    before = run.copied_count()
    run.load(number, number)
    return run.eventually(lambda: run.copied_count() == before + number, 1)


@pytest.mark.parametrize("words", [(), ("--interval", "0.1")], ids=["json", "text"])
def test_stderr_is_a_full_pipe(scenario, spawn, words):
    run = scenario(Placement.SELF, 4)
    if words:
        run.copying.replays[0].arguments.remove("--json")
    reader, writer = full_pipe()
    try:
        spawned = spawn(run, stderr=writer, extra=words)
        copied_whole(run, 211)
        for _ in range(3):
            spawned.process.send_signal(signal.SIGUSR1)
            copied_whole(run, 211)
        spawned.process.send_signal(signal.SIGTERM)
        if words:
            assert spawned.process.wait(20) == 0
        else:
            spawned.ended()
    finally:
        os.close(reader)
        os.close(writer)
    assert run.attached() == []


@pytest.mark.parametrize("how", ["no reader", "closed"])
def test_stderr_is_closed(scenario, spawn, how):
    run = scenario(Placement.SELF, 4)
    reader, writer = os.pipe()
    os.close(reader)
    prefix = ("sh", "-c", 'exec "$@" 2>&-', "sh") if how == "closed" else ()
    spawned = spawn(run, stderr=writer, prefix=prefix)
    os.close(writer)
    copied_whole(run, 211)
    spawned.process.send_signal(signal.SIGUSR1)
    copied_whole(run, 211)
    spawned.process.send_signal(signal.SIGTERM)
    spawned.ended()
    assert run.attached() == []


def test_a_terminal_that_goes_away_ends_it_as_sigterm_would(scenario, spawn):
    run = scenario(Placement.SELF, 4)
    ours, terminal = pty.openpty()
    spawned = spawn(
        run, stdin=terminal, stderr=terminal,
        prefix=(sys.executable, "-c", WITH_TERMINAL),
    )  # fmt: skip
    os.close(terminal)
    copied_whole(run, 211)
    # Hung up by hand, the terminal still being there: nothing happens.
    spawned.process.send_signal(signal.SIGHUP)
    copied_whole(run, 211)
    os.close(ours)
    spawned.ended()
    assert run.attached() == []


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_drains(scenario, spawn, workers):
    """It reaches everybody on the terminal, and must count once all the same."""
    run = scenario(Placement.SELF, 4)
    ours, terminal = pty.openpty()
    spawned = spawn(
        run, stdin=terminal, stderr=terminal, extra=("--workers", workers),
        prefix=(sys.executable, "-c", WITH_TERMINAL),
    )  # fmt: skip
    os.close(terminal)
    # One request copied says that one worker is ready: some connections are the other's.
    assert run.eventually(lambda: copies_all(run, 23), 30)
    copied_whole(run, 211)
    os.write(ours, b"\x03")
    spawned.ended()
    os.close(ours)
    assert run.attached() == []


def test_a_held_terminal_does_not_stop_copying(scenario, spawn):
    """As after Ctrl-S: the live view and every message are stuck; copying is not."""
    run = scenario(Placement.SELF, 4)
    run.copying.replays[0].arguments.remove("--json")
    ours, terminal = pty.openpty()
    environment = ("env", "TERM=xterm")
    spawned = spawn(run, stderr=terminal, prefix=environment)
    os.close(terminal)
    until_s = time.monotonic() + 2  # the view fills the terminal's buffer
    while time.monotonic() < until_s:
        copied_whole(run, 101)
        spawned.process.send_signal(signal.SIGUSR1)
    copied_whole(run, 211)
    spawned.process.send_signal(signal.SIGTERM)
    assert spawned.process.wait(20) == 0
    os.close(ours)
    assert run.attached() == []


def test_usr1_prints_the_ledger_where_the_summary_goes(scenario, spawn, tmp_path):
    run = scenario(Placement.SELF, 4)
    said = tmp_path / "said"
    with said.open("wb") as stderr:
        spawned = spawn(run, stderr=stderr)
    copied_whole(run, 101)
    spawned.process.send_signal(signal.SIGUSR1)
    assert run.eventually(lambda: spawned.documents(), 5)
    (document,) = spawned.documents()
    assert (document["event"], document["balanced"]) == ("summary", None)
    assert document["ledger"]["segments"]["captured"] > 0
    spawned.process.send_signal(signal.SIGTERM)
    spawned.ended()
    assert "all clt" not in said.read_text()


def test_no_verdict_before_everything_is_accounted_for(scenario, spawn):
    run = scenario(Placement.SELF, 4, delay_s=2, servers=((80, "http"),))
    spawned = spawn(run, stderr=subprocess.DEVNULL, extra=("--interval", "0.1"))
    run.load(23, 23, concurrency=23)
    spawned.process.send_signal(signal.SIGTERM)
    spawned.ended()
    *intervals, _ = spawned.documents()
    assert len(intervals) > 5
    assert {document["balanced"] for document in intervals} == {None}


def compiler_of(pid):
    """Whether the child that compiles is running under ``pid``."""
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if b"pycopy.kernel.compiler" in Path(f"/proc/{child}/cmdline").read_bytes():
                return True
    return False


@pytest.mark.parametrize("command", ["replay", "intercept"])
def test_ctrl_c_while_starting_is_one_line(scenario, lab, tmp_path, command):
    """In a copy whose BPF sources are not what its objects were made of: it has to compile."""
    for part in ("pycopy", "bpf"):
        shutil.copytree(ROOT / part, tmp_path / part)
    with (tmp_path / "bpf" / "parse.h").open("a") as file:
        file.write("/* other */\n")
    run = scenario(Placement.TARGET if command == "intercept" else Placement.SELF, 4)
    program = run.copying.programs[0]
    said = tmp_path / "said"
    with said.open("wb") as stderr:
        process = lab.popen(
            program.role, ["env", f"PYTHONPATH={tmp_path}", sys.executable, "-P", "-m", "pycopy",
                           *program.arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
        )  # fmt: skip
    assert run.eventually(lambda: compiler_of(process.pid), 20), said.read_text()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(20) == 130
    lines = [
        line for line in said.read_text().splitlines()
        if "this is the target" not in line and not line.startswith("still compiling ")
    ]  # fmt: skip
    assert lines == ["pycopy: interrupted"]
    assert run.attached() == []


def test_one_intercept_by_two_addresses(scenario, lab):
    run = scenario(Placement.TARGET, 4)
    run.copying.intercepts[0].start()
    addresses = [lab.address("target", family) for family in (4, 6)]
    replay = run.copying.replays[0]
    replay.arguments[replay.arguments.index("-s") + 1] = ",".join(addresses)
    done = subprocess.run(
        ["ip", "netns", "exec", lab.namespace("online"), sys.executable, "-m", "pycopy",
         *replay.arguments],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    named = done.stderr.splitlines()[0]
    assert f"{addresses[0]}:36524" in named
    assert f"[{addresses[1]}]:36524" in named
    assert "one and the same intercept" in named
    # With -L it may turn out later: the second is left out, and copying goes on.
    replay.arguments.append("-L")
    replay.start()
    assert run.eventually(lambda: "left out" in replay.messages)
    time.sleep(1)
    copied_whole(run, 211)
    assert replay.messages.count("left out") == 1
    assert run.copying.stop().balanced
