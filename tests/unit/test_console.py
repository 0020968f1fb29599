"""Words to the user never make anybody wait: real pipes, full, closed and slow."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pycopy.process import console

ROOT = Path(__file__).resolve().parents[2]


def run(code, *words, **options):
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=ROOT, stdin=subprocess.DEVNULL, **options
    )


def full_pipe():
    """Both ends of a pipe into which nothing more fits."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(65536))
    except BlockingIOError:
        os.set_blocking(writer, True)
    return reader, writer


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_pipe_holds_nobody_up(stream):
    """What does not fit is dropped; the end waits its two seconds and not for ever."""
    code = (
        "import sys\n"
        "from pycopy.process import console as messages\n"
        "for number in range(5000):\n"
        "    messages.put(f'line {number}\\n', to_stdout=sys.argv[1] == 'stdout')\n"
        "messages.leave(7)\n"
    )
    reader, writer = full_pipe()
    began_s = time.monotonic()
    with run(code, stream, **{stream: writer}) as child:
        assert child.wait(20) == 7
    assert time.monotonic() - began_s < 10
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream_is_no_error(stream):
    code = "from pycopy.process import console as messages\nmessages.say('x')\nmessages.leave(0)\n"
    with run(f"import sys\nsys.{stream} = None\n{code}") as child:
        assert child.wait(20) == 0
    reader, writer = os.pipe()
    os.close(reader)
    with run(code, stderr=writer) as child:
        assert child.wait(20) == 0
    os.close(writer)


def test_what_was_dropped_is_said_once_somebody_reads():
    code = (
        "import sys\n"
        "from pycopy.process import console as messages\n"
        "for number in range(5000):\n"
        "    messages.say(f'line {number}')\n"
        "print('said', flush=True)\n"
        "assert sys.stdin.read() == ''\n"
        "messages.flush(10)\n"
    )
    reader, writer = full_pipe()
    words = [sys.executable, "-c", code]
    with subprocess.Popen(
        words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=writer
    ) as child:
        os.close(writer)
        assert child.stdout.readline() == b"said\n"
        child.stdin.close()
        with open(reader, "rb") as pipe:
            lines = pipe.read().lstrip(b"\0").decode().splitlines()
    assert lines[0] == "line 0"
    assert lines[-1] == f"{5000 - (len(lines) - 1)} lines were dropped: nobody read stderr"


def test_without_a_thread_it_is_said_all_the_same():
    code = (
        "import sys, threading\n"
        "from pycopy.process import console as messages\n"
        "from pycopy.report.view import View\n"
        "import resource, os\n"
        "# What a limit on processes does to a user who is not root.\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))\n"
        "if os.geteuid() == 0: os.setresuid(65534, 65534, 65534)\n"
        "view = View(lambda: {'segments': {'captured': 7}}, 10.0)\n"
        "view.start()\n"
        "messages.say('last')\n"
        "view.stop()\n"
        "assert threading.active_count() == 1\n"
        "messages.leave(7)\n"
    )
    with run(code, stderr=subprocess.PIPE) as child:
        lines = child.stderr.read().decode().splitlines()
        assert child.wait(20) == 7
    assert lines == ["nothing is shown while it runs: the system starts no further thread", "last"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_disk_does_not_change_the_status(stream):
    code = (
        "import sys\n"
        "from pycopy.process import console as messages\n"
        "messages.put('x\\n', to_stdout=sys.argv[1] == 'stdout')\n"
        "messages.leave(7)\n"
    )
    with open("/dev/full", "wb") as full, run(code, stream, **{stream: full}) as child:
        assert child.wait(20) == 7


def test_in_order_and_flushed(capsys):
    for number in range(100):
        console.say(f"line {number}")
    console.put("to stdout\n", to_stdout=True)
    assert console.flush()
    said = capsys.readouterr()
    assert said.err.splitlines() == [f"line {number}" for number in range(100)]
    assert said.out == "to stdout\n"


def test_a_stopped_terminal_with_the_live_view():
    """rich holds its console's lock while it writes; words go through it and must not wait."""
    code = (
        "import time\n"
        "from pycopy.process import console as messages\n"
        "from pycopy.report.view import View\n"
        "view = View(lambda: {'segments': {'captured': time.monotonic_ns()}}, 10.0)\n"
        "view.start()\n"
        "time.sleep(1)\n"
        "began_s = time.monotonic()\n"
        "for number in range(100):\n"
        "    messages.say('x' * 70)\n"
        "print(time.monotonic() - began_s, flush=True)\n"
        "view.stop()\n"
        "view.summary()\n"
        "messages.leave(7)\n"
    )
    ours, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    with run(code, stderr=terminal, stdout=subprocess.PIPE, env=environment) as child:
        # Nobody reads our end: the terminal's buffer fills as after Ctrl-S.
        assert float(child.stdout.readline()) < 0.5
        assert child.wait(20) == 7
    os.close(ours)
    os.close(terminal)
