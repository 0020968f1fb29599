"""A BPF ring buffer, mapped and read by ourselves: a callback per record costs several times more.

The kernel writes records and moves the producer's position; we read and move the
consumer's, which is what gives the room back. The kernel has the data pages twice in a row,
so no record is ever cut at the end. What is mapped counts as resident memory: of a large ring
that is a window, which moves along. Hot path: see the rules at the top of pycopy.wire.headers.

Does not know who fills the ring nor what a segment means.
"""

import mmap
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pycopy.wire.segment import PIECE_BYTES, SEGMENT, SEGMENT_BYTES, Segment

#: Head of a record: u32 length with two flags, u32 that is the kernel's own business.
_HEAD_BYTES = 8
_BUSY = 1 << 31
_DISCARD = 1 << 30
_LENGTH = _DISCARD - 1

#: Give room back every 64 records within one drain.
_COMMIT_MASK = 63

#: Bytes of the ring that are mapped at a time.
WINDOW_BYTES = 4 << 20

#: Longest record, in whole pages: what may reach out of the window.
_OVERLAP_BYTES = -(-(_HEAD_BYTES + SEGMENT_BYTES + PIECE_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE

_PAYLOAD_BYTES = Segment._fields.index("payload_bytes")


class Ring:
    """The reader of one ring; ``fileno()`` is readable while records are waiting.

    The descriptor stays its owner's; close() ends the mapping only.
    """

    __slots__ = (
        "_consumer",
        "_consumer_page",
        "_lifted",
        "_map_fd",
        "_mask",
        "_pages",
        "_position",
        "_producer",
        "_producer_page",
        "_start",
        "_window",
        "_words",
        "lifted_bytes",
    )

    def __init__(self, map_fd: int, ring_bytes: int) -> None:
        page = mmap.PAGESIZE
        self._map_fd = map_fd
        self._mask = ring_bytes - 1
        self._consumer_page = mmap.mmap(map_fd, page)
        self._consumer = memoryview(self._consumer_page).cast("Q")
        self._producer_page = mmap.mmap(map_fd, page, prot=mmap.PROT_READ, offset=page)
        self._producer = memoryview(self._producer_page).cast("Q")
        self._window = min(WINDOW_BYTES, ring_bytes)
        self._start = 0
        self._map()
        self._position = self._consumer[0]
        #: What :meth:`lift` has moved, and how many bytes of memory that takes.
        self._lifted: deque[tuple[Segment, bytes]] = deque()
        self.lifted_bytes = 0

    def _map(self) -> None:
        """Map the window that begins at ``_start``, and what a record may reach beyond it."""
        self._pages = mmap.mmap(
            self._map_fd, self._window + min(_OVERLAP_BYTES, self._mask + 1),
            prot=mmap.PROT_READ, offset=2 * mmap.PAGESIZE + self._start,
        )  # fmt: skip
        self._words = memoryview(self._pages).cast("I")

    def _move(self, offset: int) -> tuple[mmap.mmap, memoryview, int]:
        """Map the window that has ``offset``: its bytes, its words, and where it begins."""
        self._words.release()
        self._pages.close()
        self._start = offset & -self._window
        self._map()
        return self._pages, self._words, self._start

    def fileno(self) -> int:
        """The map's own descriptor."""
        return self._map_fd

    def pending_bytes(self) -> int:
        """Bytes of records that are written, or being written, and not yet consumed."""
        return self._producer[0] - self._consumer[0] + self.lifted_bytes

    def lift(self, most_bytes: int) -> None:
        """Move what is in the ring to memory of our own, once it is an eighth of the ring.

        To move a record takes a fraction of the time that handling it does: a burst may be
        much larger than the ring. At most ``most_bytes`` of records lie in memory.
        """
        waiting_bytes = self._producer[0] - self._consumer[0]
        if waiting_bytes <= self._mask >> 3 or self.lifted_bytes >= most_bytes:
            return
        for record in self._drain_ring(waiting_bytes):  # no more records than bytes
            self._lifted.append(record)
            self.lifted_bytes += SEGMENT_BYTES + len(record[1])
            if self.lifted_bytes >= most_bytes:
                break

    def drain(self, limit: int) -> Iterator[tuple[Segment, bytes]]:
        """Up to ``limit`` records that are there now: each segment and its payload.

        Stops at a record that is still being written, and where what was lifted ends. What
        was yielded is consumed, also when the caller stops half-way (and closes or forgets
        the iterator). One at a time.
        """
        return self._drain_lifted(limit) if self._lifted else self._drain_ring(limit)

    def _drain_lifted(self, limit: int) -> Iterator[tuple[Segment, bytes]]:
        lifted = self._lifted
        for _ in range(min(limit, len(lifted))):
            segment, payload = lifted.popleft()
            self.lifted_bytes -= SEGMENT_BYTES + len(payload)
            yield segment, payload

    def _drain_ring(self, limit: int, *, raw: bool = False) -> Iterator[Any]:
        """What :meth:`drain` yields, or :meth:`drain_raw`."""
        pages, words, start = self._pages, self._words, self._start
        consumer, mask, window = self._consumer, self._mask, self._window
        unpack, new, segment_type = SEGMENT.unpack_from, tuple.__new__, Segment
        position, end = self._position, self._producer[0]
        left = limit
        try:
            while left and position < end:
                offset = (position & mask) - start
                if not 0 <= offset < window:
                    pages, words, start = self._move(offset + start)
                    offset = (position & mask) - start
                head = words[offset >> 2]
                if head & _BUSY:
                    break
                position += ((head & _LENGTH) + _HEAD_BYTES + 7) & ~7
                if head & _DISCARD:
                    continue
                offset += _HEAD_BYTES
                body = offset + SEGMENT_BYTES
                if raw:
                    record: Any = pages[offset:body]
                else:
                    fields = unpack(pages, offset)
                    payload_bytes = fields[_PAYLOAD_BYTES]
                    payload = pages[body : body + payload_bytes] if payload_bytes else b""
                    record = new(segment_type, fields), payload
                left -= 1
                if not left & _COMMIT_MASK:
                    consumer[0] = position  # not before it is copied
                yield record
        finally:
            self._position = position
            # Closed half-way (an interrupt): then nobody waits for the room.
            with suppress(ValueError):
                consumer[0] = position

    def drain_raw(self, limit: int) -> Iterator[bytes]:
        """As :meth:`drain`, but each record's struct pycopy_segment as it is, for the channel."""
        return self._drain_ring(limit, raw=True)

    def close(self) -> None:
        """Unmap; the descriptor is closed by whoever opened it."""
        for view in (self._consumer, self._producer, self._words):
            view.release()
        for pages in (self._pages, self._producer_page, self._consumer_page):
            pages.close()
