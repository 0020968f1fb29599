"""perf_event_open(2): the ring that one CPU's BPF programs output to, opened and mapped.

Every failure is an error that a user can read. Does not know what is output.

Tests: tests/bpf/test_perfring.py
"""

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import struct

from pycopy.errors import HostUnfit, PycopyError
from pycopy.kernel import syscall

_SYSCALL_NUMBERS = {"x86_64": 298, "aarch64": 241}

_TYPE_SOFTWARE, _COUNT_SW_BPF_OUTPUT = 1, 10
_SAMPLE_RAW = 1 << 10
_FLAG_FD_CLOEXEC = 1 << 3
_IOC_ENABLE = 0x2400

#: ``struct perf_event_attr`` as of its first version: type, size, config, sample_period,
#: sample_type, read_format, flags, wakeup_events, bp_type, bp_addr.
_ATTR = struct.Struct("=IIQQQQQIIQ")
#: Each sample bears nothing but its raw data, and each one wakes whoever waits.
_OUTPUT = _ATTR.pack(
    _TYPE_SOFTWARE, _ATTR.size, _COUNT_SW_BPF_OUTPUT, 1, _SAMPLE_RAW, 0, 0, 1, 0, 0
)  # fmt: skip
_WORD = struct.Struct("=I")

_OLD_CURE = "use a kernel that has BPF ring buffers (Linux 5.8), or one with CONFIG_PERF_EVENTS"
_PRIVILEGES_CURE = (
    "run as root, or with CAP_PERFMON (before Linux 5.8: CAP_SYS_ADMIN);"
    " a container's seccomp profile must allow perf_event_open"
)
_DESCRIPTORS_CURE = "raise its limit (ulimit -n, LimitNOFILE=): it takes two for each CPU"
_OPENING = {
    errno.EPERM: ("the kernel refuses perf_event_open(2) here", _PRIVILEGES_CURE),
    errno.EACCES: ("the kernel refuses perf_event_open(2) here", _PRIVILEGES_CURE),
    errno.EMFILE: ("this process has no descriptor left for a perf ring", _DESCRIPTORS_CURE),
    errno.ENFILE: ("this host has no descriptor left for a perf ring", "raise fs.file-max"),
    errno.ENOSYS: ("this kernel has no perf_event_open(2)", _OLD_CURE),
    errno.ENOENT: ("this kernel's BPF programs cannot output to perf rings", _OLD_CURE),
    errno.EINVAL: ("this kernel's BPF programs cannot output to perf rings", _OLD_CURE),
}
_LOCKED_CURE = (
    "raise kernel.perf_event_mlock_kb or the limit of locked memory (ulimit -l,"
    " LimitMEMLOCK=), give pycopy CAP_IPC_LOCK, or use a smaller --ring"
)
_MAPPING = {
    errno.EPERM: ("it may not lock as much memory as a perf ring takes", _LOCKED_CURE),
    errno.ENOMEM: ("there is no memory for a perf ring", "use a smaller --ring"),
    errno.EMFILE: _OPENING[errno.EMFILE],
    errno.ENFILE: _OPENING[errno.ENFILE],
}

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = [
    ctypes.c_long, ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_ulong,
]  # fmt: skip
_syscall.restype = ctypes.c_long


def unfit(error: OSError, reasons: dict[int, tuple[str, str]] = _OPENING) -> PycopyError:
    """What ``error`` means to a user."""
    reason = reasons.get(error.errno or 0)
    if reason is None:
        return PycopyError(f"a perf ring cannot be had: {error.strerror}")
    return HostUnfit(*reason)


def open_output(cpu: int) -> int | None:
    """The descriptor of ``cpu``'s event, whose ring is not there yet; None: it is offline.

    Raises PycopyError.
    """
    number = _SYSCALL_NUMBERS.get(platform.machine())
    if number is None:
        raise HostUnfit(
            f"pycopy does not know perf_event_open(2) on {platform.machine()}",
            f"run it on one of: {', '.join(_SYSCALL_NUMBERS)}",
        )
    fd = int(_syscall(number, _OUTPUT, -1, cpu, -1, _FLAG_FD_CLOEXEC))
    if fd >= 0:
        return fd
    error = ctypes.get_errno()
    if error == errno.ENODEV:
        return None
    raise unfit(OSError(error, os.strerror(error)))


def map_ring(fd: int, data_bytes: int) -> mmap.mmap:
    """The event's ring: a page for the positions, then the data. It must be writable, or the
    kernel would overwrite what has not been read. Raises PycopyError."""
    try:
        return mmap.mmap(fd, mmap.PAGESIZE + data_bytes)
    except OSError as error:
        raise unfit(error, _MAPPING) from error


def put_to_use(fd: int, map_fd: int, cpu: int) -> None:
    """Have what programs output to ``map_fd`` on ``cpu`` go to the event; raises PycopyError."""
    try:
        fcntl.ioctl(fd, _IOC_ENABLE, 0)
        syscall.map_update(map_fd, _WORD.pack(cpu), _WORD.pack(fd))
    except OSError as error:
        raise PycopyError(f"CPU {cpu} cannot be given a perf ring: {error.strerror}") from error


def put_out_of_use(map_fd: int, cpu: int) -> None:
    """The map holds the event, and with it its memory, until this is called or it is closed."""
    syscall.map_delete(map_fd, _WORD.pack(cpu))
