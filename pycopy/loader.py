"""From an object's name to loaded BPF programs and their maps.

The instructions come from pycopy.objects, made ahead of time; no compiler is needed. What goes
wrong with the kernel becomes one of our errors here. Where the program is attached is
pycopy.attach's business; its names are here too.
"""

import contextlib
import errno
import os
import re
import resource
import sys
from collections.abc import Mapping
from typing import NoReturn

from pycopy import bpfmaps, guards, link, objects
from pycopy.abi import Constant
from pycopy.attach import Attachment, Hook, attach, detach_leftovers
from pycopy.errors import HostUnfit, PycopyError
from pycopy.messages import while_slow

__all__ = ["Attachment", "Hook", "Map", "Module", "attach", "detach_leftovers", "load"]

#: What a kernel says of a helper that it does not have, and which those are that pycopy calls.
_UNKNOWN = re.compile(r"invalid func unknown#(\d+)")
_HELPERS = {
    188: ("bpf_xdp_get_buff_len", "5.18, for --hook xdp"),
    189: ("bpf_xdp_load_bytes", "5.18, for --hook xdp"),
    130: ("bpf_ringbuf_output", "5.8; --transport perf does without"),
}


class Map:
    """One map, by its descriptor; keys and values are raw bytes."""

    def __init__(self, fd: int) -> None:
        info = link.map_info(fd)
        self.fd = fd
        self.key_bytes = info.key_bytes
        self.max_entries = info.max_entries
        self.value_bytes = info.value_bytes
        self._lookup_bytes = info.value_bytes
        if info.type in link.PERCPU_MAP_TYPES:
            self._lookup_bytes = (info.value_bytes + 7 & ~7) * link.possible_cpus()

    def lookup(self, key: bytes) -> bytes | None:
        """The value, all CPUs' values (each padded to 8 bytes) one after the other, or None."""
        return link.map_lookup(self.fd, key, self._lookup_bytes)

    def update(self, key: bytes, value: bytes) -> None:
        link.map_update(self.fd, key, value)

    def delete(self, key: bytes) -> bool:
        """Whether there was an entry to delete."""
        return link.map_delete(self.fd, key)

    def sum_percpu(self, index: int) -> int:
        """The u64 at ``index`` of a per-CPU array, summed over the CPUs."""
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


def load(
    name: str, *, given: Mapping[str, int] | None = None,
    entries: Mapping[str, int] | None = None, constants: Mapping[Constant, int] | None = None,
    filter_code: bytes = b"", perf: bool = False,
) -> Module:  # fmt: skip
    """Load an object of the catalogue (pycopy.objects) with the maps that it needs.

    ``given``: descriptors of maps made before, by name; the others are made, with so many
    ``entries`` as said (of "segments": bytes). ``perf``: records leave by perf event output.
    Raises PycopyError with nothing left open.
    """
    guards.check_privileges()
    made = objects.find(name)
    numbers = objects.map_numbers(made.programs.values())
    names = [each for each, number in bpfmaps.NUMBERS.items() if number in numbers]
    given = {each: fd for each, fd in (given or {}).items() if each in names}
    values = {**objects.ANY_CONSTANTS, **(constants or {}), Constant.PERF: int(perf)}
    kind = link.XDP_PROGRAM if objects.CATALOGUE[name].xdp else link.SCHED_CLS_PROGRAM
    lift_memory_limit()
    with contextlib.ExitStack() as opened:
        fds = {}
        for each in names:
            if each not in given:
                fds[each] = make_map(each, (entries or {}).get(each, 0), perf)
                opened.callback(os.close, fds[each])
        by_number = {bpfmaps.NUMBERS[each]: fd for each, fd in {**fds, **given}.items()}
        programs = {}
        for program in objects.CATALOGUE[name].programs:
            code = objects.link_code(made.programs[program], by_number, values, filter_code)
            with while_slow(f"loading {name}: this kernel's verifier takes its time"):
                programs[program] = _load_program(name, kind, program, code, made.license)
            opened.callback(os.close, programs[program])
        module = Module(name, programs, fds, given)
        opened.pop_all()
    return module


def make_map(name: str, entries: int = 0, perf: bool = False) -> int:
    """The descriptor of a new map of bpfmaps.SHAPES; raises PycopyError."""
    try:
        return bpfmaps.make(name, entries, perf=perf)
    except OSError as error:
        raise map_refused(name, error) from error


def map_refused(name: str, error: OSError) -> PycopyError:
    """Why a map could not be made, for a user."""
    if error.errno == errno.EPERM:
        return _no_privileges(error)
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


def _no_privileges(error: OSError) -> HostUnfit:
    return HostUnfit(f"the kernel refuses bpf(2) here: {error.strerror}", guards.PRIVILEGES_CURE)


def _load_program(name: str, kind: int, program: str, code: bytes, license: str) -> int:
    try:
        return link.program_load(kind, program, code, license)
    except link.Rejected as error:
        _explain(name, error)
    except OSError as error:
        raise PycopyError(f"the kernel does not load {name}: {error.strerror}") from error


def _explain(name: str, error: link.Rejected) -> NoReturn:
    unknown = _UNKNOWN.search(error.log)
    if unknown:
        helper, since = _HELPERS.get(int(unknown[1]), (f"BPF helper {unknown[1]}", "a later one"))
        raise HostUnfit(
            f"this kernel has no {helper} (it came with Linux {since})",
            "use the other hook, or a newer kernel",
        ) from error
    if "prohibited for !root" in error.log or "!root" in error.log:
        raise HostUnfit(
            "the verifier takes pointer arithmetic only from who has CAP_PERFMON",
            guards.PRIVILEGES_CURE,
        ) from error
    if error.errno == errno.EPERM and not error.log:
        raise _no_privileges(error) from error
    raise objects.rejected(name, error) from error


def lift_memory_limit() -> None:
    """Before Linux 5.11 maps count as locked memory of ours, of which little is allowed."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
