"""bpf(2) by ctypes: what bcc has no call for, and what a small process needs without bcc.

Maps are read and written, programs run on test packets, links made and asked about.
Nothing here compiles, knows an interface by name, or knows what pycopy's maps mean.
Every failure is an OSError with the kernel's errno; callers say what it means.
"""

import ctypes
import errno
import os
import platform
import re
import struct
from collections.abc import Iterable
from typing import NamedTuple

from pycopy.errors import HostUnfit

#: Program types.
SCHED_CLS_PROGRAM, XDP_PROGRAM = 3, 6

XDP = 37
TCX_INGRESS = 46
TCX_EGRESS = 47

#: Flag of a TCX link: at the head of the hook, since a program before ours may end the chain.
BEFORE = 1 << 3

_NOEXIST = 1

XDP_FLAGS_SKB = 1 << 1
XDP_FLAGS_DRV = 1 << 2

PERCPU_MAP_TYPES = frozenset({5, 6, 10, 21})

_SYSCALL_NUMBERS = {"x86_64": 321, "aarch64": 280}

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT_KEY, _BTF_LOAD = 0, 1, 2, 3, 4, 18
_PROG_LOAD, _MAP_TAKE = 5, 21
_PROG_TEST_RUN, _PROG_FD_BY_ID, _OBJ_INFO, _PROG_QUERY = 10, 13, 15, 16
_LINK_CREATE, _ENABLE_STATS = 28, 32

#: Map types (``enum bpf_map_type``) and flags.
HASH, ARRAY, PERF_EVENT_ARRAY, PERCPU_ARRAY, LRU_HASH, LPM_TRIE = 1, 2, 4, 6, 9, 11
QUEUE, STACK, RINGBUF = 22, 23, 27
NO_PREALLOC, MMAPABLE = 1 << 0, 1 << 10

#: Heads of ``union bpf_attr`` by command; the kernel takes a shorter union as zero-filled.
_MAP = struct.Struct("=IIIII4xI16s4xIII")
_BTF = struct.Struct("=QQIIII")
_LOAD = struct.Struct("=IIQQIIQII16s")
_ELEM = struct.Struct("=IxxxxQQQ")
_TEST_RUN = struct.Struct("=IIIIQQIIIIQQIIIxxxx")
_WORD, _RETVAL_AT, _SIZE_OUT_AT = struct.Struct("=I"), 4, 12
#: ``mark`` in struct __sk_buff (linux/bpf.h), which is given up to there.
_MARK = struct.Struct("=8xI")
_INFO = struct.Struct("=IIQ")
_QUERY = struct.Struct("=IIIIQIIQQQQ")
_LINK = struct.Struct("=IIIIIIQ")
_ID = struct.Struct("=III")

#: Large enough for every info struct of today; the kernel fills what it knows.
_INFO_BYTES = 256
_QUERY_MAX = 64

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint]
_syscall.restype = ctypes.c_long


class TestRun(NamedTuple):
    """Outcome of one BPF_PROG_TEST_RUN: ``duration_ns`` is the mean of ``repeat`` runs."""

    retval: int
    duration_ns: int
    data: bytes


class ProgramInfo(NamedTuple):
    """What is used of ``struct bpf_prog_info``; runs count while enable_run_stats() is on."""

    type: int
    id: int
    name: str
    run_time_ns: int
    run_count: int
    verified_instructions: int


class MapInfo(NamedTuple):
    """The head of ``struct bpf_map_info``; sizes as map_create() had them."""

    type: int
    id: int
    name: str
    key_bytes: int
    value_bytes: int
    max_entries: int
    flags: int


class LinkInfo(NamedTuple):
    """``ifindex`` is 0 once the interface is gone: the link outlives it, attached to nothing."""

    type: int
    id: int
    program_id: int
    ifindex: int
    attach_type: int


def bpf(command: int, attr: "ctypes.Array[ctypes.c_char]") -> int:
    """One bpf(2) call; ``attr`` is written back into by the kernel. Raises OSError, or HostUnfit
    on a machine whose number of the call is not known."""
    number = _SYSCALL_NUMBERS.get(platform.machine())
    if number is None:
        raise HostUnfit(
            f"pycopy does not know bpf(2) on {platform.machine()}",
            f"run it on one of: {', '.join(_SYSCALL_NUMBERS)}",
        )
    result = int(_syscall(number, command, ctypes.addressof(attr), ctypes.sizeof(attr)))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def _attr(layout: struct.Struct, *values: int | bytes) -> "ctypes.Array[ctypes.c_char]":
    return ctypes.create_string_buffer(layout.pack(*values), layout.size)


def _buffer(content: bytes) -> "ctypes.Array[ctypes.c_char]":
    return ctypes.create_string_buffer(content, len(content))


def possible_cpus() -> int:
    """CPUs the kernel reserves room for: the length of a per-CPU map value."""
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as file:
        last = file.read().strip().rpartition(",")[2]
    return int(last.rpartition("-")[2]) + 1


def map_lookup(map_fd: int, key: bytes, value_bytes: int) -> bytes | None:
    """The value under ``key``; ``value_bytes`` must count all CPUs of a per-CPU map."""
    key_buffer, value = _buffer(key), ctypes.create_string_buffer(value_bytes)
    attr = _attr(_ELEM, map_fd, ctypes.addressof(key_buffer), ctypes.addressof(value), 0)
    try:
        bpf(_MAP_LOOKUP, attr)
    except FileNotFoundError:
        return None
    return value.raw


def map_update(map_fd: int, key: bytes, value: bytes) -> None:
    """Set the value under ``key``; a per-CPU map wants one for each CPU, padded to 8 bytes."""
    key_buffer, value_buffer = _buffer(key), _buffer(value)
    pointers = ctypes.addressof(key_buffer), ctypes.addressof(value_buffer)
    bpf(_MAP_UPDATE, _attr(_ELEM, map_fd, *pointers, 0))


def map_delete(map_fd: int, key: bytes) -> bool:
    """Whether there was an entry to delete."""
    key_buffer = _buffer(key)
    try:
        bpf(_MAP_DELETE, _attr(_ELEM, map_fd, ctypes.addressof(key_buffer), 0, 0))
    except FileNotFoundError:
        return False
    return True


def map_next_key(map_fd: int, key: bytes | None, key_bytes: int) -> bytes | None:
    """The key after ``key``, the first one for None; None behind the last."""
    key_buffer, following = _buffer(key or b""), ctypes.create_string_buffer(key_bytes)
    pointer = ctypes.addressof(key_buffer) if key is not None else 0
    try:
        bpf(_MAP_NEXT_KEY, _attr(_ELEM, map_fd, pointer, ctypes.addressof(following), 0))
    except FileNotFoundError:
        return None
    return following.raw


def map_insert(map_fd: int, key: bytes, value: bytes) -> bool:
    """Add an entry; False if there is one under ``key``."""
    key_buffer, value_buffer = _buffer(key), _buffer(value)
    pointers = ctypes.addressof(key_buffer), ctypes.addressof(value_buffer)
    try:
        bpf(_MAP_UPDATE, _attr(_ELEM, map_fd, *pointers, _NOEXIST))
    except FileExistsError:
        return False
    return True


def stack_push(map_fd: int, numbers: Iterable[int]) -> None:
    """Push values of 4 bytes, the first one first: tens of thousands within a start."""
    value = ctypes.c_uint32()
    attr = _attr(_ELEM, map_fd, 0, ctypes.addressof(value), 0)
    for number in numbers:
        value.value = number
        bpf(_MAP_UPDATE, attr)


def stack_pop(map_fd: int, value_bytes: int) -> bytes | None:
    """The value on top, taken off; None if there is none."""
    value = ctypes.create_string_buffer(value_bytes)
    try:
        bpf(_MAP_TAKE, _attr(_ELEM, map_fd, 0, ctypes.addressof(value), 0))
    except FileNotFoundError:
        return None
    return value.raw


def map_create(
    kind: int, name: str, key_bytes: int, value_bytes: int, max_entries: int, flags: int = 0,
    lock_first: bool = False,
) -> int:  # fmt: skip
    """A new map's descriptor. ``lock_first``: its values begin with a struct bpf_spin_lock."""
    btf_fd = _load_lock_btf(value_bytes) if lock_first else 0
    types = (1, 3) if lock_first else (0, 0)  # of _load_lock_btf()
    try:
        return bpf(
            _MAP_CREATE,
            _attr(
                _MAP, kind, key_bytes, value_bytes, max_entries, flags, 0,
                name.encode("ascii")[:15], btf_fd, *types,
            ),
        )  # fmt: skip
    finally:
        if btf_fd:
            os.close(btf_fd)


def has_map_type(kind: int) -> bool:
    """Whether the kernel knows maps of that kind, ones without keys and values."""
    try:
        os.close(map_create(kind, "pycopy_probe", 0, 0, 4096))
    except OSError as error:
        return error.errno != errno.EINVAL
    return True


def _load_lock_btf(value_bytes: int) -> int:
    """Type information (Documentation/bpf/btf.rst) for values that begin with a spin lock.

    The kernel finds a lock by its type; all else it need not know.
    """
    names = b"\0u32\0bpf_spin_lock\0val\0value\0lock\0"
    at = {name: names.index(b"\0" + name + b"\0") + 1 for name in names.strip(b"\0").split(b"\0")}
    integer, structure = 1 << 24, 4 << 24 | 1
    types = struct.pack(
        "=4I 6I 6I",
        *(at[b"u32"], integer, 4, 32),
        *(at[b"bpf_spin_lock"], structure, 4, at[b"val"], 1, 0),
        *(at[b"value"], structure, value_bytes, at[b"lock"], 2, 0),
    )
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names))
    blob = _buffer(header + types + names)
    return bpf(_BTF_LOAD, _attr(_BTF, ctypes.addressof(blob), 0, len(blob), 0, 0, 0))


#: ``log_level`` of BPF_PROG_LOAD: the verifier's every step, or only what it took.
_LOG_STEPS, _LOG_STATISTICS = 1, 4
_LOG_BYTES = 16 << 20

_PROCESSED = re.compile(rb"processed (\d+) insns")


class Rejected(OSError):
    """The kernel does not load a program; ``log`` is what its verifier said, all of it."""

    def __init__(self, number: int, log: str) -> None:
        super().__init__(number, os.strerror(number))
        self.log = log


def program_load(kind: int, name: str, code: bytes, license: str) -> int:
    """The descriptor of a program that the verifier has passed; ``code``: ``struct bpf_insn``.

    Raises :class:`Rejected`.
    """
    try:
        return _program_load(kind, name, code, license)
    except OSError as error:
        refused = error.errno or 0
    # Once more for the verifier's words, which cost more than the verdict.
    log = ctypes.create_string_buffer(_LOG_BYTES)
    try:
        return _program_load(kind, name, code, license, _LOG_STEPS, log)
    except OSError as error:
        # What did not fit (ENOSPC) says nothing of the program.
        number = refused if error.errno == errno.ENOSPC else error.errno or refused
    raise Rejected(number, log.value.decode("utf-8", "replace"))


def program_cost(kind: int, name: str, code: bytes, license: str) -> int:
    """Instructions that the verifier goes through for a program. Raises :class:`Rejected`."""
    log = ctypes.create_string_buffer(1 << 16)
    try:
        os.close(_program_load(kind, name, code, license, _LOG_STATISTICS, log))
    except OSError:
        os.close(program_load(kind, name, code, license))  # which says why
        raise
    found = _PROCESSED.search(log.value)
    return int(found[1]) if found else 0


def _program_load(
    kind: int, name: str, code: bytes, license: str, log_level: int = 0,
    log: "ctypes.Array[ctypes.c_char] | None" = None,
) -> int:  # fmt: skip
    instructions, said = _buffer(code), _buffer(license.encode("ascii") + b"\0")
    return bpf(
        _PROG_LOAD,
        _attr(
            _LOAD, kind, len(code) // 8, ctypes.addressof(instructions), ctypes.addressof(said),
            log_level, 0 if log is None else len(log), 0 if log is None else ctypes.addressof(log),
            0, 0, name.encode("ascii")[:15],
        ),
    )  # fmt: skip


def test_run(
    program_fd: int, packet: bytes, *, repeat: int = 1, context: bytes = b"", room_bytes: int = 256
) -> TestRun:
    """Run a program on ``packet``; ``room_bytes`` is how much it may grow."""
    packet_in = _buffer(packet)
    packet_out = ctypes.create_string_buffer(len(packet) + room_bytes)
    context_in = _buffer(context)
    attr = _attr(
        _TEST_RUN,
        program_fd,
        0,
        len(packet),
        len(packet_out),
        ctypes.addressof(packet_in),
        ctypes.addressof(packet_out),
        repeat,
        0,
        len(context),
        0,
        ctypes.addressof(context_in) if context else 0,
        0,
        0,
        0,
        0,
    )
    while True:
        try:
            bpf(_PROG_TEST_RUN, attr)
            break
        except InterruptedError:
            continue  # a signal between two repetitions; what they did so far is done
    fields = _TEST_RUN.unpack(attr.raw)
    return TestRun(fields[1], fields[7], packet_out.raw[: fields[3]])


class RepeatedRun:
    """A program to be run on the same packet again and again, with only ``mark`` changing.

    What it needs is laid out once. Allocated for every run, with caches gone cold in
    between, that costs more than the run. What becomes of the packet is not returned.
    """

    def __init__(self, program_fd: int, packet: bytes, repeat: int) -> None:
        self._packet = _buffer(packet)
        self._context = ctypes.create_string_buffer(_MARK.size)
        self._attr = _attr(
            _TEST_RUN, program_fd, 0, len(packet), 0, ctypes.addressof(self._packet), 0, repeat, 0,
            _MARK.size, 0, ctypes.addressof(self._context), 0, 0, 0, 0,
        )  # fmt: skip

    def run(self, mark: int) -> int:
        """``repeat`` runs; ``mark`` is the packet's to begin with. What the last one returned."""
        _MARK.pack_into(self._context, 0, mark)
        while True:
            # What the kernel left here, the packet's length, would be a limit to the next run's.
            _WORD.pack_into(self._attr, _SIZE_OUT_AT, 0)
            try:
                bpf(_PROG_TEST_RUN, self._attr)
            except InterruptedError:
                continue  # as in test_run()
            return int(_WORD.unpack_from(self._attr, _RETVAL_AT)[0])


def _object_info(fd: int) -> bytes:
    info = ctypes.create_string_buffer(_INFO_BYTES)
    bpf(_OBJ_INFO, _attr(_INFO, fd, _INFO_BYTES, ctypes.addressof(info)))
    return info.raw


def _name(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("ascii", "replace")


def map_info(map_fd: int) -> MapInfo:
    """What the kernel knows of a map (BPF_OBJ_GET_INFO_BY_FD)."""
    raw = _object_info(map_fd)
    kind, ident, key_bytes, value_bytes, max_entries, flags = struct.unpack_from("=6I", raw)
    return MapInfo(kind, ident, _name(raw[24:40]), key_bytes, value_bytes, max_entries, flags)


def program_info(program_fd: int) -> ProgramInfo:
    """What the kernel knows of a program (BPF_OBJ_GET_INFO_BY_FD)."""
    raw = _object_info(program_fd)
    kind, ident = struct.unpack_from("=II", raw)
    run_time_ns, run_count = struct.unpack_from("=QQ", raw, 192)
    (verified,) = struct.unpack_from("=I", raw, 216)
    return ProgramInfo(kind, ident, _name(raw[64:80]), run_time_ns, run_count, verified)


def link_info(link_fd: int) -> LinkInfo:
    """What the kernel knows of a link to an interface (BPF_OBJ_GET_INFO_BY_FD)."""
    kind, ident, program_id, _, ifindex, attach_type = struct.unpack_from(
        "=6I", _object_info(link_fd)
    )
    return LinkInfo(kind, ident, program_id, ifindex, attach_type)


def link_create(program_fd: int, ifindex: int, attach_type: int, flags: int = 0) -> int:
    """A link's descriptor: the program stays attached as long as somebody holds it open."""
    return bpf(_LINK_CREATE, _attr(_LINK, program_fd, ifindex, attach_type, flags, 0, 0, 0))


def attached(ifindex: int, attach_type: int) -> list[tuple[int, int]]:
    """(program id, link id) in order of execution at a TCX hook; link id 0: attached without."""
    programs = ctypes.create_string_buffer(4 * _QUERY_MAX)
    links = ctypes.create_string_buffer(4 * _QUERY_MAX)
    pointers = ctypes.addressof(programs), ctypes.addressof(links)
    attr = _attr(
        _QUERY, ifindex, attach_type, 0, 0, pointers[0], _QUERY_MAX, 0, 0, pointers[1], 0, 0
    )
    bpf(_PROG_QUERY, attr)
    count = _QUERY.unpack(attr.raw)[5]
    layout = f"={count}I"
    return list(
        zip(
            struct.unpack_from(layout, programs.raw),
            struct.unpack_from(layout, links.raw),
            strict=True,
        )
    )


def program_fd_by_id(ident: int) -> int:
    """A descriptor, for the caller to close, of the program with that id; raises OSError."""
    return bpf(_PROG_FD_BY_ID, _attr(_ID, ident, 0, 0))


def enable_run_stats() -> int:
    """Count run time and runs of every program until the descriptor is closed."""
    return bpf(_ENABLE_STATS, _attr(_ID, 0, 0, 0))
