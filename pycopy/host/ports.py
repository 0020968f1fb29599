"""Which ports the copies of the zero-route mode may use.

Outside the kernel's ephemeral range, so that no connection of this host is ever given one;
well above the registered services; and none that any socket of this host uses now, or that
is copied: what the target answers to one would be captured as a client's. They are not
bound: a production service that starts later and wants one must get it, and only responses of
the targets themselves to these ports are ever swallowed.
"""

import fcntl
import os
import struct
import time
from collections.abc import Iterable
from pathlib import Path

from pycopy.errors import PycopyError, UsageError

#: The file of the network namespace itself: everybody in it, and nobody else, has this one.
_NAMESPACE = "/proc/self/ns/net"
#: struct flock: type, whence, start, length, process; as the compiler lays it out.
_FLOCK = struct.Struct("hhqqi0q")
#: How long another replay may be between looking and taking.
_TURN_S = 5.0

LOWEST = 10_000
HIGHEST = 65_535
FEWEST = 64


def ephemeral_range() -> tuple[int, int]:
    """The kernel's ip_local_port_range, both ends included (IPv6 uses the same)."""
    low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    return int(low), int(high)


def ports_in_use() -> set[int]:
    """Local ports of every TCP socket of this network namespace, listening or not."""
    used = set()
    for name in ("tcp", "tcp6"):
        table = Path("/proc/net", name)
        if table.exists():
            for line in table.read_text().splitlines()[1:]:
                used.add(int(line.split()[1].rpartition(":")[2], 16))
    return used


def choose_range(wanted: tuple[int, int] | None) -> tuple[int, int]:
    """The range to take ports from: ``wanted`` (--ports), else the wider one beside the
    ephemeral range. Raises UsageError if ``wanted`` overlaps it."""
    low, high = ephemeral_range()
    if wanted is not None:
        if wanted[0] <= high and wanted[1] >= low:
            raise UsageError(
                f"--ports {wanted[0]}-{wanted[1]} overlaps the host's ephemeral ports {low}-{high}",
                "its own connections could be given one of them; choose ports outside that range",
            )
        return wanted
    below, above = (LOWEST, low - 1), (high + 1, HIGHEST)
    best = max(below, above, key=lambda ends: ends[1] - ends[0])
    if best[1] - best[0] + 1 < FEWEST:
        raise PycopyError(
            f"this host's ephemeral ports {low}-{high} leave no room for copies",
            "narrow net.ipv4.ip_local_port_range, or use another placement of the intercept (-s)",
        )
    return best


def hold_range(ends: tuple[int, int]) -> int:
    """Keep other replays of this network namespace off the range, until the process ends.

    Byte N of the namespace's own file stands for port N: nothing is made in any file system,
    so a read-only one, or no privilege there, is not in the way, and nothing is left behind.
    Returns the descriptor that holds it. Raises PycopyError if another replay has some of it.
    """
    lock = os.open(_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # It cannot be opened for writing, so the lock that stays is one for reading, which does
        # not exclude others: looking and taking are made one by a lock of the whole file.
        _wait_turn(lock)
        size = ends[1] - ends[0] + 1
        wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, ends[0], size, 0)
        found, *_ = _FLOCK.unpack(fcntl.fcntl(lock, fcntl.F_OFD_GETLK, wanted))
        if found != fcntl.F_UNLCK:
            raise PycopyError(
                f"another replay on this host copies from ports of {ends[0]}-{ends[1]}",
                "give each a range of its own, such as --ports 10000-19999 and --ports 20000-29999",
            )
        mine = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, ends[0], size, 0)
        fcntl.fcntl(lock, fcntl.F_OFD_SETLK, mine)
        fcntl.flock(lock, fcntl.LOCK_UN)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _wait_turn(lock: int) -> None:
    until_s = time.monotonic() + _TURN_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until_s:
                raise PycopyError(
                    f"another process has held a lock on {_NAMESPACE} for {_TURN_S:.0f} s",
                    "see which with lslocks, and end it",
                ) from None
        time.sleep(0.001)


def choose_ports(ends: tuple[int, int], copied: Iterable[int] = ()) -> list[int]:
    """The ports from ``ends[0]`` to ``ends[1]`` that no socket of this host uses, without those
    of ``copied``; raises PycopyError if none is left."""
    used = ports_in_use().union(copied)
    ports = [port for port in range(ends[0], ends[1] + 1) if port not in used]
    if not ports:
        raise PycopyError(
            f"every port of {ends[0]}-{ends[1]} is in use on this host, or copied (-x)",
            "give another range with --ports",
        )
    return ports
