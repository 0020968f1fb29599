"""Signals as events of the loop, the second of them at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pycopy.process.loop import Loop
from pycopy.process.signals import Signals

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def loop():
    loop = Loop()
    yield loop
    loop.close()


def turn(loop):
    loop.wait(time.monotonic_ns() + 1_000_000_000)


def test_each_does_its_own(loop):
    said = []
    signals = Signals(
        loop,
        lambda: said.append("end"),
        {signal.SIGHUP: lambda: said.append("hup"), signal.SIGUSR1: lambda: said.append("usr1")},
    )
    try:
        for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
            turn(loop)
    finally:
        signals.close()
    assert said == ["usr1", "hup", "end"]


def test_the_second_end_strikes_at_once(loop):
    signals = Signals(loop, lambda: None, {})
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        signals.close()


def test_everything_is_as_before(loop):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    Signals(loop, lambda: None, {signal.SIGUSR1: lambda: None}).close()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_ends_a_wait():
    code = (
        "import time\n"
        "from pycopy.process.loop import Loop\n"
        "from pycopy.process.signals import Signals\n"
        "loop, ended = Loop(), []\n"
        "Signals(loop, lambda: ended.append(1), {})\n"
        "print('ready', flush=True)\n"
        "loop.wait(time.monotonic_ns() + 30 * 10**9)\n"
        "raise SystemExit(0 if ended else 1)\n"
    )
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0
