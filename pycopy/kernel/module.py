"""Loaded programs and their maps, by their descriptors; what making one can fail of.

Tests: tests/bpf/test_loader.py
"""

import contextlib
import errno
import os
import resource
import sys
from collections.abc import Mapping

from pycopy.errors import HostUnfit, PycopyError
from pycopy.host import privileges
from pycopy.kernel import objects, shapes, syscall


class Map:
    """One map, by its descriptor; keys and values are raw bytes."""

    def __init__(self, fd: int) -> None:
        info = syscall.map_info(fd)
        self.fd = fd
        self.key_bytes = info.key_bytes
        self.max_entries = info.max_entries
        self.value_bytes = info.value_bytes
        self._lookup_bytes = info.value_bytes
        if info.type in syscall.PERCPU_MAP_TYPES:
            self._lookup_bytes = (info.value_bytes + 7 & ~7) * syscall.possible_cpus()

    def lookup(self, key: bytes) -> bytes | None:
        """The value, all CPUs' values (each padded to 8 bytes) one after the other, or None."""
        return syscall.map_lookup(self.fd, key, self._lookup_bytes)

    def update(self, key: bytes, value: bytes) -> None:
        """Set the value under ``key``; raises OSError (E2BIG: the map is full)."""
        syscall.map_update(self.fd, key, value)

    def delete(self, key: bytes) -> bool:
        """Whether there was an entry to delete."""
        return syscall.map_delete(self.fd, key)

    def sum_percpu(self, index: int) -> int:
        """The u64 at ``index`` of a per-CPU array, summed over the CPUs; raises IndexError."""
        value = self.lookup(index.to_bytes(4, sys.byteorder))
        if value is None:
            raise IndexError(index)
        return sum(memoryview(value).cast("Q"))


class Module:
    """Programs and their maps; they live in the kernel until closed here and detached.

    ``program_fd`` is the first of ``program_fds``, by name: nearly always the only one. Of
    ``maps`` those that were made before stay their makers'.
    """

    def __init__(
        self, name: str, program_fds: dict[str, int], map_fds: dict[str, int],
        given: Mapping[str, int],
    ) -> None:  # fmt: skip
        self.hook_xdp = objects.CATALOGUE[name].xdp
        self.program_name, self.program_fd = next(iter(program_fds.items()))
        self.program_fds = program_fds
        self.maps = {each: Map(fd) for each, fd in {**map_fds, **given}.items()}
        self._own_fds = [*program_fds.values(), *map_fds.values()]

    def close(self) -> None:
        """Close the descriptors. An attached program runs on until its attachment is closed."""
        for fd in self._own_fds:
            os.close(fd)
        self._own_fds = []
        self.program_fd = -1
        self.program_fds = {}
        self.maps = {}


def make_map(name: str, entries: int = 0, perf: bool = False) -> int:
    """The descriptor of a new map of shapes.SHAPES; raises PycopyError."""
    try:
        return shapes.make(name, entries, perf=perf)
    except OSError as error:
        raise map_refused(name, error) from error


def map_refused(name: str, error: OSError) -> PycopyError:
    """Why a map could not be made, for a user."""
    if error.errno == errno.EPERM:
        return no_privileges(error)
    if error.errno in (errno.ENOMEM, errno.E2BIG):
        return HostUnfit(
            f"there is no memory for the map {name}: {error.strerror}",
            "give it a smaller --ring or --backlog, or the service or container more memory",
        )
    if error.errno == errno.EMFILE:
        return HostUnfit(
            "this process may not open more files", "raise the limit of open files (ulimit -n)"
        )
    return HostUnfit(
        f"the kernel does not make the map {name}: {error.strerror}",
        "see README, Limits, for the kernels that pycopy was run on",
    )


def no_privileges(error: OSError) -> HostUnfit:
    """The kernel refuses bpf(2) itself."""
    return HostUnfit(f"the kernel refuses bpf(2) here: {error.strerror}", privileges.cure())


def lift_memory_limit() -> None:
    """Before Linux 5.11 maps count as locked memory of ours, of which little is allowed."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
