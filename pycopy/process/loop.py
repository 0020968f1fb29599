"""One plain epoll loop, shared by replay and intercept.

File descriptors have callbacks; everything with a time of its own is asked for its
deadline by the driver, which passes the nearest one to :meth:`Loop.wait`. No thread, no
coroutine: an await per segment is not affordable, and there is nothing here to suspend.
With every turn it may say that it is there (pycopy.kernel.heartbeat).
"""

import select
import time
from collections.abc import Callable

READ = select.EPOLLIN
WRITE = select.EPOLLOUT

#: Later than any deadline.
NEVER_NS = 1 << 62

#: A loop that has nothing to do comes by this often all the same, to say that it is there.
BEAT_NS = 500_000_000

#: Events that one wait returns at most. Python's default makes room for a thousand each time.
_EVENTS_MAX = 64

Callback = Callable[[int], None]


class Loop:
    """Callbacks by file descriptor; ``callback(events)`` gets the epoll event mask."""

    def __init__(self, beat: Callable[[], int] = time.monotonic_ns) -> None:
        """``beat`` is called with every turn, and says what time it is."""
        self._beat = beat
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callback] = {}
        self._again: set[int] = set()

    def add(self, fd: int, events: int, callback: Callback) -> None:
        """Call ``callback`` whenever ``events`` (READ, WRITE or both) are there on ``fd``."""
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def change(self, fd: int, events: int) -> None:
        """Wait for other events of ``fd``; its callback stays."""
        self._epoll.modify(fd, events)

    def again(self, fd: int) -> None:
        """Run its callback within the next wait, ready or not: it has more than it could handle."""
        self._again.add(fd)

    def remove(self, fd: int) -> None:
        """Forget ``fd``; call it before closing the descriptor."""
        self._again.discard(fd)
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def wait(self, deadline_ns: int) -> None:
        """Run what is ready; otherwise sleep until ``deadline_ns`` (CLOCK_MONOTONIC) at most.

        It may return earlier, with nothing done, for the heartbeat's sake.
        """
        callbacks, again = self._callbacks, self._again
        rest_ns = deadline_ns - self._beat()
        timeout_s = 0 if again else (rest_ns if rest_ns < BEAT_NS else BEAT_NS) / 1e9
        ready = self._epoll.poll(timeout_s if timeout_s > 0 else 0, _EVENTS_MAX)
        if again:
            self._again = set()
            ready += [(fd, READ) for fd in again.difference(fd for fd, _ in ready)]
        for fd, events in ready:
            callback = callbacks.get(fd)
            if callback is not None:
                callback(events)

    def close(self) -> None:
        """Close the epoll descriptor; those it waited for stay open."""
        self._epoll.close()
        self._callbacks.clear()
