"""How much memory this process has.

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


def _statm() -> list[int]:
    fd = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [int(pages) for pages in os.read(fd, 128).split()]
    finally:
        os.close(fd)
