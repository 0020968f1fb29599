"""Words to the user, written by a thread for each stream so that nobody else ever waits.

A terminal held with Ctrl-S, a pipe that nobody reads, a stream that was closed: none of them
may hold up the traffic, or end it. :func:`say` and :func:`put` only queue, and what finds the
queue full is dropped and counted. Use it after the process has forked, if it does. Nothing
here knows what is said.
"""

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import NoReturn

#: Texts waiting for one stream; more are dropped.
_QUEUE_TEXTS = 1000
#: How long an end waits for its last words to be read.
LAST_WORDS_S = 2.0
#: What takes longer says what it is doing.
SLOW_S = 1.0


class _Writer:
    """What is on its way to ``sys.<stream>``, which is looked up anew for each text."""

    def __init__(self, stream: str) -> None:
        self._stream = stream
        self._texts: deque[str] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._dropped = 0
        self._stuck = False

    def put(self, text: str) -> None:
        with self._changed:
            if len(self._texts) >= _QUEUE_TEXTS:
                self._dropped += 1
                return
            self._texts.append(text)
            if self._thread is not None or self._start():
                self._changed.notify_all()
                return
            self._texts.pop()
        self._write(text)

    def _start(self) -> bool:
        """False where no thread can be had: whoever says something waits then, at worst."""
        # A daemon thread: it never keeps the process alive.
        thread = threading.Thread(target=self._run, name="messages", daemon=True)
        try:
            thread.start()
        except (RuntimeError, MemoryError):
            return False
        self._thread = thread
        return True

    def flush(self, until_s: float) -> bool:
        """Wait until everything is written; False if it is not. Patience is lost only once."""
        with self._changed:
            patience_s = 0.0 if self._stuck else max(until_s - time.monotonic(), 0.0)
            done = self._changed.wait_for(lambda: not self._texts, patience_s)
            self._stuck = not done
            return done

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._texts)
                text = self._texts[0]
            self._write(text)
            with self._changed:
                self._texts.popleft()
                dropped, self._dropped = self._dropped, 0
                self._stuck = False
                self._changed.notify_all()
            if dropped:
                say(f"{dropped} lines were dropped: nobody read {self._stream}")

    def _write(self, text: str) -> None:
        # Closed, or its reader has gone: then nobody is listening any more.
        with contextlib.suppress(OSError, ValueError, MemoryError):
            stream = getattr(sys, self._stream)
            if stream is not None:
                stream.write(text)
                stream.flush()


_stdout, _stderr = _Writer("stdout"), _Writer("stderr")


def say(text: str) -> None:
    """One line on stderr."""
    _stderr.put(text + "\n")


def put(text: str, to_stdout: bool = False) -> None:
    """Whole lines, as they are."""
    (_stdout if to_stdout else _stderr).put(text)


@contextlib.contextmanager
def while_slow(doing: str) -> Iterator[None]:
    """Say what is being done, once it has taken a second."""
    timer = threading.Timer(SLOW_S, say, [f"still {doing} ..."])
    timer.daemon = True
    # Where no thread can be started it goes on without a word.
    with contextlib.suppress(RuntimeError, MemoryError):
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def flush(patience_s: float = LAST_WORDS_S) -> bool:
    """Wait for what was said to be written; False if it was not in time."""
    until_s = time.monotonic() + patience_s
    written = [_stdout.flush(until_s), _stderr.flush(until_s)]
    return all(written)


def leave(status: int) -> NoReturn:
    """End the process, whether or not somebody reads its last words."""
    if not flush():
        # A thread is stuck in write(2) and holds the stream's lock; exit() would wait for that.
        os._exit(status)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            # A full disk, a closed pipe: exit() would fail to write it once more, and say so.
            os._exit(status)
    sys.exit(status)
