"""One worker of ``pycopy replay --workers``: a replay that reports to its master.

It is forked with its part of the run (shares.py), says nothing to the user itself, and ends
when the master tells it to or is gone. Words, the ledger and the end go to the master as
messages, one JSON object each.

Tests: tests/lab/test_replay_workers.py
"""

import contextlib
import ctypes
import io
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from pycopy.command.config import ReplayConfig
from pycopy.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, PycopyError, explain
from pycopy.process import console
from pycopy.process.loop import READ, Loop
from pycopy.replay import Replay
from pycopy.report.ledger import Ledger
from pycopy.report.picture import Value
from pycopy.wire.segment import Segment
from pycopy.workers.shares import Own

#: The master's word that there is no time to drain: the second Ctrl-C.
AT_ONCE = signal.SIGUSR2
#: Longest text in one message, well below what a socket takes.
_TEXT_CHARACTERS = 30_000
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Line:
    """The way to the master: a SOCK_SEQPACKET, whose messages arrive whole or not at all."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def fileno(self) -> int:
        return self._sock.fileno()

    def tell(self, *, wait: bool = True, **message: object) -> None:
        """``wait``: until the master has room for it; a stopped one may have none for long."""
        # The master may be gone: then there is nobody left to tell.
        with contextlib.suppress(OSError):
            flags = 0 if wait else socket.MSG_DONTWAIT
            self._sock.send(json.dumps(message).encode(), flags)

    def error(self, error: PycopyError) -> None:
        self.tell(status=error.exit_status, cause=error.cause, cure=error.cure)


class _Words(io.TextIOBase):
    """Our stderr: the master says it, once for all workers."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def write(self, text: str) -> int:
        self._line.tell(words=text[:_TEXT_CHARACTERS])
        return len(text)

    def writable(self) -> bool:
        return True


class ToMaster:
    """The reporter of a worker, and what knows its share of an intercept's records."""

    watches = True
    # A service manager signals the master and its workers alike.
    second_ends = False

    def __init__(self, config: ReplayConfig, ledger: Ledger, line: Line) -> None:
        self._ledger = ledger
        self._line = line
        self._has_intercept = bool(config.intercepts)
        self._own = Own(config)
        #: Responses that an intercept had for all workers, and that were another's.
        self._others = 0

    def join(self, loop: Loop, stop: Callable[[], None]) -> None:
        """The master says nothing on this way; when it can be read, it has gone."""

        def on_master(_events: int) -> None:
            loop.remove(self._line.fileno())
            stop()

        loop.add(self._line.fileno(), READ, on_master)

    def ours(self, records: list[Segment]) -> list[Segment]:
        has = self._own.has
        own = [segment for segment in records if has(segment.key)]
        self._others += len(records) - len(own)
        return own

    def on_ready(self, copying: str, responding: str) -> None:
        self._line.tell(ready=True, copying=copying, responding=responding, ledger=self._snapshot())

    def on_second(self) -> None:
        self._line.tell(wait=False, ledger=self._snapshot())

    def show(self) -> None:
        self._line.tell(wait=False, ledger=self._snapshot(), asked=True)

    def on_end(self, wrong: list[str]) -> None:
        """Give account; ``wrong``: what does not balance."""
        self._line.tell(final=True, ledger=self._snapshot(), wrong=wrong)

    def _snapshot(self) -> dict[str, dict[str, Value]]:
        sections = self._ledger.snapshot()
        if self._has_intercept:
            sections["responses"]["other_workers"] = self._others
        return sections


def work(config: ReplayConfig, sock: socket.socket, master: int) -> NoReturn:
    """The whole life of a worker, right after fork(2)."""
    status = EXIT_FAILED
    line = Line(sock)
    try:
        _come_off(master)
        sys.stdout = sys.stderr = _Words(line)
        status = _replay(config, line)
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    except PycopyError as error:
        status = error.exit_status
        line.error(error)
    except BaseException as error:
        known = explain(error)
        if known is None:
            text = "".join(traceback.format_exception(error))
            line.tell(words=text[-_TEXT_CHARACTERS:])
            known = PycopyError(f"worker {config.worker + 1} failed: {error!r}")
        line.error(known)
    finally:
        # Not by exit(): what the master has open and registered is the master's to end.
        try:
            console.flush()
        finally:
            os._exit(status)


def _replay(config: ReplayConfig, line: Line) -> int:
    ledger = Ledger()
    master = ToMaster(config, ledger, line)
    replay = Replay(config, ledger, master, master.ours)
    failure = None
    try:
        replay.start()
        master.on_ready(replay.copying(), replay.responding())
        try:
            replay.run()
        except PycopyError as error:
            failure = error  # accounts first
        wrong = replay.finish()
        master.on_end(wrong)
    finally:
        replay.close()
    if failure is not None:
        raise failure
    return EXIT_FAILED if wrong else EXIT_OK


def _come_off(master: int) -> None:
    """Apart from the terminal's Ctrl-C, but not from the master's death."""
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # until the replay takes them
    for number in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(AT_ONCE, _interrupt)
    libc = ctypes.CDLL(None, use_errno=True)
    # In order, as if it had been told: the kernel would detach links after a SIGKILL, but
    # not filters, which stand in for them below Linux 6.6.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != master:
        os._exit(EXIT_FAILED)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(AT_ONCE, signal.SIG_IGN)  # once: what closes must not be interrupted
    raise KeyboardInterrupt
