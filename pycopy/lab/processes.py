"""Processes of a lab: who they are beyond their number, which run where, and their end.

System calls, /proc and signals; knows nothing of labs but the files of their namespaces.

Tests: tests/lab/test_lab.py
"""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Collection, Iterable
from pathlib import Path

_TERM_S = 1.0
_KILL_S = 5.0

# linux/sched.h, linux/prctl.h
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def set_network(fd: int) -> None:
    """Put the calling thread into the network namespace that is open as ``fd``; raises OSError."""
    # os.setns exists from Python 3.12 only.
    if _libc.setns(fd, _CLONE_NEWNET) < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"setns: {os.strerror(errno)}")


def end_with_parent() -> None:
    """Between fork and exec: get SIGTERM when the parent dies, whatever killed it."""
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def identity(pid: int) -> str:
    """Number and start time: a later process may get the same number, not both."""
    fields = _stat_fields(pid)
    return f"{pid} {fields[19] if fields else 0}"


def runs(text: str) -> bool:
    """Whether the process of which :func:`identity` said ``text`` is still there."""
    return bool(text.strip()) and identity(int(text.split()[0])) == text.strip()


def inside(namespaces: Iterable[Path]) -> list[int]:
    """Processes, other than this one, whose network is one of these namespace files."""
    wanted = set()
    for path in namespaces:
        with contextlib.suppress(OSError):
            wanted.add(_file_id(path))
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if _file_id(entry / "ns/net") in wanted:
                    found.append(int(entry.name))
    return sorted(found)


def is_inside(namespaces: Iterable[Path]) -> bool:
    """Whether this very process runs in one of them."""
    here = _file_id(Path("/proc/self/ns/net"))
    return any(path.exists() and _file_id(path) == here for path in namespaces)


def kill_groups(recorded: Iterable[str]) -> list[int]:
    """Kill the process groups that these identities lead and that are still theirs."""
    ended = []
    for line in recorded:
        if runs(line):
            ended.append(int(line.split()[0]))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ended[-1], signal.SIGKILL)
    _wait_gone(ended, _KILL_S)
    return ended


def end_inside(namespaces: Collection[Path]) -> list[int]:
    """End whatever runs in the namespaces: SIGTERM, SIGKILL for what does not mind it."""
    ended: dict[int, None] = {}
    for number, patience_s in ((signal.SIGTERM, _TERM_S), (signal.SIGKILL, _KILL_S)):
        pids = inside(namespaces)
        ended |= dict.fromkeys(pids)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        _wait_gone(pids, patience_s)
    return list(ended)


def _wait_gone(pids: Iterable[int], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)


def _file_id(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _stat_fields(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def is_alive(pid: int) -> bool:
    """A zombie is not: it only waits for its parent to look."""
    fields = _stat_fields(pid)
    return bool(fields) and fields[0] != "Z"
