"""The end of what goes on by itself."""

import time

from pycopy.process.quiet import until_quiet

MS = 1_000_000


class Work:
    def __init__(self, busy):
        self.busy, self.turns = busy, []

    def is_busy(self):
        return len(self.turns) < self.busy

    def turn(self, until_ns):
        self.turns.append(until_ns)
        time.sleep(max(until_ns - time.monotonic_ns(), 0) / 1e9)


def test_it_goes_on_until_nothing_has_happened_for_a_while():
    work, began_ns = Work(busy=5), time.monotonic_ns()
    until_quiet(work.is_busy, work.turn, 10**12, 20 * MS)
    assert len(work.turns) > 5 and work.turns == sorted(work.turns)
    assert time.monotonic_ns() - began_ns >= 20 * MS


def test_what_never_ends_is_left():
    work, began_ns = Work(busy=10**9), time.monotonic_ns()
    until_quiet(work.is_busy, work.turn, 40 * MS, 20 * MS)
    assert work.turns and time.monotonic_ns() - began_ns >= 40 * MS
