"""The sign of life that the BPF programs ask for (map "heartbeat" in bpf/pycopy.h).

Whoever runs the data loop beats with every turn. A process that is stopped, hangs or is gone
does not, and what it has left attached falls still: capturing after abi.LAPSE_NS, swallowing
after abi.GRACE_NS. No thread may do this: it would beat on for a loop that hangs.
"""

import mmap
import os
import time

from pycopy.kernel import abi
from pycopy.kernel.module import make_map


class Heartbeat:
    """One process's sign of life: no effect until :meth:`open`, and none after :meth:`close`."""

    def __init__(self) -> None:
        self.fd = -1
        self._page: mmap.mmap | None = None
        self._word: memoryview | None = None
        self._last_ns = 0
        #: Times that it was missed, and the longest time, since :meth:`take_lapse`.
        self._missed_ns = 0

    def open(self) -> None:
        """Make the map; raises PycopyError."""
        if self._page is None:
            self.fd = make_map("heartbeat")
            self._page = mmap.mmap(self.fd, mmap.PAGESIZE)
            self._word = memoryview(self._page).cast("Q")
        self.begin()

    def begin(self) -> None:
        """From now on it is meant: what took its time before, such as loading, was no lapse."""
        self._last_ns = 0
        self.beat()

    @property
    def given(self) -> dict[str, int]:
        """For pycopy.loader.load()."""
        return {"heartbeat": self.fd}

    def beat(self) -> int:
        """Say that we are here; when, by CLOCK_MONOTONIC."""
        now_ns = time.monotonic_ns()
        if self._word is not None:
            missed_ns = now_ns - self._last_ns
            if missed_ns > abi.LAPSE_NS and self._last_ns:
                self._missed_ns = max(self._missed_ns, missed_ns)
            self._word[0] = self._last_ns = now_ns
        return now_ns

    def take_lapse(self) -> int:
        """For how long it was missed, at most, since this was asked before; 0: it was not."""
        missed_ns, self._missed_ns = self._missed_ns, 0
        return missed_ns

    def close(self) -> None:
        """What is still attached may go on for as long as for anybody who is gone."""
        if self._page is not None and self._word is not None:
            self._word.release()
            self._page.close()
            os.close(self.fd)
        self.fd, self._page, self._word = -1, None, None
