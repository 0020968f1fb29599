"""How tests share the machine when several run at once, and how they end together.

pytest-xdist's workers take groups of tests. A group here is a file or, in the lab tier,
whose files are long, some tests in a row of one file: a lab's namespaces carry the worker's
pid in their name, so labs never meet. A test marked ``alone`` measures what others would
spoil, such as short times: while it runs, no other does. Without xdist all of this is idle.
"""

import contextlib
import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

HERE = Path(__file__)
#: Tests of one lab file for which a worker builds its lab: many, or much time goes into
#: building; few, or one worker is busy at the end while others are done.
LAB_TESTS = 8
#: In this order: what takes longest first, so that something short is left for the end.
ORDER = ("lab", "bpf")
#: After an interrupt workers have so long to take down what they have built.
END_S = 60


class Worker:
    """In each process of xdist that runs tests."""

    def __init__(self, workerinput):
        gate, room, standing = (os.open(path, os.O_RDONLY) for path in workerinput["locks"])
        self._turn = Turn(gate, room)
        self._standing = standing
        fcntl.flock(standing, fcntl.LOCK_SH)

    def pytest_unconfigure(self):
        os.close(self._standing)  # all that was built here is gone

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        places = {}
        for item in items:
            tier = item.path.relative_to(HERE.parent).parts[0]
            part = 0
            if tier == "lab":
                places[item.path] = place = places.get(item.path, -1) + 1
                part = place // LAB_TESTS
            group = f"{tier}.{item.path.stem}.{part}" if not _is_alone(item) else "alone"
            item.add_marker(pytest.mark.xdist_group(group))
        items.sort(key=_place)

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item, nextitem):
        """Outermost, so that waiting for a turn does not count as the test's time."""
        self._turn.take(_is_alone(item))
        yield
        if not (_is_alone(item) and _is_alone(nextitem)):
            self._turn.leave()


def _is_alone(item):
    return item is not None and item.get_closest_marker("alone") is not None


def _place(item):
    tier = item.path.relative_to(HERE.parent).parts[0]
    return _is_alone(item), ORDER.index(tier) if tier in ORDER else len(ORDER)


class Turn:
    """Many processes at once, or one alone; whoever wants to be alone is let in next.

    Two locks of the kernel, so that they end with their holder: all pass the gate, and
    whoever wants the room for itself waits inside the gate for the others to leave.
    """

    def __init__(self, gate, room):
        self._gate, self._room = gate, room
        self._alone = False

    def take(self, alone):
        if self._alone and alone:
            return
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        finally:
            fcntl.flock(self._gate, fcntl.LOCK_UN)
        self._alone = alone

    def leave(self):
        fcntl.flock(self._room, fcntl.LOCK_UN)
        self._alone = False


class Controller:
    """In the process that was started: with workers it says what they lock, and ends them."""

    def __init__(self):
        self._locks = [os.memfd_create(name) for name in ("gate", "room", "standing")]
        self._has_workers = False

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        self._has_workers = True
        node.workerinput["locks"] = [f"/proc/{os.getpid()}/fd/{fd}" for fd in self._locks]

    @pytest.hookimpl(optionalhook=True, trylast=True)
    def pytest_xdist_newgateway(self, gateway):
        """With -v xdist has asked the worker who it is. Not all versions of execnet wait for
        the end of that, and then tests would run in a thread, where signals do not go."""
        while gateway.remote_status().numexecuting:
            time.sleep(0.01)

    def pytest_keyboard_interrupt(self):
        """Workers end as after Ctrl-C; xdist's own way is to kill them after some seconds."""
        if not self._has_workers:
            return
        for task in Path("/proc/self/task").iterdir():
            for pid in (task / "children").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGINT)
        deadline = time.monotonic() + END_S
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(0.02)

    def pytest_unconfigure(self):
        for fd in self._locks:
            os.close(fd)


def interrupt_once():
    """SIGTERM as Ctrl-C, and each but once: a second one must not cut the clean-up short.

    A terminal sends SIGINT to the workers as well, and so does the controller.
    """

    def interrupt(*_):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
