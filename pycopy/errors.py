"""Errors that reach the user: one sentence of cause, one of cure, and the exit status.

Exit statuses (also in ``pycopy --help``): 0 done, 1 failed at run time, 2 usage,
3 host unfit, 4 refused by a safety guard, 130 interrupted before it was ready, or by a
second signal. What the host refuses (OSError, no memory, a package that is missing) takes the
same form by :func:`explain`. It is imported before all else: nothing that takes a file.

Tests: tests/unit/test_tight_hosts.py
"""

import errno
import sys

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNFIT = 3
EXIT_REFUSED = 4
EXIT_INTERRUPTED = 130


class PycopyError(Exception):
    """Something failed at run time; ``cause`` says what, ``cure`` what to do about it."""

    exit_status = EXIT_FAILED

    def __init__(self, cause: str, cure: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.cause}\n  {self.cure}" if self.cure else self.cause


class PeerError(PycopyError):
    """Another host does not do its part: nothing that could be tried differently here."""


class UsageError(PycopyError):
    """The command line asks for something that has no meaning."""

    exit_status = EXIT_USAGE


class HostUnfit(PycopyError):
    """This host lacks something pycopy needs: a privilege, a package, a kernel feature."""

    exit_status = EXIT_UNFIT


class Refused(PycopyError):
    """A safety guard said no; the cure says what to type to overrule it."""

    exit_status = EXIT_REFUSED


_MORE_MEMORY = "allow it more memory: ulimit -v, MemoryMax= of the service, the container's limit"
_MORE_TASKS = "allow more processes and threads: ulimit -u, TasksMax= of the service"

_CURES = {
    errno.EMFILE: "allow more open files: ulimit -n, LimitNOFILE= of the service",
    errno.ENFILE: "allow the host more open files: sysctl fs.file-max",
    errno.ENOMEM: _MORE_MEMORY,
    errno.EAGAIN: _MORE_TASKS,
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or raise the quota",
    errno.EFBIG: "allow larger files: ulimit -f, LimitFSIZE= of the service",
    errno.EROFS: "it is on a file system that is mounted read-only",
    errno.EACCES: "run it with sudo, or as a user who may",
    errno.EPERM: "run it with sudo, or outside of the container that forbids it",
}
#: What every host has; the cure where it has not.
_OF_EVERY_HOST = {
    "/proc": "mount it: mount -t proc proc /proc",
    "/sys": "mount it: mount -t sysfs sysfs /sys",
    "/dev/null": "make it: mknod -m 666 /dev/null c 1 3",
}
_KERNEL_LACKS = (errno.ENOSYS, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)


def explain(error: BaseException) -> PycopyError | None:
    """``error`` in the form that users get, if the host can cause it; None: it is a bug."""
    match error:
        case PycopyError():
            return error
        case MemoryError() | SystemError():  # the latter where the interpreter did not expect it
            return PycopyError("there is no memory left", _MORE_MEMORY)
        case ImportError():
            return _explain_import(error)
        case OSError():
            return _explain_os(error)
        case RuntimeError() if "start new thread" in str(error):
            return PycopyError("the system starts no further thread", _MORE_TASKS)
    return None


def _explain_import(error: ImportError) -> PycopyError:
    name = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError):
        text = f"cannot load {error.name or 'a Python module'}: {error}"
        return HostUnfit(text, "is it whole? and see ulimit -a: memory and open files may be short")
    if name == "pycopy":
        return HostUnfit(f"a part of pycopy is missing: {error.name}", "install pycopy again")
    if name in sys.stdlib_module_names:
        return HostUnfit(f"a part of Python is missing: {error.name}", "apt install python3")
    return HostUnfit(f"the Python package {name} is missing", f"apt install python3-{name}")


def _explain_os(error: OSError) -> PycopyError:
    why = error.strerror or str(error) or type(error).__name__
    file = error.filename if error.filename is not None else ""
    path = file.decode(errors="replace") if isinstance(file, bytes) else str(file)
    cause = f"cannot use {path}: {why}" if path else f"the system refused something: {why}"
    for start, cure in _OF_EVERY_HOST.items():
        if error.errno == errno.ENOENT and (path == start or path.startswith(start + "/")):
            return HostUnfit(cause, cure)
    if error.errno in _KERNEL_LACKS:
        return HostUnfit(cause, "this host's kernel, or its container, lacks it")
    if "temporary directory" in why:
        return PycopyError(cause, "name a directory that can be written in TMPDIR")
    cure = _CURES.get(error.errno or 0, "see this host's file systems, and limits (ulimit -a)")
    return PycopyError(cause, cure)
