"""The sign of life: with every turn of the loop, often enough, and what is noticed of a lapse."""

import itertools
import os
import time

import pytest

from pycopy.kernel import abi, heartbeat, syscall
from pycopy.kernel.heartbeat import Heartbeat
from pycopy.process.loop import BEAT_NS, NEVER_NS, Loop

SECOND = 1_000_000_000


def test_a_loop_beats_with_every_turn_and_in_time_for_the_programs():
    beats = []

    def beat():
        beats.append(time.monotonic_ns())
        return beats[-1]

    loop = Loop(beat)
    for _ in range(3):
        loop.wait(NEVER_NS)  # with nothing to wait for
    loop.wait(0)
    loop.close()
    gaps = [later - earlier for earlier, later in itertools.pairwise(beats)]
    assert len(beats) == 4 and min(gaps) > BEAT_NS // 2
    assert 3 * BEAT_NS < abi.LAPSE_NS


def test_a_loop_still_ends_at_its_deadline():
    loop = Loop()
    began = time.monotonic_ns()
    loop.wait(began + 20_000_000)
    assert 19_000_000 < time.monotonic_ns() - began < BEAT_NS
    loop.close()


@pytest.fixture
def beats(root):
    made = Heartbeat()
    made.open()
    yield made
    made.close()


def test_what_is_beaten_is_what_the_programs_read(beats):
    before = time.monotonic_ns()
    beats.beat()
    (value,) = memoryview(syscall.map_lookup(beats.fd, bytes(4), 8)).cast("Q")
    assert before <= value <= time.monotonic_ns()
    assert beats.given == {"heartbeat": beats.fd}


def test_a_lapse_is_noticed_once(beats, monkeypatch):
    now = time.monotonic_ns()
    clock = iter([now, now + SECOND, now + 6 * SECOND, now + 9 * SECOND, now + 9 * SECOND])
    monkeypatch.setattr(heartbeat.time, "monotonic_ns", lambda: next(clock))
    beats.beat()
    beats.beat()
    assert beats.take_lapse() == 0
    beats.beat()
    beats.beat()
    assert beats.take_lapse() == 5 * SECOND
    assert beats.take_lapse() == 0


def test_closing_leaves_nothing_open_and_what_is_attached_to_itself(root):
    before = set(os.listdir("/proc/self/fd"))
    made = Heartbeat()
    assert made.beat()  # without a map it is a clock
    made.open()
    made.open()
    made.close()
    made.close()
    assert set(os.listdir("/proc/self/fd")) == before
    assert made.beat()
