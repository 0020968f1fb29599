"""Run pycopy itself between the lab's hosts, with the command lines a user would type.

The demonstration and the lab tests share this: start what a placement needs, in order,
wait for each to say that it is ready, and stop replay before intercept. Everything is a
real process in its host's namespace; nothing is called in-process.

Tests: tests/lab/test_lab.py
"""

import contextlib
import json
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from pycopy.errors import PycopyError

from .topology import DEVICE, Lab, python

READY_S = 30.0
STOP_S = 60.0


class Placement(Enum):
    """Where the target's responses are intercepted (see docs): the three that exist."""

    SELF = "self"
    TARGET = "target"
    ASSISTANT = "assistant"


class Program:
    """One ``pycopy`` process on a host of the lab; its output is kept in files."""

    def __init__(self, lab: Lab, role: str, arguments: Sequence[str]) -> None:
        self.lab = lab
        self.role = role
        self.arguments = list(arguments)
        self.process: subprocess.Popen[bytes] | None = None
        number = len(list(lab.state_dir.glob("program-*")))
        self._dir = lab.state_dir / f"program-{number}-{role}"

    def __str__(self) -> str:
        """As a user would type it."""
        return shlex.join(["pycopy", *self.arguments])

    def start(self) -> None:
        """Start it and wait until it says that it is ready; raises PycopyError after READY_S."""
        self._dir.mkdir()
        with (self._dir / "out").open("wb") as out, (self._dir / "err").open("wb") as err:
            self.process = self.lab.popen(
                self.role,
                python("pycopy", *self.arguments),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        deadline = time.monotonic() + READY_S
        while not any(line.startswith("ready") for line in self.messages.splitlines()):
            if self.process.poll() is not None:
                raise self._error(f"ended with status {self.process.returncode}")
            if time.monotonic() > deadline:
                raise self._error(f"was not ready after {READY_S:.0f} s")
            time.sleep(0.01)

    @property
    def messages(self) -> str:
        """What it wrote to stderr so far."""
        path = self._dir / "err"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def output(self) -> str:
        """What it wrote to stdout so far."""
        path = self._dir / "out"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def pid(self) -> int:
        """Its process id; only once it was started."""
        assert self.process is not None
        return self.process.pid

    def stop(self, number: int = signal.SIGINT) -> dict[str, Any]:
        """Send the signal, wait for the end, and return its JSON summary; raises PycopyError."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            status = self.process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise self._error(f"did not end within {STOP_S:.0f} s of its signal") from None
        if status != 0:
            raise self._error(f"ended with status {status}")
        text = (self._dir / "out").read_text()
        try:
            # One object a line: one for each interval, and the summary last.
            return dict(json.loads(text.splitlines()[-1]))
        except (ValueError, IndexError):
            raise self._error(f"printed no JSON summary but {text[-200:]!r}") from None

    def kill(self) -> None:
        """As ``kill -9``; returns when the process is gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _error(self, what: str) -> PycopyError:
        said = "\n    ".join(self.messages.strip().splitlines()[-12:]) or "nothing"
        return PycopyError(f"{self} on {self.role} {what}; it said:\n    {said}")


@dataclass
class Outcome:
    """The JSON results of all programs of one copying."""

    replays: list[dict[str, Any]] = field(default_factory=list)
    intercepts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def balanced(self) -> bool:
        """Every program says that each of its segments has exactly one fate."""
        results = [*self.replays, *self.intercepts]
        return bool(results) and all(result.get("balanced") is True for result in results)

    @property
    def fastpath(self) -> str:
        """ "on" where every replay's fast path was; else why one's was not."""
        states = [result["ledger"].get("fastpath", {}).get("state", "?") for result in self.replays]
        return next((state for state in states if state != "on"), "on")

    @property
    def kernel_percent(self) -> float:
        """Share of all segments that never left the kernel; the lowest of all replays."""
        sections = [result["ledger"].get("fastpath", {}) for result in self.replays]
        return min((float(each.get("kernel_percent", 0)) for each in sections), default=0.0)


class Copying:
    """Copy services of the online hosts to the target, in one placement and family.

    ``ports`` are pairs (online, target). ``pool`` is a ``-c`` argument such as
    ``62.135.200.x``; ``pool_network`` what the target must route for it.
    """

    #: Added to every command line: for tests of everything with one thing switched.
    replay_options: ClassVar[Sequence[str]] = ()
    intercept_options: ClassVar[Sequence[str]] = ()

    def __init__(
        self,
        lab: Lab,
        placement: Placement,
        family: int,
        *,
        ports: Sequence[tuple[int, int]] = ((80, 8080),),
        online: Sequence[str] = ("online",),
        pool: str = "",
        pool_network: str = "",
        replay_arguments: Sequence[str] = (),
        intercept_arguments: Sequence[str] = (),
    ) -> None:
        self.lab = lab
        self.placement = placement
        self._route = pool_network or lab.prefix("client", family)
        target = lab.address("target", family)
        host = f"[{target}]" if family == 6 else target
        services = ",".join(f"{here}-{host}:{there}" for here, there in ports)
        arguments = ["replay", "-x", services]
        self.intercepts: list[Program] = []
        if placement is not Placement.SELF:
            arguments += ["-s", lab.address(placement.value, family)]
            sources = " or ".join(f"src port {there}" for _, there in ports)
            expression = f"tcp and {sources}" if len(ports) == 1 else f"tcp and ({sources})"
            line = ["intercept", "-i", DEVICE, "-F", expression, "--json"]
            line += [*self.intercept_options, *intercept_arguments]
            self.intercepts.append(Program(lab, placement.value, line))
        if pool:
            arguments += ["-c", pool]
        arguments += ["-i", DEVICE, "--json", *self.replay_options, *replay_arguments]
        self.replays = [Program(lab, role, arguments) for role in online]

    @property
    def programs(self) -> list[Program]:
        """All programs in the order in which they are started."""
        return [*self.intercepts, *self.replays]

    def commands(self) -> list[tuple[str, str]]:
        """Host and command line of everything that :meth:`start` does, in that order."""
        lines = [(program.role, str(program)) for program in self.programs]
        if self.placement is Placement.ASSISTANT:
            lines.insert(0, ("target", shlex.join(self.lab.route_command(self._route))))
        return lines

    def __enter__(self) -> "Copying":
        try:
            self.start()
        except BaseException:
            self.abandon()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self.abandon()

    def start(self) -> None:
        """Set the route, if need be, and start every program; PycopyError has what one said."""
        if self.placement is Placement.ASSISTANT:
            self.lab.route_through_assistant(self._route)
        for program in self.programs:
            program.start()

    def stop(self) -> Outcome:
        """Drain and end replay, then intercept; their results."""
        replays = [program.stop() for program in self.replays]
        return Outcome(replays, [program.stop() for program in self.intercepts])

    def abandon(self) -> None:
        """End whatever still runs and take the route back; does nothing after a clean stop."""
        for program in self.programs:
            program.kill()
        if self.placement is Placement.ASSISTANT:
            with contextlib.suppress(PycopyError):  # it was never set
                self.lab.route_through_assistant(self._route, on=False)


class LoadRun:
    """A load (:mod:`pycopy.lab.load`) running on the client."""

    def __init__(self, lab: Lab, family: int, role: str, port: int, *arguments: str) -> None:
        self._lab = lab
        number = len(list(lab.state_dir.glob("load-*")))
        self._out = lab.state_dir / f"load-{number}"
        self._err: Path = lab.state_dir / f"load-{number}.err"
        sources = ",".join(lab.addresses("client", family))
        command = python("pycopy.lab.load", "--source", sources)
        command += ["--host", lab.address(role, family), "--port", str(port), *arguments]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = lab.popen(
                "client", command, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )

    @property
    def running(self) -> bool:
        """True until the load's process has ended."""
        return self._process.poll() is None

    def result(self, timeout_s: float = 120) -> dict[str, Any]:
        """Wait for its end; what it measured, as Load.run() has it. Failed requests are in there;
        PycopyError is raised only if it broke off."""
        self._process.wait(timeout=timeout_s)
        try:
            return dict(json.loads(self._out.read_text()))
        except ValueError:
            raise PycopyError(f"the load broke off: {self._err.read_text()[-400:]}") from None


def wait_settled(
    reached: Callable[[], int], wanted: int, patience_s: float = 5.0, step_s: float = 0.02
) -> int:
    """Wait until ``reached()`` is ``wanted``, or has not moved for ``patience_s``."""
    last, moved_s = reached(), time.monotonic()
    while last < wanted and time.monotonic() - moved_s < patience_s:
        time.sleep(step_s)
        now = reached()
        if now != last:
            last, moved_s = now, time.monotonic()
    return last
