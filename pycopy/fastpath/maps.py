"""The maps that the programs of the fast path share (bpf/maps.h), made before any of them.

Each program is compiled by a child process of its own; the maps are made here, inherited by
the child, and named in the text by the numbers of their descriptors (PYCOPY_MAP_*).
"""

import mmap
import os

from pycopy import abi, link
from pycopy.loader import Map

#: What all logs of sent segments take together unless said otherwise, and one at least.
LOG_TOTAL_BYTES = 64 << 20
LOG_MIN_BYTES = 1 << 20

#: Sessions that the kernel keeps at a time, those in TIME_WAIT among them.
SLOTS_MAX = 1 << 16

#: Connections remembered after their end, as in pycopy.session.admission.
ENDED_MAX = 1 << 16

#: Connections online whose next segments are user space's although their session is over.
DISOWNED_MAX = 1 << 15

PORTS_MAX = 1 << 16

ATTENTION_BYTES = 1 << 16


def log_bytes(cpus: int, total_bytes: int = 0) -> int:
    """Bytes of one CPU's log, a power of two; ``total_bytes`` for all (0: the default)."""
    share = max((total_bytes or LOG_TOTAL_BYTES) // cpus, LOG_MIN_BYTES)
    return 1 << (share.bit_length() - 1)


class Maps:
    """All of them, by the names in bpf/maps.h in small letters; ``close`` gives them up."""

    def __init__(self, services: int, max_sessions: int, total_log_bytes: int = 0) -> None:
        cpus = link.possible_cpus()
        self.cpus = cpus
        self.log_bytes = log_bytes(cpus, total_log_bytes)
        self.slots = min(max_sessions, SLOTS_MAX)
        #: One CPU's log: head, ring, and room for a record that begins at its very end.
        self.log_value_bytes = abi.LOG_HEAD.size + self.log_bytes + abi.LOG_ROOM
        key, flow, slots = abi.KEY.size, abi.FLOW.size, self.slots
        self._fds: dict[str, int] = {}
        self._log: mmap.mmap | None = None
        try:
            make = self._make
            make("sessions", link.ARRAY, 4, abi.KERNEL_SESSION.size, slots, lock_first=True)
            # Room for sessions of user space's own as well, and for what was theirs just now.
            flows = slots + max_sessions + DISOWNED_MAX + 1
            make("flows", link.HASH, key, flow, flows, link.NO_PREALLOC)
            make("targets", link.HASH, key, flow, slots + 2 * max_sessions, link.NO_PREALLOC)
            make("ended", link.LRU_HASH, key, 4, ENDED_MAX)
            make("slots", link.STACK, 0, 4, slots)
            make("lingering", link.QUEUE, 0, abi.LINGERING.size, 2 * slots)
            make("pending", link.ARRAY, 4, 8, -(-slots // 64))
            make("log", link.ARRAY, 4, self.log_value_bytes, cpus, link.MMAPABLE)
            make("hops", link.ARRAY, 4, abi.HOP.size, services)
            make("config", link.ARRAY, 4, abi.FAST_CONFIG.size, 1)
            make("counts", link.PERCPU_ARRAY, 4, 8 * abi.FAST_COUNTS, 1)
            make("work", link.PERCPU_ARRAY, 4, abi.WORK_BYTES, 1)
            make("attention", link.RINGBUF, 0, 0, ATTENTION_BYTES)
            make("ports", link.ARRAY, 4, 2, PORTS_MAX)
            make("next_port", link.ARRAY, 4, 8, services)
            make("pool", link.ARRAY, 4, abi.POOL.size, 2 * (abi.POOL_NETWORKS + 1))
        except BaseException:
            self.close()
            raise
        self.by_name = {name: Map(fd) for name, fd in self._fds.items()}

    def _make(
        self, name: str, kind: int, key_bytes: int, value_bytes: int, entries: int,
        flags: int = 0, lock_first: bool = False,
    ) -> None:  # fmt: skip
        self._fds[name] = link.map_create(
            kind, f"pycopy_{name}", key_bytes, value_bytes, entries, flags, lock_first
        )

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
    def fds(self) -> list[int]:
        return list(self._fds.values())

    def defines(self) -> dict[str, int | str]:
        """What the programs' text must know of the maps."""
        fds: dict[str, int | str] = {
            f"PYCOPY_MAP_{name.upper()}": fd for name, fd in self._fds.items()
        }
        return {
            "PYCOPY_FASTPATH": 1,
            "PYCOPY_LOG_BYTES": self.log_bytes,
            "PYCOPY_SLOTS": self.slots,
            **fds,
        }

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
