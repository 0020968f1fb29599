"""What a measurement costs: CPU time of the machine, of processes and of BPF programs; memory.

/proc/stat's user, system and softirq ticks are samples and up to six times wrong for short
work. So the machine is read from the time its cores were idle (NO_HZ kernels take that from
the clock, interrupts and softirqs excluded), processes from the scheduler's own clock
(schedstat), and BPF programs from the kernel's run statistics.
"""

import contextlib
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycopy.errors import HostUnfit
from pycopy.kernel import syscall
from pycopy.lab.topology import ROLES

_TICKS = os.sysconf("SC_CLK_TCK")


def task_ns(pid: int) -> int:
    """CPU time of every thread of ``pid`` so far; 0 once it is gone."""
    total = 0
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total


def tree(pid: int) -> list[int]:
    """``pid`` and all its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        children = []
    return [pid, *(each for child in children for each in tree(int(child)))]


def trees_ns(pids: Iterable[int]) -> int:
    """CPU time of these processes and all their descendants."""
    return sum(task_ns(each) for pid in pids for each in tree(pid))


def peak_kb(pids: Iterable[int]) -> int:
    """The most that was ever resident of these processes and their descendants."""
    total = 0
    for pid in (each for root in pids for each in tree(root)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
            total += int(found[1]) if found else 0
    return total


@dataclass
class Moment:
    """The machine's clocks at one instant."""

    wall_s: float
    idle_s: float  #: sum over the cores, waiting for a disk included
    stolen_s: float  #: taken by the hypervisor: counts as busy, and should be 0

    @classmethod
    def now(cls) -> "Moment":
        idle_s = float(Path("/proc/uptime").read_text().split()[1])
        fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
        return cls(time.monotonic(), idle_s + int(fields[4]) / _TICKS, int(fields[7]) / _TICKS)

    def busy_ns_since(self, before: "Moment") -> int:
        """Cores x wall time, less idle time; the kernel prints it to 10 ms."""
        wall_s = (self.wall_s - before.wall_s) * (os.cpu_count() or 1)
        return int((wall_s - (self.idle_s - before.idle_s)) * 1e9)

    def idle_share_since(self, before: "Moment") -> float:
        """0 is a machine that is full."""
        cores_ns = (self.wall_s - before.wall_s) * 1e9 * (os.cpu_count() or 1)
        return max(0.0, 1 - self.busy_ns_since(before) / cores_ns)


class Programs:
    """The BPF programs that some processes hold, directly or by a link.

    Found by their descriptors and not by name: other copies of a replayer may run elsewhere
    on the machine. Each is held open from here on, so that its times outlive its owner.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._fds: dict[int, int] = {}
        for pid in (each for root in pids for each in tree(root)):
            for ident in _program_ids(pid):
                if ident not in self._fds:
                    with contextlib.suppress(OSError):
                        self._fds[ident] = syscall.program_fd_by_id(ident)

    def ran(self) -> tuple[int, int]:
        """Nanoseconds and number of runs so far; they stand still without statistics."""
        infos = [syscall.program_info(fd) for fd in self._fds.values()]
        return sum(info.run_time_ns for info in infos), sum(info.run_count for info in infos)

    def names(self) -> list[str]:
        return sorted(syscall.program_info(fd).name for fd in self._fds.values())

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def _program_ids(pid: int) -> set[int]:
    found = set()
    try:
        for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
            with contextlib.suppress(OSError):
                found |= {int(one) for one in re.findall(r"prog_id:\s*(\d+)", entry.read_text())}
    except OSError:
        pass
    return found


@contextlib.contextmanager
def run_statistics(on: bool) -> Any:
    """The kernel times every run of every BPF program; costs about 0.05 us a run."""
    fd = syscall.enable_run_stats() if on else -1
    try:
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def background(seconds: float = 1.0) -> float:
    """Share of the machine that is busy while this process waits."""
    before = Moment.now()
    time.sleep(seconds)
    return 1 - Moment.now().idle_share_since(before)


def idle_clock_error(background_share: float, seconds: float = 2.0) -> float:
    """How far the idle clock is off: bursts of work far shorter than a tick, held against it.

    0 is exact; waking up is no work of this process, so a few per cent are as they should be.
    """
    before, used_ns = Moment.now(), time.process_time_ns()
    end_s = before.wall_s + seconds
    while time.monotonic() < end_s:
        burst_end_s = time.monotonic() + 300e-6
        while time.monotonic() < burst_end_s:
            pass
        time.sleep(300e-6)
    used_ns = time.process_time_ns() - used_ns
    after = Moment.now()
    cores_ns = (after.wall_s - before.wall_s) * 1e9 * (os.cpu_count() or 1)
    return (after.busy_ns_since(before) - background_share * cores_ns) / used_ns - 1


def apart() -> dict[str, list[int]]:
    """CPUs of each role of a lab: the online host on one half of them, all others on the other.

    What the target does then delays the service no more than another machine would, and
    what is left on its half is what replay costs there. Raises HostUnfit with one CPU.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise HostUnfit(
            "hosts on CPUs of their own need two of them", "use a machine with more, or no --half"
        )
    near, far = cpus[: len(cpus) // 2], cpus[len(cpus) // 2 :]
    return {role: near if role == "online" else far for role in ROLES}


def describe() -> dict[str, Any]:
    """The machine, as far as it matters for what is measured here."""
    return {
        "cpu": _first(r"model name\s*: (.*)", "/proc/cpuinfo"),
        "cores": os.cpu_count(),
        "virtual": bool(re.search(r"\bhypervisor\b", Path("/proc/cpuinfo").read_text())),
        "memory_mb": int(_first(r"MemTotal:\s+(\d+)", "/proc/meminfo") or 0) // 1024,
        "kernel": platform.release(),
        "system": _first(r'PRETTY_NAME="(.*)"', "/etc/os-release"),
        "python": platform.python_version(),
        "nginx": _said("nginx", "-v").partition("/")[2],
        "clocksource": _first(
            "(.*)", "/sys/devices/system/clocksource/clocksource0/current_clocksource"
        ),
        "rmem_max": int(_first("(.*)", "/proc/sys/net/core/rmem_max") or 0),
    }


def one_line(machine: dict[str, Any]) -> str:
    kind = "virtual, " if machine["virtual"] else ""
    return (
        f"{machine['cores']} x {machine['cpu']}, {kind}{machine['memory_mb']} MB, "
        f"{machine['system']}, Linux {machine['kernel']}, Python {machine['python']}, "
        f"nginx {machine['nginx']}"
    )


def _first(pattern: str, path: str) -> str:
    try:
        found = re.search(pattern, Path(path).read_text())
    except OSError:
        found = None
    return found[1].strip() if found else ""


def _said(*command: str) -> str:
    binary = shutil.which(command[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if binary is None:
        return ""
    done = subprocess.run([binary, *command[1:]], capture_output=True, text=True, timeout=10)
    return (done.stdout + done.stderr).strip()
