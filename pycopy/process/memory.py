"""How much memory this process has, and may have.

Tests: tests/lab/test_replay_start.py
"""

import mmap
import os


def rss_bytes() -> int:
    """Resident memory of this process, what is mapped of rings and logs included."""
    return _statm()[1] * mmap.PAGESIZE


def own_bytes() -> int:
    """Resident memory of this process without what is mapped: what grows with sessions."""
    _, resident, shared, *_ = _statm()
    return (resident - shared) * mmap.PAGESIZE


class Limit:
    """How much memory may be used, besides what is mapped; 0: as much as there is."""

    def __init__(self, limit_mb: int) -> None:
        self._limit_bytes = limit_mb << 20
        #: Whether it was more when last looked at.
        self.exceeded = False

    def look(self) -> bool:
        """Look anew: whether it is exceeded now."""
        self.exceeded = bool(self._limit_bytes) and own_bytes() > self._limit_bytes
        return self.exceeded


def _statm() -> list[int]:
    fd = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [int(pages) for pages in os.read(fd, 128).split()]
    finally:
        os.close(fd)
