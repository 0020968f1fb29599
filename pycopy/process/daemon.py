"""The process itself: running detached, its log file, its pid file.

These belong to the process, so they are module state: a driver calls :func:`ready` once
everything is attached, gives SIGHUP to :func:`hang_up`, and need not know whether it runs
detached, with a log file or with neither. Call :func:`run` before anything starts a thread.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import signal
import stat
import sys
import threading
from collections.abc import Callable

from pycopy.errors import EXIT_FAILED, EXIT_OK, PycopyError, explain
from pycopy.process import console

#: What a pid file of ours has in it, and more than that.
_PID_TEXT = re.compile(rb"([0-9]{1,10}\n)?")
_PID_BYTES = 32
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

#: How long a start that is done waits for its messages to be read.
_READY_WORDS_S = 0.5


class LogFile(io.TextIOBase):
    """An append-only text stream that survives a full disk and log rotation.

    A write that fails is counted in ``write_errors`` and forgotten: no message is worth
    a replay. Whole lines are written with one write(2) each. A FIFO is taken if it has a
    reader, and never waited for: lines that do not fit are lost, and counted like the others.
    """

    def __init__(self, path: str) -> None:
        self.write_errors = 0
        self._pending = ""
        # Re-entrant: a signal handler may print while its own thread is printing.
        self._lock = threading.RLock()
        self._copies: list[int] = []
        try:
            self.path = os.path.abspath(path)
            self._fd = self._open()
        except OSError as error:
            raise PycopyError(
                f"cannot write the log file {path}: {error.strerror}",
                "name another file with -l FILE",
            ) from None

    def write(self, text: str) -> int:
        """Write whole lines, keep the rest for later; returns ``len(text)``, never raises."""
        with self._lock:
            lines, newline, self._pending = (self._pending + text).rpartition("\n")
            if newline:
                self._put(lines + newline)
        return len(text)

    def flush(self) -> None:
        """Write the line that has not ended yet, too."""
        with self._lock:
            if self._pending:
                self._put(self._pending)
                self._pending = ""

    def reopen(self) -> None:
        """Go on in a new file of the same name; in the old one if there cannot be one."""
        with self._lock:
            self.flush()
            try:
                fd = self._open()
            except OSError:
                self.write_errors += 1
                return
            for copy in (self._fd, *self._copies):
                os.dup2(fd, copy, inheritable=copy <= 2)
            os.close(fd)

    def take_over(self, fd: int) -> None:
        """Make descriptor ``fd`` (1 or 2) the log too, for whatever does not go through Python."""
        os.dup2(self._fd, fd)
        self._copies.append(fd)

    def writable(self) -> bool:
        """True, as io.TextIOBase has it."""
        return True

    def fileno(self) -> int:
        """The descriptor, which stays the same when the log is reopened."""
        return self._fd

    def isatty(self) -> bool:
        """False: it is never a terminal."""
        return False

    def _open(self) -> int:
        # Asked first: a device may do something when it is opened, a tape rewinds.
        with contextlib.suppress(FileNotFoundError):
            _check_log(os.stat(self.path))
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
        try:
            # O_NONBLOCK: a FIFO without a reader is an error then, and not a wait for one.
            fd = os.open(self.path, flags | os.O_NONBLOCK, 0o640)
        except OSError as error:
            if error.errno == errno.ENXIO:
                error.strerror = "nobody reads from it"
            raise
        try:
            found = os.fstat(fd)
            _check_log(found)
            os.set_blocking(fd, not stat.S_ISFIFO(found.st_mode))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _put(self, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            self.write_errors += 1


def _check_log(found: os.stat_result) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind not in (stat.S_IFREG, stat.S_IFCHR, stat.S_IFIFO):
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'no file')}")


class PidFile:
    """A locked file with the process id. The lock, not the number, says that it is in use:
    the kernel drops it with the process, so what a crash leaves behind is never in the way.

    Only a file that is empty or has nothing but such a number is ever written, and only the
    one that was locked is removed: -P may name anything by mistake.
    """

    def __init__(self, path: str) -> None:
        #: What was in a file that another run left; None: there was none, this one is ours.
        self._before: bytes | None = None
        try:
            self.path = os.path.abspath(path)
            self._fd = self._lock()
        except OSError as error:
            raise PycopyError(
                f"cannot write the pid file {path}: {error.strerror}",
                "name another file with -P FILE",
            ) from None

    def _lock(self) -> int:
        while True:
            fd = self._open()
            try:
                mine = _try_lock(fd)
                text = os.pread(fd, _PID_BYTES, 0)
                if not _PID_TEXT.fullmatch(text):
                    raise PycopyError(
                        f"cannot write the pid file {self.path}: it has something else in it",
                        "name another file with -P FILE; that one is left as it is",
                    )
                if not mine:
                    pid = text.decode("ascii").strip()
                    raise PycopyError(
                        f"already running as process {pid or '?'} (pid file {self.path})",
                        f"end it with 'kill {pid or 'PID'}', or name another file with -P FILE",
                    )
                if self._is_there(fd):
                    if self._before is not None:
                        self._before = text
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # its owner removed it between our open and our lock: once more

    def _open(self) -> int:
        """Neither follow a link nor open, or make, anything but a regular file."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        while True:
            try:
                self._before = None
                return os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                pass
            # Asked first: a device may do something when it is opened, a tape rewinds.
            with contextlib.suppress(FileNotFoundError):
                self._check(os.lstat(self.path))
                fd = os.open(self.path, flags)
                try:
                    self._check(os.fstat(fd))
                except BaseException:
                    os.close(fd)
                    raise
                self._before = b""
                return fd

    def _check(self, found: os.stat_result) -> None:
        kind = stat.S_IFMT(found.st_mode)
        if kind != stat.S_IFREG:
            raise PycopyError(
                f"cannot write the pid file {self.path}: it is {_KINDS.get(kind, 'no file')}",
                "name another file with -P FILE; that one is left as it is",
            )

    def _is_there(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.lstat(self.path))
        except OSError:
            return False

    def write(self) -> None:
        """Write this process's id; raises PycopyError, with the lock still held."""
        try:
            self._put(b"%d\n" % os.getpid())
        except OSError as error:
            raise PycopyError(
                f"cannot write the pid file {self.path}: {error.strerror}",
                "make room, or name another file with -P FILE",
            ) from None

    def remove(self, started: bool = True) -> None:
        """Remove the file while still holding its lock, then let go; after a failed start
        what was there before is there again."""
        with contextlib.suppress(OSError):
            if self._before is not None and not started:
                self._put(self._before)
            elif self._is_there(self._fd):
                os.unlink(self.path)
        os.close(self._fd)

    def _put(self, text: bytes) -> None:
        os.pwrite(self._fd, text, 0)
        os.ftruncate(self._fd, len(text))


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _Starter:
    """The daemon's end of the pipe to the waiting command: pid, then ready or an error."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def tell(self, **message: object) -> None:
        # The command that started us may be gone: then there is nobody left to tell.
        with contextlib.suppress(OSError):
            os.write(self._fd, json.dumps(message).encode() + b"\n")

    def error(self, error: PycopyError) -> None:
        self.tell(status=error.exit_status, cause=error.cause, cure=error.cure)

    def close(self) -> None:
        os.close(self._fd)


_log: LogFile | None = None
_starter: _Starter | None = None
_is_ready = False


def ready() -> None:
    """Start-up is done, and what was said of it is written: let the command that started the
    daemon return."""
    global _starter, _is_ready
    _is_ready = True
    console.flush(_READY_WORDS_S)
    if _starter is not None:
        os.chdir("/")  # only now: relative paths on the command line are all opened
        _starter.tell(ready=True)
        _starter.close()
        _starter = None


def hang_up(end: Callable[[], None]) -> Callable[[], None]:
    """What SIGHUP does: with a log file, reopen it (it was rotated); without one, ``end`` if
    the terminal we were started from has gone, except under nohup(1). Ask while starting."""
    heeded = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN and _has_terminal()

    def hung_up() -> None:
        if _log is not None:
            _log.reopen()
        elif heeded and not _has_terminal():
            end()

    return hung_up


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def run(body: Callable[[], int], *, detach: bool, log_path: str, pid_path: str) -> int:
    """Run ``body`` with the log and pid file asked for, and give its exit status.

    Detached it returns twice: in the command that was typed, once ``body`` has called
    :func:`ready` (or with the error that it raised before), and in the daemon at the end.
    """
    global _log, _starter
    stderr = sys.stderr
    # The log file first: if there cannot be one, no pid file is left behind.
    if log_path:
        _log = LogFile(log_path)
    pid_file = PidFile(pid_path) if pid_path else None
    if detach:
        assert _log is not None, "a daemon needs a log file"
        starter = _fork(_log.path, pid_file)
        if starter is None:
            return EXIT_OK
        _starter = starter
    try:
        if detach:
            assert _log is not None
            _redirect(_log)
        elif _log is not None:
            sys.stderr = _log
        if pid_file is not None:
            pid_file.write()
        status = body()
        if _starter is not None:
            _starter.tell(status=status)
        return status
    except Exception as error:
        known = explain(error)
        if known is None:
            raise
        if _starter is not None:
            _starter.error(known)
        if _log is not None and not detach:
            print(f"pycopy: error: {known}", file=_log)
        if known is error:
            raise
        raise known from error
    finally:
        console.flush()
        if pid_file is not None:
            pid_file.remove(_is_ready)
        if not detach:
            sys.stderr = stderr
        if _log is not None and _log.write_errors:
            # Detached this goes to the log, which may have room again by now.
            console.say(f"{_log.write_errors} messages could not be written to the log")
            console.flush()


def _redirect(log: LogFile) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    log.take_over(1)
    log.take_over(2)
    sys.stdout = sys.stderr = log


def _fork(log_path: str, pid_file: PidFile | None) -> _Starter | None:
    """A daemon by fork, setsid, fork. Gives None in the command, which has waited for it.

    From the second fork on the pid file is the daemon's to remove.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        read_fd, write_fd = os.pipe()
        child = os.fork()
    except OSError:
        if pid_file is not None:
            pid_file.remove(started=False)
        raise
    if child == 0:
        starter = _Starter(write_fd)
        try:
            os.close(read_fd)
            os.setsid()
            if os.fork():
                os._exit(0)
        except OSError as error:
            known = explain(error)
            assert known is not None
            starter.error(known)
            if pid_file is not None:
                pid_file.remove(started=False)
            os._exit(known.exit_status)
        # Not a session leader any more: no terminal can ever become ours.
        starter.tell(pid=os.getpid())
        return starter
    os.close(write_fd)
    os.waitpid(child, 0)
    with open(read_fd, encoding="ascii") as pipe:
        _wait(pipe, log_path)
    return None


def _wait(pipe: io.TextIOBase, log_path: str) -> None:
    """Until the daemon is ready; its error becomes ours."""
    pid = 0
    try:
        for line in pipe:
            message = json.loads(line)
            pid = message.get("pid", pid)
            if message.get("ready"):
                return
            if "cause" in message:
                error = PycopyError(message["cause"], message["cure"])
                error.exit_status = message["status"]
                raise error
            if message.get("status") == EXIT_OK:
                return
    except KeyboardInterrupt:
        if pid:
            os.kill(pid, signal.SIGTERM)
        raise
    error = PycopyError("the daemon ended while starting", f"{log_path} has the reason")
    error.exit_status = EXIT_FAILED
    raise error
