"""Signals as events of the loop: INT and TERM end the program, HUP and USR1 do what they do.

The first INT or TERM asks for an orderly end; a second one raises KeyboardInterrupt
wherever the program is, so that ``finally`` still detaches; while it is starting the first
one does so already, since there is nothing yet to end in order. Main thread only.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from types import FrameType

from pycopy.process.loop import READ, Loop

_ENDING = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """From construction to ``close()``; ``on_end`` is called in the loop, once.

    ``starting``: no loop is running yet, until :meth:`started`. ``second_ends``: not in a
    worker, which hears the same end from several sides, and waits for its master's word.
    """

    def __init__(
        self,
        loop: Loop,
        on_end: Callable[[], None],
        others: Mapping[signal.Signals, Callable[[], None]],
        *,
        starting: bool = False,
        second_ends: bool = True,
    ) -> None:
        self._loop = loop
        self._on_end = on_end
        self._others = dict(others)
        self._ended = 0
        self._starting = starting
        self._second_ends = second_ends
        self._reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._writer = writer
        self._fd_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # The handler must exist for a byte to be written, and is where the second one strikes.
        self._before = {
            number: signal.signal(number, self._note) for number in (*_ENDING, *self._others)
        }
        loop.add(self._reader, READ, self._on_readable)

    def started(self) -> None:
        """Call it before "ready" is said: who reads that may end the program in order."""
        self._starting = False

    def close(self) -> None:
        """Put back the handlers that were there before."""
        self._loop.remove(self._reader)
        for number, before in self._before.items():
            signal.signal(number, before)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._reader)
        os.close(self._writer)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number in _ENDING:
            self._ended += 1
            if self._starting or (self._ended > 1 and self._second_ends):
                raise KeyboardInterrupt

    def _on_readable(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self._reader, 512):
                if number in _ENDING:
                    self._on_end()
                elif number in self._others:
                    self._others[signal.Signals(number)]()
