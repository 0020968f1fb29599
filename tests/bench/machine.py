"""What a measurement costs: CPU time of processes and of the whole machine.

/proc/stat's ticks are samples and up to six times wrong for short work. Processes are read
from the scheduler's own clock (schedstat), the machine from the time its cores were idle.
"""

import os
import platform
import time
from pathlib import Path


def task_ns(pid: int) -> int:
    """CPU time of every thread of ``pid`` so far; 0 once it is gone."""
    total = 0
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    except (FileNotFoundError, ProcessLookupError):
        pass
    return total


def tree_ns(pid: int) -> int:
    """CPU time of ``pid`` and all its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        children = []
    return task_ns(pid) + sum(tree_ns(int(child)) for child in children)


def resident_kb(pid: int) -> int:
    """Resident memory of ``pid``."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


class Busy:
    """CPU time the machine was not idle, since construction."""

    def __init__(self) -> None:
        self._wall_s, self._idle_s = time.monotonic(), self._idle()

    @staticmethod
    def _idle() -> float:
        return float(Path("/proc/uptime").read_text().split()[1])

    def busy_ns(self) -> int:
        """Cores x wall time, less idle time."""
        wall_s = (time.monotonic() - self._wall_s) * (os.cpu_count() or 1)
        return int((wall_s - (self._idle() - self._idle_s)) * 1e9)


def describe() -> str:
    """The machine in one line."""
    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    system = f"Linux {platform.release()}, Python {platform.python_version()}"
    return f"{os.cpu_count()} x {model}, {system}"
