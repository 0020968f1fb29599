"""``pycopy replay --workers N``: the master, which forks the workers and speaks for them.

It has no program, no ring and no packet. It starts N processes, says once what they all say,
adds their ledgers up, hands signals on, and ends the run when one of them dies. What a
worker's share is, is shares.py's business; what a worker does, worker.py's.

Tests: tests/lab/test_replay_workers.py
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from pycopy.command.config import ReplayConfig
from pycopy.command.services import describe
from pycopy.errors import EXIT_FAILED, EXIT_OK, PycopyError
from pycopy.host import ports
from pycopy.process import daemon
from pycopy.process.console import say
from pycopy.process.life import Life, Phase
from pycopy.process.loop import NEVER_NS, READ, Loop
from pycopy.process.memory import rss_bytes
from pycopy.process.signals import Signals
from pycopy.report.picture import BALANCED, Snapshot, Value
from pycopy.report.view import View
from pycopy.responses.here import own_words
from pycopy.session.rules import SECOND
from pycopy.workers import shares
from pycopy.workers.worker import AT_ONCE, work

#: How long a ledger that was asked for (USR1) waits for the last worker.
_ASKED_NS = SECOND
#: How long workers that must end at once may take, and those that never got ready.
_AT_ONCE_NS = 2 * SECOND
#: epoll waits for no longer than it can count; a turn costs nothing.
_TURN_NS = SECOND
#: Longest message, and different words remembered so that they are said once.
_MESSAGE_BYTES = 1 << 18
_WORDS = 1000


class Child:
    """A worker as its master knows it."""

    def __init__(self, number: int, pid: int, sock: socket.socket) -> None:
        self.name = f"worker {number}"
        self.sock = sock
        self.pidfd = os.pidfd_open(pid)
        self._pid = pid
        self.alive = True
        #: What it said when it was ready.
        self.ready: dict[str, Any] | None = None
        self.ledger: Snapshot | None = None
        #: Its ledger is its last one.
        self.final = False
        self.asked = False
        self.wrong: list[str] = []
        self.error: PycopyError | None = None

    def signal(self, number: int) -> None:
        if self.alive:
            signal.pidfd_send_signal(self.pidfd, number)

    def reap(self) -> int:
        """Exit status; negative: the signal that killed it. It has ended."""
        self.alive = False
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


class Master:
    """One run. Build it before anything else has a thread; :meth:`run`, :meth:`close` (always)."""

    def __init__(self, config: ReplayConfig) -> None:
        self._config = config
        self._ports = None if config.intercepts else ports.choose_range(config.self_ports)
        self.children: list[Child] = []
        self._fork(shares.split(config, self._ports))
        self._loop = Loop()
        self._life = Life()
        self._failure: PycopyError | None = None
        self._print_at = NEVER_NS
        #: How often which words were said, by us and by each worker.
        self._said: dict[str, list[int]] = {}
        services = describe(config.services)
        self.view = View(
            self.snapshot, config.interval_s, config.quiet, config.json, f"pycopy replay {services}"
        )
        # Workers' words are ours to write: reopening the log is no business of theirs.
        others = {signal.SIGUSR1: self._ask, signal.SIGHUP: daemon.hang_up(self._end)}
        self._signals = Signals(self._loop, self._end, others, starting=True)
        for index, child in enumerate(self.children):
            self._loop.add(child.sock.fileno(), READ, partial(self._on_message, index))
            self._loop.add(child.pidfd, READ, partial(self._on_exit, index))

    def _fork(self, configs: Sequence[ReplayConfig]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        master = os.getpid()
        for config in configs:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            pid = os.fork()
            if pid == 0:
                # An end of the master's in here would hide from the others that it has gone.
                for child in self.children:
                    child.sock.close()
                ours.close()
                work(config, theirs, master)
            theirs.close()
            ours.setblocking(False)
            self.children.append(Child(config.worker + 1, pid, ours))

    # -- the run --------------------------------------------------------------------------

    def run(self) -> int:
        """From start to exit status; raises PycopyError when a worker fails."""
        while any(child.ready is None for child in self.children):
            self._turn()
            if self._failure is not None:
                raise self._failure
        self._life.begin()
        self._signals.started()
        say(self._banner())
        daemon.ready()
        self.view.start()
        while any(child.alive for child in self.children):
            self._turn()
        self._life.enter(Phase.FINISHED)
        self.view.stop()
        self.view.summary()
        wrong = [(child.name, words) for child in self.children for words in child.wrong]
        for name, words in wrong:
            say(f"pycopy: {name}: the ledger does not balance: {words}")
        if self._failure is not None:
            raise self._failure
        return EXIT_FAILED if wrong else EXIT_OK

    def _turn(self) -> None:
        self._loop.wait(min(self._print_at, time.monotonic_ns() + _TURN_NS))
        if time.monotonic_ns() >= self._print_at:
            self._print()

    def _banner(self) -> str:
        first = self.children[0].ready
        assert first is not None
        responses = own_words(self._ports) if self._ports else first["responding"]
        return f"ready: {first['copying']}; {responses}; {len(self.children)} workers"

    def snapshot(self) -> dict[str, dict[str, Value]]:
        """The sum of what the workers said last; read by the view's thread as well."""
        known = [child.ledger for child in self.children if child.ledger is not None]
        sections = shares.total(known)
        process = sections.setdefault("process", {})
        theirs_mb = process.get("rss_mb", 0)
        assert isinstance(theirs_mb, int)
        process["rss_mb"] = theirs_mb + (rss_bytes() >> 20)
        process["workers"] = sum(child.alive for child in self.children)
        if self._life.phase is Phase.FINISHED and not all(child.final for child in self.children):
            # Whatever the others say, what this one did last is not known.
            sections.setdefault("segments", {})[BALANCED] = "no"
        return sections

    # -- signals --------------------------------------------------------------------------

    def _end(self) -> None:
        """Let the workers drain; they take it once, from whomever they hear it first."""
        self._life.stop()
        for child in self.children:
            child.signal(signal.SIGTERM)

    def _ask(self) -> None:
        if self._life.phase is Phase.STARTING:
            return
        for child in self.children:
            child.asked = child.alive
            child.signal(signal.SIGUSR1)
        self._print_at = time.monotonic_ns() + _ASKED_NS

    def _print(self) -> None:
        self._print_at = NEVER_NS
        self.view.summary()

    # -- what workers say -----------------------------------------------------------------

    def _on_message(self, index: int, _events: int) -> None:
        child = self.children[index]
        while True:
            try:
                data = child.sock.recv(_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except ConnectionError:
                data = b""
            if not data:
                self._loop.remove(child.sock.fileno())
                return
            self._take(index, json.loads(data))

    def _take(self, index: int, message: dict[str, Any]) -> None:
        child = self.children[index]
        if "words" in message:
            self._say_once(index, message["words"])
        if "ledger" in message:
            child.ledger = message["ledger"]
        if "ready" in message:
            child.ready = message
        if "asked" in message:
            child.asked = False
            if self._print_at < NEVER_NS and not any(other.asked for other in self.children):
                self._print()
        if "final" in message:
            child.final = True
            child.wrong = message["wrong"]
        if "cause" in message:
            child.error = PycopyError(message["cause"], message["cure"])
            child.error.exit_status = message["status"]

    def _say_once(self, index: int, text: str) -> None:
        """What one worker has said the others find out, too."""
        if len(self._said) >= _WORDS:
            self._said.clear()
        for line in text.splitlines():
            times = self._said.setdefault(line, [0] * (len(self.children) + 1))
            times[index + 1] += 1
            if times[index + 1] > times[0]:
                times[0] += 1
                say(line)

    def _on_exit(self, index: int, _events: int) -> None:
        child = self.children[index]
        self._on_message(index, READ)  # its last words
        status = child.reap()
        self._loop.remove(child.sock.fileno())
        self._loop.remove(child.pidfd)
        child.asked = False
        if child.final and child.error is None:
            if self._life.phase is Phase.DRAINING:
                return
            child.error = PycopyError(f"{child.name} was told to end")
        if child.error is None:
            child.error = PycopyError(f"{child.name} {_how(status)}")
        if self._failure is None:
            self._failure = child.error
            if self._life.phase is Phase.RUNNING:
                say(f"pycopy: {child.name} has ended, the others are drained: {child.error.cause}")
        self._end()

    # -- the end --------------------------------------------------------------------------

    def close(self) -> None:
        """End what still runs, at once; does nothing after :meth:`run` returned."""
        self.view.stop()
        for child in self.children:
            child.signal(AT_ONCE)
        until_ns = time.monotonic_ns() + _AT_ONCE_NS
        while any(child.alive for child in self.children):
            self._loop.wait(time.monotonic_ns() + _TURN_NS)
            if time.monotonic_ns() >= until_ns:
                for child in self.children:
                    child.signal(signal.SIGKILL)
                until_ns = NEVER_NS
        self._signals.close()
        self._loop.close()
        for child in self.children:
            child.sock.close()
            os.close(child.pidfd)


def run(config: ReplayConfig, words: Sequence[str]) -> int:
    """Run until stopped; the exit status. ``words`` are said once the workers are forked."""
    master = Master(config)
    try:
        for text in words:
            say(text)
        return master.run()
    finally:
        master.close()


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    return f"was killed by signal {-status} ({signal.strsignal(-status)})"
