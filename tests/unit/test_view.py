"""The view: it shows what the snapshot says, on a terminal and off it, and is never in the way."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest

from pycopy.process import console
from pycopy.report import view
from pycopy.report.view import View

SNAPSHOT = {
    "segments": {"captured": 1009, "sent": 1007, "duplicate": 2, "stray": 0, "balanced": 1},
    "held_us": {"mean": 12.3456},
    "nothing here": {"zero": 0},
    "familiar": {"all clt": 1009, "syn cnt": 23, "conns": 23, "resp": 0},
}

PROGRAM = """
import sys, time
from pycopy.process import console as messages
from pycopy.report.view import View
n = 0
def snapshot():
    global n
    n += 7
    return {"segments": {"captured": n, "balanced": 0}, "familiar": {"all clt": n}}
view = View(snapshot, interval_s=0.1, json="--json" in sys.argv, quiet="--quiet" in sys.argv)
view.start()
assert sys.stdin.readline()
view.stop()
view.summary()
messages.flush(10)
"""


def collect(stderr_is_terminal, *arguments, enough, **environment):
    """Run PROGRAM until its output has ``enough``; its stdout, stderr and exit status."""
    end, terminal = pty.openpty() if stderr_is_terminal else os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", **environment},
    )
    os.close(terminal)
    seen = b""
    if enough:
        while enough.encode() not in seen:
            seen += os.read(end, 65536)
    child.stdin.write(b"stop\n")
    child.stdin.close()
    while True:
        try:
            more = os.read(end, 65536)
        except OSError:  # EIO: the other end of the terminal is closed
            break
        if not more:
            break
        seen += more
    os.close(end)
    stdout = child.stdout.read()
    child.stdout.close()
    return stdout.decode(), seen.decode(), child.wait(30)


def test_summary_text():
    text = View(lambda: SNAPSHOT, 10.0).text()
    assert [line.split() for line in text.splitlines()] == [
        ["segments:"],
        ["captured", "1009"],
        ["sent", "1007"],
        ["duplicate", "2"],
        ["balanced", "yes"],
        ["held_us:"],
        ["mean", "12.346"],
        ["familiar:"],
        ["all", "clt:1009,", "syn", "cnt:23,", "conns:23,", "resp:0"],
        ["ledger", "balanced:", "yes"],
    ]
    assert max(map(len, text.splitlines())) < 80


def test_long_familiar_lines_are_folded_between_counters():
    section = {f"counter number {n}": n for n in range(30)}
    text = view.summary_text({"familiar": section})
    assert max(map(len, text.splitlines())) < 80
    for key, value in section.items():
        assert f"{key}:{value}" in text


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((), None),
        ((1,), True),
        ((True, "yes"), True),
        ((1, 0), False),
        (("no",), False),
        (("missing 3 segments",), False),
    ],
)
def test_verdict_over_all_sections(values, verdict):
    snapshot = {str(n): {"balanced": value} for n, value in enumerate(values)}
    assert view.balanced(snapshot) is verdict
    text = view.summary_text(snapshot)
    assert ("ledger balanced: NO" in text) is (verdict is False)


def test_interval_text_without_familiar_names():
    assert view.interval_text({"a": {"x": 1, "y": 0}, "b": {"z": 0}}) == "a: x 1"
    assert view.interval_text({"a": {"x": 0}}) == "nothing yet"


def test_json_summary_is_one_line_and_complete():
    line = View(lambda: SNAPSHOT, 10.0, json=True).text()
    assert line.endswith("\n")
    assert line.count("\n") == 1
    document = json.loads(line)
    assert document["event"] == "summary"
    assert document["balanced"] is True
    assert document["ledger"] == SNAPSHOT


def test_one_line_per_interval_off_a_terminal():
    stdout, stderr, status = collect(False, enough="all clt:21")
    assert status == 0
    lines = stderr.splitlines()
    assert [line.split(" ", 1)[1] for line in lines[:3]] == [
        "all clt:7",
        "all clt:14",
        "all clt:21",
    ]
    assert "\x1b" not in stderr
    assert stdout == ""
    assert "\nsegments:\n" in stderr
    assert stderr.endswith("ledger balanced: NO\n")


def test_json_lines_and_nothing_on_stderr():
    stdout, stderr, status = collect(False, "--json", enough="")
    documents = [json.loads(line) for line in stdout.splitlines()]
    assert [document["event"] for document in documents[:-1]] == ["interval"] * (len(documents) - 1)
    assert documents[-1]["event"] == "summary"
    assert (stderr, status) == ("", 0)


def test_quiet_is_the_summary_alone():
    stdout, stderr, status = collect(True, "--quiet", enough="")
    assert stderr.startswith("segments:\r\n")
    assert (stdout, status) == ("", 0)


def test_live_view_on_a_terminal():
    stdout, stderr, status = collect(True, enough="/s")
    assert status == 0
    assert "captured" in stderr
    assert "\x1b[31m" in stderr  # the verdict NO stands out
    # The summary stays behind it, and the cursor is back.
    assert stdout == ""
    assert stderr.endswith("ledger balanced: NO\r\n")
    assert stderr.rindex("\x1b[?25h") > stderr.rfind("\x1b[?25l")


def test_live_view_follows_the_size_of_the_terminal():
    """Never wider or higher than the terminal, which is cleared when its size changes."""
    end, terminal = pty.openpty()
    resize(terminal, 24, 80)
    environment = {key: os.environ[key] for key in os.environ if key not in ("COLUMNS", "LINES")}
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stderr=terminal,
        env={**environment, "TERM": "xterm", "NO_COLOR": "1"},
    )  # fmt: skip
    seen = b""
    while seen.count(b"Ctrl-C ends") < 2:
        seen += os.read(end, 65536)
    assert b"\x1b[2J" not in seen
    resize(terminal, 5, 41)
    while b"Ctrl-C ends" not in seen.partition(b"\x1b[2J")[2]:
        seen += os.read(end, 65536)
    child.stdin.write(b"stop\n")
    child.stdin.close()
    os.close(terminal)
    while b"ledger balanced" not in seen:
        seen += os.read(end, 65536)
    assert child.wait(30) == 0
    os.close(end)
    wide, _, narrow = seen.decode().partition("\x1b[2J")
    for text, columns in ((wide, 80), (narrow.partition("segments:")[0], 41)):
        lines = [re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", line) for line in re.split("[\r\n]", text)]
        assert columns - 1 in map(len, lines)
        assert max(map(len, lines)) < columns
    # Everything that was drawn is cleared before the summary.
    assert narrow.partition("segments:")[0].endswith("\x1b[2K")


def resize(terminal, rows, columns):
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def test_live_view_without_colour():
    _, stderr, _ = collect(True, enough="captured", NO_COLOR="1")
    assert "\x1b[31m" not in stderr


def test_dumb_terminal_gets_lines():
    _, stderr, _ = collect(True, enough="all clt:14", TERM="dumb")
    assert "\x1b" not in stderr


def test_reading_survives_a_ledger_that_changes_meanwhile(capsys):
    calls = []

    def snapshot():
        calls.append(None)
        if len(calls) == 1:
            raise RuntimeError("dictionary changed size during iteration")
        return SNAPSHOT

    running = View(snapshot, interval_s=0.01)
    running.start()
    deadline = time.monotonic() + 20
    while len(calls) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    running.stop()
    console.flush()
    assert "all clt:1009" in capsys.readouterr().err


def test_the_thread_does_not_keep_the_process_alive():
    program = "from pycopy.report.view import View\nView(dict, interval_s=3600).start()\n"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


def test_rich_is_not_imported_off_a_terminal():
    program = (
        "import sys\n"
        "from pycopy.report.view import View\n"
        "view = View(dict, interval_s=0.01)\n"
        "view.start(); view.stop(); view.summary()\n"
        "assert 'rich' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
