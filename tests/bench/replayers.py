"""Who replays: pycopy in its placements, and tcpcopy with intercept when they are on PATH.

A replayer is a list of programs, each on a host of the lab, started in order. Theirs are
built by the user; nothing of them is in this repository.
"""

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from pycopy.lab.copying import Copying, Placement
from pycopy.lab.topology import DEVICE, Lab

#: tcpcopy and intercept say nothing when they are ready.
SETTLE_S = 1.5


@dataclass
class Running:
    """A replayer at work: pids by part, and how to end it."""

    replay: list[int] = field(default_factory=list)
    intercept: list[int] = field(default_factory=list)
    balanced: bool | None = None

    def stop(self) -> None:
        """End it."""


class _Pycopy(Running):
    def __init__(self, lab: Lab, placement: Placement, options: tuple[str, ...]) -> None:
        super().__init__()
        self._copying = Copying(lab, placement, 4, replay_arguments=("-q", *options))
        self._copying.start()
        self.replay = [program.pid for program in self._copying.replays]
        self.intercept = [program.pid for program in self._copying.intercepts]

    def stop(self) -> None:
        self.balanced = self._copying.stop().balanced
        self._copying.abandon()


class _Tcpcopy(Running):
    def __init__(self, lab: Lab) -> None:
        super().__init__()
        self._lab = lab
        lab.route_through_assistant(lab.prefix("client", 4))
        target, assistant = lab.address("target", 4), lab.address("assistant", 4)
        log = Path(lab.state_dir)
        self._processes = [
            self._start("assistant", ["intercept", "-i", DEVICE, "-F", "tcp and src port 8080",
                                      "-l", str(log / "intercept.log")]),
            self._start("online", ["tcpcopy", "-x", f"80-{target}:8080", "-s", assistant,
                                   "-l", str(log / "tcpcopy.log")]),
        ]  # fmt: skip
        self.intercept, self.replay = ([each.pid] for each in self._processes)

    def _start(self, role: str, command: list[str]) -> subprocess.Popen[bytes]:
        command[0] = shutil.which(command[0]) or command[0]
        process = self._lab.popen(role, command, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        time.sleep(SETTLE_S)
        return process

    def stop(self) -> None:
        for process in reversed(self._processes):
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        self._lab.route_through_assistant(self._lab.prefix("client", 4), on=False)


def names() -> list[str]:
    """Every replayer that can run on this machine."""
    found = ["none", "pycopy-self", "pycopy-target", "pycopy-assistant"]
    if shutil.which("tcpcopy") and shutil.which("intercept"):
        found.append("tcpcopy")
    return found


def start(name: str, lab: Lab, options: tuple[str, ...] = ()) -> Running:
    """Start replayer ``name`` in ``lab``."""
    if name == "none":
        return Running()
    if name == "tcpcopy":
        return _Tcpcopy(lab)
    return _Pycopy(lab, Placement(name.removeprefix("pycopy-")), options)
