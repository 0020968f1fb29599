"""Who replays in the cases: pycopy in its placements, tcpcopy with intercept if on PATH.

A replayer is a list of programs, each on a host of the lab, started in order. Theirs are
built by the user; nothing of them is in this repository.
"""

import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pycopy.lab.copying import Copying, Outcome, Placement
from pycopy.lab.topology import DEVICE, Lab

#: tcpcopy and intercept say nothing when they are ready.
SETTLE_S = 1.5
#: Online port, target port.
Ports = Sequence[tuple[int, int]]
WEB: Ports = ((80, 8080),)


@dataclass
class Running:
    """A replayer at work: pids by part, and how to end it."""

    replay: list[int] = field(default_factory=list)
    intercept: list[int] = field(default_factory=list)
    balanced: bool | None = None
    outcome: Outcome | None = None

    def ended(self) -> str:
        """Which of its programs ended by themselves, and how; "" as it should be."""
        return ""

    def stop(self) -> None:
        """End it, cleanly where it knows how to."""

    def abandon(self) -> None:
        """End it in any case; nothing is left of it."""


class _Pycopy(Running):
    def __init__(
        self, lab: Lab, placement: Placement, options: tuple[str, ...], ports: Ports
    ) -> None:
        super().__init__()
        self._copying = Copying(lab, placement, 4, ports=ports, replay_arguments=("-q", *options))
        try:
            self._copying.start()
        except BaseException:
            self._copying.abandon()
            raise
        self.replay = [program.pid for program in self._copying.replays]
        self.intercept = [program.pid for program in self._copying.intercepts]

    def ended(self) -> str:
        return _ended({str(each): each.process for each in self._copying.programs})

    def stop(self) -> None:
        try:
            self.outcome = self._copying.stop()
            self.balanced = self.outcome.balanced
        finally:
            self._copying.abandon()

    def abandon(self) -> None:
        self._copying.abandon()


class _Tcpcopy(Running):
    def __init__(self, lab: Lab, ports: Ports) -> None:
        super().__init__()
        self._lab = lab
        self._processes: list[subprocess.Popen[bytes]] = []
        services = ",".join(f"{here}-{lab.address('target', 4)}:{there}" for here, there in ports)
        sources = " or ".join(f"src port {there}" for _, there in ports)
        lab.route_through_assistant(lab.prefix("client", 4))
        log = Path(lab.state_dir)
        try:
            self._start("assistant", ["intercept", "-i", DEVICE, "-F", f"tcp and ({sources})",
                                      "-l", str(log / "intercept.log")])  # fmt: skip
            self._start("online", ["tcpcopy", "-x", services, "-s", lab.address("assistant", 4),
                                   "-l", str(log / "tcpcopy.log")])  # fmt: skip
        except BaseException:
            self.abandon()
            raise
        self.intercept, self.replay = ([each.pid] for each in self._processes)

    def _start(self, role: str, command: list[str]) -> None:
        command[0] = shutil.which(command[0]) or command[0]
        process = self._lab.popen(role, command, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        self._processes.append(process)
        time.sleep(SETTLE_S)

    def ended(self) -> str:
        return _ended(dict(zip(("intercept", "tcpcopy"), self._processes, strict=False)))

    def stop(self) -> None:
        self.abandon()

    def abandon(self) -> None:
        # They have no end but this one that could be relied on.
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        self._processes.clear()
        self._lab.route_through_assistant(self._lab.prefix("client", 4), on=False)


def _ended(processes: Mapping[str, subprocess.Popen[bytes] | None]) -> str:
    return "; ".join(
        f"{name} ended with status {process.returncode}"
        for name, process in processes.items()
        if process is not None and process.poll() is not None
    )


def names() -> list[str]:
    """Every replayer that can run on this machine."""
    found = ["none", "pycopy-self", "pycopy-target", "pycopy-assistant"]
    if shutil.which("tcpcopy") and shutil.which("intercept"):
        found.append("tcpcopy")
    return found


def placement(name: str) -> Placement:
    """Where ``name`` takes the target's responses; tcpcopy knows the assistant only."""
    return Placement.ASSISTANT if name == "tcpcopy" else Placement(name.removeprefix("pycopy-"))


def start(name: str, lab: Lab, options: tuple[str, ...] = (), ports: Ports = WEB) -> Running:
    """Start replayer ``name`` in ``lab``, copying these ports; ``options`` are pycopy's."""
    if name == "none":
        return Running()
    if name == "tcpcopy":
        return _Tcpcopy(lab, ports)
    return _Pycopy(lab, placement(name), options, ports)
