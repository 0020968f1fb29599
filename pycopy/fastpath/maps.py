"""The maps that the programs of the fast path share (bpf/maps.h), made before any of them.

Their shapes are in pycopy/kernel/shapes.py; how many entries they have, the run and the host say.
"""

import errno
import mmap
import os
from collections.abc import Mapping

from pycopy.command.config import BACKLOG_BYTES
from pycopy.kernel import abi, shapes, syscall
from pycopy.kernel.abi import Constant
from pycopy.kernel.module import Map, lift_memory_limit, map_refused

#: What all logs of sent segments take together unless said otherwise, and one at least.
LOG_TOTAL_BYTES = BACKLOG_BYTES
LOG_MIN_BYTES = 1 << 20

#: Sessions that the kernel keeps at a time, those in TIME_WAIT among them.
SLOTS_MAX = 1 << 16

#: Connections remembered after their end, as in pycopy.session.admission.
ENDED_MAX = 1 << 16

#: Connections online whose next segments are user space's although their session is over.
DISOWNED_MAX = 1 << 15

#: Sessions that wait for user space to fetch them; the timer comes by again for the others.
ATTENTION_MAX = 4096


def log_bytes(cpus: int, total_bytes: int = 0) -> int:
    """Bytes of one CPU's log, a power of two; ``total_bytes`` for all (0: the default)."""
    share = max((total_bytes or LOG_TOTAL_BYTES) // cpus, LOG_MIN_BYTES)
    return 1 << (share.bit_length() - 1)


class Maps:
    """All of them, by the names in bpf/maps.h in small letters; ``close`` gives them up."""

    def __init__(self, services: int, max_sessions: int, total_log_bytes: int = 0) -> None:
        cpus = syscall.possible_cpus()
        self.cpus = cpus
        self.log_bytes = log_bytes(cpus, total_log_bytes)
        self.slots = min(max_sessions, SLOTS_MAX)
        self._fds: dict[str, int] = {}
        self._log: mmap.mmap | None = None
        lift_memory_limit()
        try:
            for name, entries in self._entries(services, max_sessions).items():
                if name == "log":
                    self._make_log(entries)
                else:
                    self._make(name, entries)
        except BaseException:
            self.close()
            raise
        self.by_name = {name: Map(fd) for name, fd in self._fds.items()}

    def _entries(self, services: int, max_sessions: int) -> dict[str, int]:
        """How many each map has; 0: as its shape says."""
        slots = self.slots
        return {
            "sessions": slots,
            # Room for sessions of user space's own as well, and for what was theirs just now.
            "flows": slots + max_sessions + DISOWNED_MAX + 1,
            "targets": slots + 2 * max_sessions,
            "ended": ENDED_MAX,
            "slots": slots,
            "lingering": 2 * slots,
            "pending": -(-slots // abi.PENDING_SLOTS),
            "log": self.cpus,
            "hops": services,
            "config": 0,
            "fast_counts": 0,
            "work": 0,
            "attention": ATTENTION_MAX,
            "ports": 0,
            "next_port": services,
            "pool": 0,
        }

    @property
    def log_value_bytes(self) -> int:
        """One CPU's log: head, ring, and room for a record that begins at its very end."""
        return abi.LOG_HEAD.size + self.log_bytes + abi.LOG_ROOM

    def _make_log(self, cpus: int) -> None:
        """As large as asked for, or as the kernel takes: old ones have no value above 4 MB."""
        while True:
            try:
                self._fds["log"] = shapes.make("log", cpus, self.log_value_bytes)
                return
            except OSError as error:
                if error.errno != errno.E2BIG or self.log_bytes <= LOG_MIN_BYTES:
                    raise map_refused("log", error) from error
            self.log_bytes //= 2

    def _make(self, name: str, entries: int) -> None:
        try:
            self._fds[name] = shapes.make(name, entries)
        except OSError as error:
            raise map_refused(name, error) from error

    @property
    def log(self) -> mmap.mmap:
        """All logs, mapped when first asked for: what is mapped counts as resident memory."""
        if self._log is None:
            page = mmap.PAGESIZE
            total = -(-(self._stride() * self.cpus) // page) * page
            self._log = mmap.mmap(self._fds["log"], total, prot=mmap.PROT_READ)
        return self._log

    def _stride(self) -> int:
        return -(-self.log_value_bytes // 8) * 8

    def log_at(self, cpu: int) -> int:
        """Where the log of ``cpu`` begins in ``log``."""
        return cpu * self._stride()

    @property
    def given(self) -> Mapping[str, int]:
        """For pycopy.loader.load()."""
        return self._fds

    @property
    def constants(self) -> dict[Constant, int]:
        """What the programs are linked with."""
        return {Constant.LOG_MASK: self.log_bytes - 1, Constant.SLOTS: self.slots}

    def close(self) -> None:
        """Unmap the logs and close the descriptors; what programs use stays until they are gone."""
        if self._log is not None:
            self._log.close()
            self._log = None
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
