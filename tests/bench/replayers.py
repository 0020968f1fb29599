"""A replayer at work in a lab: its programs started in order, their pids, their end.

What is run is said by catalogue.py; this waits until each program shows that it is ready,
keeps what it prints, and reads the ledger of those that have one.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pycopy.errors import PycopyError
from pycopy.lab.topology import DEVICE, Lab

from .catalogue import Program, Replayer

SERVICE_PORT, TARGET_PORT = 80, 8080
_READY_S = 30.0
_STOP_S = 30.0
_ESTABLISHED, _LISTEN = "01", "0A"


class Running:
    """``with Running(replayer, lab) as running``: it replays until :meth:`stop`."""

    def __init__(self, replayer: Replayer, lab: Lab) -> None:
        self.replayer = replayer
        self.balanced: bool | None = None
        self.problems: list[str] = []
        self.ledgers: list[dict[str, Any]] = []
        self._lab = lab
        self._started: list[tuple[Program, subprocess.Popen[bytes], Path]] = []

    def __enter__(self) -> "Running":
        adapter = self.replayer.adapter
        if adapter.route_through_assistant:
            self._lab.route_through_assistant(self._lab.prefix("client", 4))
        try:
            for program in adapter.programs:
                self._start(program)
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._kill()

    def pids(self, part: str = "") -> list[int]:
        """Of one part, or of all that still run."""
        return [
            process.pid
            for program, process, _ in self._started
            if part in ("", program.part) and process.poll() is None
        ]

    def stop(self) -> None:
        """End replay, then intercept; whoever has a ledger must come to a good end."""
        for program, process, output in reversed(self._started):
            if process.poll() is not None:
                self.problems.append(self._said(program, output, "had ended by itself"))
            else:
                process.send_signal(signal.Signals[f"SIG{program.stop}"])
            try:
                process.wait(timeout=_STOP_S)
            except subprocess.TimeoutExpired:
                self.problems.append(self._said(program, output, "had to be killed"))
                process.kill()
                process.wait()
            if program.ledger:
                self._read_ledger(program, process.returncode, output)
        self._started.clear()

    def _kill(self) -> None:
        for _, process, _ in self._started:
            process.kill()
            process.wait()
        self._started.clear()

    def _start(self, program: Program) -> None:
        lab = self._lab
        output = lab.state_dir / f"replayer-{len(self._started)}-{program.part}"
        words = {
            "python": sys.executable,
            "device": DEVICE,
            "service_port": SERVICE_PORT,
            "target_port": TARGET_PORT,
            "clients": lab.prefix("client", 4),
            "log": f"{output}.log",
            **{role: lab.address(role, 4) for role in lab.roles},
        }
        command = self.replayer.command(program.argv, words)
        with Path(f"{output}.out").open("wb") as out, Path(f"{output}.err").open("wb") as err:
            process = lab.popen(
                program.host, command, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
        self._started.append((program, process, output))
        deadline_s = time.monotonic() + _READY_S
        while not self._is_ready(program, output):
            if process.poll() is not None:
                what = f"ended with status {process.returncode}"
                raise PycopyError(self._said(program, output, what))
            if time.monotonic() > deadline_s:
                raise PycopyError(self._said(program, output, f"not ready in {_READY_S:.0f} s"))
            time.sleep(0.02)
        time.sleep(program.settle_s)

    def _is_ready(self, program: Program, output: Path) -> bool:
        how, _, what = program.ready.partition(" ")
        if how == "says":
            lines = Path(f"{output}.err").read_text(errors="replace").splitlines()
            return any(line.startswith(what) for line in lines)
        if how == "listens":
            return any(local == int(what) for local, _ in self._ports(program.host, _LISTEN))
        if how == "connects":
            return any(peer == int(what) for _, peer in self._ports(program.host, _ESTABLISHED))
        return True

    def _ports(self, host: str, state: str) -> Iterator[tuple[int, int]]:
        """Local and remote port of the host's TCP sockets in that state."""
        with self._lab.inside(host):
            text = "".join(
                Path(f"/proc/thread-self/net/{table}").read_text() for table in ("tcp", "tcp6")
            )
        for fields in map(str.split, text.splitlines()):
            if len(fields) > 3 and fields[3] == state:
                yield tuple(int(field.rpartition(":")[2], 16) for field in fields[1:3])  # type: ignore[misc]

    def _read_ledger(self, program: Program, status: int, output: Path) -> None:
        try:
            ledger = json.loads(Path(f"{output}.out").read_text().splitlines()[-1])
            good = ledger.get("balanced") is True and status == 0
        except (ValueError, IndexError):
            good = False
        else:
            if program.part == "replay":
                self.ledgers.append(ledger)
        self.balanced = good and self.balanced is not False
        if not good:
            self.problems.append(self._said(program, output, f"ended with status {status}"))

    def _said(self, program: Program, output: Path, what: str) -> str:
        lines = []
        for suffix in ("err", "log"):
            path = Path(f"{output}.{suffix}")
            if path.exists():
                lines += path.read_text(errors="replace").strip().splitlines()[-6:]
        said = "\n    ".join(lines) or "nothing"
        return (
            f"{self.replayer.name}: {program.part} on {program.host} {what}; it said:\n    {said}"
        )
