"""A descriptor that is readable from a given time on: timerfd_create(2), in Python since 3.13.

For what lies in an epoll set of its own and knows its own times; a driver's times go to
Loop.wait().

Tests: tests/unit/test_perfring.py
"""

import ctypes
import os
import struct

_CLOCK_MONOTONIC = 1
_TFD_TIMER_ABSTIME = 1

#: ``struct itimerspec``: interval and first expiry, each seconds and nanoseconds.
_TIMES = struct.Struct("@llll")

_libc = ctypes.CDLL(None, use_errno=True)
_settime = _libc.timerfd_settime
_settime.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


class Alarm:
    """Off at first. It stays readable, without being read, until it is set anew."""

    __slots__ = ("_at", "_at_ns", "_fd")

    def __init__(self) -> None:
        fd = int(_libc.timerfd_create(_CLOCK_MONOTONIC, os.O_CLOEXEC | os.O_NONBLOCK))
        if fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._fd = fd
        self._at_ns = 0
        self._at = ctypes.create_string_buffer(_TIMES.size)

    def fileno(self) -> int:
        """The timerfd, for an epoll set."""
        return self._fd

    def set(self, at_ns: int) -> None:
        """Readable from ``at_ns`` (CLOCK_MONOTONIC) on, now if that is past; 0: not at all.

        Raises ValueError when closed.
        """
        if self._fd < 0:
            raise ValueError("the alarm is closed")
        if at_ns == self._at_ns:
            return
        seconds, rest_ns = divmod(at_ns, 1_000_000_000)
        _TIMES.pack_into(self._at, 0, 0, 0, seconds, rest_ns)
        if _settime(self._fd, _TFD_TIMER_ABSTIME, ctypes.addressof(self._at), None):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._at_ns = at_ns

    def close(self) -> None:
        """Close the descriptor; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
