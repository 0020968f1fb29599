"""Daemon, log file, pid file: on real processes, since that is what they are about."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pycopy.errors import PycopyError
from pycopy.process.daemon import LogFile, PidFile

# A driver as replay and intercept are, in small: ready, then HUP and TERM.
PROGRAM = """
import os, signal, sys
from pycopy import cli
from pycopy.process import daemon
from pycopy.errors import HostUnfit

mode, log, pid, detach = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "-d"

def body():
    if mode == "unfit":
        raise HostUnfit("no such kernel", "get another")
    if mode == "crash":
        raise ZeroDivisionError("a bug")
    if mode == "fails":
        return 1
    signals = {signal.SIGHUP, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    print("to stdout"); print("to stderr", file=sys.stderr); os.system("echo from a child")
    if mode == "late":
        raise HostUnfit("it broke later", "")
    daemon.ready()
    print("cwd", os.getcwd(), "session", os.getsid(0) != os.getpid())
    hang_up = daemon.hang_up(None)
    while signal.sigwait(signals) == signal.SIGHUP:
        hang_up()
        print("reopened")
    print("ended")
    return 0

cli._COMMANDS["test"] = lambda argv: daemon.run(body, detach=detach, log_path=log, pid_path=pid)
sys.exit(cli.main(["test"]))
"""


def run(mode, log, pid="", detach="-d", **options):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, mode, str(log), str(pid), detach],
        capture_output=True,
        text=True,
        timeout=30,
        **options,
    )


def until(condition, what):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.fixture
def paths(tmp_path):
    """Log and pid path of a daemon, which is ended afterwards whatever happened."""
    log, pid = tmp_path / "log", tmp_path / "pid"
    yield log, pid
    if pid.exists():
        os.kill(int(pid.read_text()), signal.SIGKILL)


def test_a_daemon_from_start_to_end(paths):
    log, pid = paths
    command = run("serve", log, pid)
    assert (command.returncode, command.stdout, command.stderr) == (0, "", "")
    number = int(pid.read_text())
    until(lambda: "cwd / session True" in log.read_text(), "the daemon's log")
    for line in ("to stdout", "to stderr", "from a child"):
        assert line in log.read_text().splitlines()

    # One at a time, and the refusal names the other.
    second = run("serve", log, pid)
    assert second.returncode == 1
    assert f"already running as process {number}" in second.stderr

    # Log rotation: the new file is used, the old one left alone.
    log.rename(f"{log}.1")
    os.kill(number, signal.SIGHUP)
    until(lambda: log.exists() and "reopened" in log.read_text(), "the new log")
    assert "reopened" not in Path(f"{log}.1").read_text()

    os.kill(number, signal.SIGTERM)
    until(lambda: not pid.exists(), "the end")
    until(lambda: "ended" in log.read_text(), "the last line")


def test_what_a_killed_daemon_leaves_is_not_in_the_way(paths):
    log, pid = paths
    assert run("serve", log, pid).returncode == 0
    first = int(pid.read_text())
    os.kill(first, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{first}/fd/0").exists(), "the kill")
    assert pid.exists()
    again = run("serve", log, pid)
    assert (again.returncode, again.stderr) == (0, "")
    assert int(pid.read_text()) != first


@pytest.mark.parametrize(
    ("mode", "status", "words"),
    [
        ("unfit", 3, "pycopy: error: no such kernel\n  get another\n"),
        ("late", 3, "pycopy: error: it broke later\n"),
        ("crash", 1, "pycopy: error: the daemon ended while starting\n  {log} has the reason\n"),
        ("fails", 1, "pycopy: error: the daemon ended while starting\n  {log} has the reason\n"),
    ],
)
def test_errors_before_ready_are_told_where_the_command_was_typed(paths, mode, status, words):
    log, pid = paths
    command = run(mode, log, pid)
    assert (command.returncode, command.stderr) == (status, words.format(log=log))
    until(lambda: not pid.exists(), "the pid file's removal")
    if mode == "crash":
        until(lambda: "ZeroDivisionError: a bug" in log.read_text(), "the traceback")


def test_foreground_with_a_log_file(paths):
    log, pid = paths
    command = run("late", log, pid, detach="")
    assert command.returncode == 3
    assert sorted(command.stdout.splitlines()) == ["from a child", "to stdout"]
    # The error is told in both places.
    assert command.stderr == "pycopy: error: it broke later\n"
    assert log.read_text() == "to stderr\npycopy: error: it broke later\n"
    assert not pid.exists()


def test_paths_that_cannot_be_written(tmp_path):
    for log, pid, words in (
        (tmp_path / "no" / "log", "", "cannot write the log file"),
        (tmp_path / "log", tmp_path / "no" / "pid", "cannot write the pid file"),
    ):
        command = run("serve", log, pid)
        assert command.returncode == 1
        assert words in command.stderr
        assert "No such file or directory" in command.stderr


def test_a_full_disk_is_counted_and_survived():
    log = LogFile("/dev/full")
    print("one", file=log)
    print("two", file=log)
    assert log.write_errors == 2
    command = run("late", "/dev/full", detach="")
    assert command.returncode == 3
    assert command.stderr.splitlines() == [
        "2 messages could not be written to the log",
        "pycopy: error: it broke later",
    ]
    with pytest.raises(PycopyError, match="cannot write the pid file"):
        PidFile("/dev/full").write()


def test_log_writes_whole_lines_and_reopens_only_what_it_can(tmp_path):
    path = tmp_path / "sub" / "log"
    path.parent.mkdir()
    log = LogFile(str(path))
    log.write("half ")
    assert path.read_text() == ""
    log.write("a line\nand ")
    assert path.read_text() == "half a line\n"
    moved = tmp_path / "moved"
    path.parent.rename(moved)
    log.reopen()  # nowhere to go: the old file goes on
    assert log.write_errors == 1
    log.write("more \N{SNOWMAN}\n")
    assert (moved / "log").read_text() == "half a line\nand more \N{SNOWMAN}\n"


def test_without_a_log_file_there_is_no_pid_file(tmp_path):
    pid = tmp_path / "pid"
    command = run("serve", tmp_path / "nowhere" / "log", pid)
    assert command.returncode == 1
    assert "cannot write the log file" in command.stderr
    assert not pid.exists()


def test_pid_file_lock_is_what_counts(tmp_path):
    path = tmp_path / "pid"
    path.write_text("1\n")  # a number of somebody else's process, not locked: stale
    mine = PidFile(str(path))
    mine.write()
    assert path.read_text() == f"{os.getpid()}\n"
    with pytest.raises(PycopyError, match=f"already running as process {os.getpid()}"):
        PidFile(str(path))
    mine.remove()
    assert not path.exists()


def make(kind, path):
    """Something that is not ours at ``path``; gives what must still be there."""
    other = path.with_name("other")
    if kind == "a directory":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "a device":
        if os.geteuid() != 0:
            pytest.skip("needs root: sudo ./contrib/setup test")
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    elif kind == "a symbolic link":
        other.write_text("")
        path.symlink_to(other)
    elif kind == "a link to nothing":
        path.symlink_to(other)
    else:
        path.write_text(kind)

    def seen():
        found = [path.lstat().st_ino, path.lstat().st_mode, other.exists()]
        return found + [each.read_bytes() for each in (path, other) if each.is_file()]

    return seen


@pytest.mark.parametrize("detach", ["", "-d"])
@pytest.mark.parametrize("mode", ["unfit", "serve"])
@pytest.mark.parametrize(
    "kind",
    [
        "a directory", "a FIFO", "a socket", "a device", "a symbolic link", "a link to nothing",
        "precious\n", "12 34\n", "1234", "1" * 5000,
    ],
)  # fmt: skip
def test_a_pid_file_that_is_none_is_refused_and_left_alone(tmp_path, kind, mode, detach):
    path = tmp_path / "pid"
    seen = make(kind, path)
    before = seen()
    command = run(mode, tmp_path / "log", path, detach)
    assert command.returncode == 1
    cause, cure = command.stderr.splitlines()
    assert cause.startswith(f"pycopy: error: cannot write the pid file {path}: it ")
    assert "-P FILE" in cure
    assert seen() == before


@pytest.mark.parametrize("detach", ["", "-d"])
@pytest.mark.parametrize("text", ["", "4194304\n"])
def test_a_failed_start_leaves_what_a_crash_had_left(tmp_path, text, detach):
    path = tmp_path / "pid"
    path.write_text(text)
    number = path.stat().st_ino
    assert run("unfit", tmp_path / "log", path, detach).returncode == 3
    assert (path.read_text(), path.stat().st_ino) == (text, number)


def test_only_the_file_that_was_locked_is_removed(paths):
    log, pid = paths
    assert run("serve", log, pid).returncode == 0
    number = int(pid.read_text())
    pid.rename(f"{pid}.moved")
    pid.write_text("another's")
    os.kill(number, signal.SIGTERM)
    until(lambda: not Path(f"/proc/{number}/fd/0").exists(), "the end")
    assert pid.read_text() == "another's"
    pid.unlink()


def test_a_pid_file_without_room_is_not_left(tmp_path):
    path = tmp_path / "pid"
    command = run("serve", "/dev/null", path, preexec_fn=no_room)
    assert command.returncode == 1
    assert f"cannot write the pid file {path}: File too large" in command.stderr
    assert not path.exists()


def no_room():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("a directory", "it is a directory"),
        ("a socket", "it is a socket"),
        ("a FIFO", "nobody reads from it"),
    ],
)
@pytest.mark.parametrize("detach", ["", "-d"])
def test_a_log_file_that_is_none_is_refused_at_once(tmp_path, kind, words, detach):
    path = tmp_path / "log"
    seen = make(kind, path)
    before = seen()
    command = run("serve", path, tmp_path / "pid", detach)
    assert command.returncode == 1
    assert command.stderr.splitlines() == [
        f"pycopy: error: cannot write the log file {path}: {words}",
        "  name another file with -l FILE",
    ]
    assert seen() == before
    assert not (tmp_path / "pid").exists()


def test_a_log_to_a_fifo_with_a_reader_who_does_not_read(paths):
    log, pid = paths
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert run("serve", log, pid).returncode == 0
        number = int(pid.read_text())
        until(lambda: b"cwd / session True" in os.read(reader, 4096), "a line")
        os.kill(number, signal.SIGTERM)
        until(lambda: not pid.exists(), "the end")
    finally:
        os.close(reader)
    end, other = os.pipe()
    os.set_inheritable(other, True)
    full = LogFile(f"/proc/self/fd/{other}")
    for _ in range(100):
        full.write("x" * 1023 + "\n")  # more than a pipe takes, and nobody waits
    assert full.write_errors
    os.close(end)
    os.close(other)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/stderr"])
def test_a_log_to_a_device(path):
    command = run("late", path, detach="")
    assert command.returncode == 3
    times = 2 if path == "/dev/stderr" else 1
    assert command.stderr.count("it broke later") == times
