"""Perf ring buffers, one for each CPU, read as if they were one :class:`pycopy.kernel.ring.Ring`.

For kernels without BPF ring buffers. Each sample is one record, as a program gave it to
bpf_perf_event_output(). The kernel moves a ring's head and we its tail, which is what gives
the room back. The data pages are mapped once: what crosses their end is put together.

Records of one flow may come by several CPUs, so they are merged by their time. A record is
held back, in its ring, until it is old enough for one that is older to have come by another
CPU. Hot path: see the rules at the top of pycopy.wire.headers.

Does not know who fills the rings nor what a segment means.
"""

import mmap
import os
import select
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from heapq import heapify, heappop, heapreplace
from typing import Any, TypeVar

from pycopy.kernel import perfevent, syscall
from pycopy.kernel.alarm import Alarm
from pycopy.process.loop import NEVER_NS
from pycopy.wire.segment import SEGMENT, SEGMENT_BYTES, Segment

#: How long records are held back, so that an earlier one of another CPU can come before: from
#: a program's look at the clock to the end of its output a few microseconds pass, some hundred
#: when an interrupt comes in between.
MERGE_NS = 1_000_000
#: How long records are held back when a ring is half full: to lose some is worse than to
#: reorder them.
PRESSED_NS = 100_000
#: No clock of this host is so far ahead: such a record's time is junk, and it must not wait.
_FAR_NS = 1_000_000_000
_NOW_NS = 1

#: No CPU's ring is smaller. It has room for three of the longest records.
SHARE_BYTES_MIN = 1 << 16

#: Words of the first page (``struct perf_event_mmap_page``).
_HEAD, _TAIL = 1024 >> 3, 1032 >> 3

#: Head of a record, one word: u32 type, u16 misc, u16 size of the whole.
_TYPE, _SIZE_SHIFT = 0xFFFFFFFF, 48
_LOST, _SAMPLE = 2, 9
_HEAD_BYTES = 8
#: ``struct perf_record_lost``: head, id, how many.
_LOST_BYTES, _LOST_AT = 24, 16
#: Where the data is in a sample that bears raw data only: head, u32 length, data, padding.
_RAW_AT = 12
_SAMPLE_BYTES_MIN = _RAW_AT + SEGMENT_BYTES

#: ``time_ns`` and ``payload_bytes`` of a struct pycopy_segment.
_ESSENCE = struct.Struct("<Q28xI")
_PAYLOAD_BYTES = Segment._fields.index("payload_bytes")

#: Give room back every 64 records within one drain.
_COMMIT_MASK = 63

Record = tuple[Segment, bytes]
Read = TypeVar("Read", Record, bytes)
#: A record in the merge: its time, the index of its ring, its end there, the record itself.
Item = tuple[int, int, int, Read]


class CpuRing:
    """The reader of one CPU's ring: ``pages`` are its first page and ``data_bytes`` of data.

    Its iterators run ahead of ``position``, which whoever takes a record moves to its end.
    """

    __slots__ = ("_data_bytes", "_pages", "_words", "half", "lost", "malformed", "position")

    def __init__(self, pages: mmap.mmap, data_bytes: int) -> None:
        self._pages = pages
        self._words = memoryview(pages).cast("Q")
        self._data_bytes = data_bytes
        self.half = data_bytes >> 1
        self.position = self._words[_TAIL]
        self.lost = 0
        self.malformed = 0

    def head(self) -> int:
        """Where what is written ends."""
        return self._words[_HEAD]

    def commit(self) -> None:
        """Give the room up to ``position`` back."""
        self._words[_TAIL] = self.position

    def records(self, index: int, head: int) -> Iterator[Item[Record]]:
        """Time, ``index``, end, and the segment with its payload, of each record before ``head``.

        The next one may be asked for once ``position`` is at the end of the one before.
        """
        return self._items(index, head)

    def _items(self, index: int, head: int, *, raw: bool = False) -> Iterator[Item[Any]]:
        """What :meth:`records` yields, or :meth:`segments`."""
        pages, words, base, data_bytes = self._pages, self._words, mmap.PAGESIZE, self._data_bytes
        unpack, new, segment_type = SEGMENT.unpack_from, tuple.__new__, Segment
        mask, position = data_bytes - 1, self.position
        while position < head:
            at = position & mask
            word = words[(base + at) >> 3]
            size = word >> _SIZE_SHIFT
            end = position + size
            if word & _TYPE != _SAMPLE or size < _SAMPLE_BYTES_MIN or end > head:
                position = self._skip(position, head)
                continue
            if at + size <= data_bytes:
                source: mmap.mmap | bytes = pages
                offset = base + at + _RAW_AT
            else:
                source, offset = self._joined(at, size), _RAW_AT
            if raw:
                time_ns, payload_bytes = _ESSENCE.unpack_from(source, offset)
            else:
                fields = unpack(source, offset)
                time_ns, payload_bytes = fields[0], fields[_PAYLOAD_BYTES]
            if payload_bytes > size - _SAMPLE_BYTES_MIN:
                position = self._skip(position, head)
                continue
            body = offset + SEGMENT_BYTES
            if raw:
                yield time_ns, index, end, source[offset:body]
            else:
                payload = source[body : body + payload_bytes] if payload_bytes else b""
                yield time_ns, index, end, (new(segment_type, fields), payload)
            position = end

    def segments(self, index: int, head: int) -> Iterator[Item[bytes]]:
        """As :meth:`records`, but each record's struct pycopy_segment as it is."""
        return self._items(index, head, raw=True)

    def _joined(self, at: int, size: int) -> bytes:
        """The record at ``at``, which goes on where the data begin."""
        base, data_bytes = mmap.PAGESIZE, self._data_bytes
        rest = at + size - data_bytes
        return self._pages[base + at : base + data_bytes] + self._pages[base : base + rest]

    def _skip(self, position: int, head: int) -> int:
        """Pass over what is no whole record, all before it being taken. Where the next one is."""
        base, mask = mmap.PAGESIZE, self._data_bytes - 1
        word = self._words[(base + (position & mask)) >> 3]
        kind, size = word & _TYPE, word >> _SIZE_SHIFT
        if size < _HEAD_BYTES or size & 7 or position + size > head:
            self.malformed += 1
            size = head - position  # nobody knows where the next one is
        elif kind == _LOST and size >= _LOST_BYTES:
            self.lost += self._words[(base + (position + _LOST_AT & mask)) >> 3]
        elif kind in (_LOST, _SAMPLE):
            self.malformed += 1
        self.position = position + size
        return self.position

    def close(self) -> None:
        """Unmap the pages; the descriptor is the owner's."""
        self._words.release()
        self._pages.close()


class Merged:
    """The rings of all CPUs as one: no descriptor, and no clock but the one it is given.

    ``due_ns`` says from when on a drain has more, as far as the one before knows: records are
    held back, or more than its limit was there. :data:`NEVER_NS` if it left nothing.
    """

    __slots__ = ("_clock", "_lifted", "_rings", "due_ns", "lifted_bytes")

    def __init__(self, rings: Sequence[CpuRing], clock: Callable[[], int]) -> None:
        self._rings = rings
        self._clock = clock
        self.due_ns = NEVER_NS
        #: What :meth:`lift` has moved, in order, and how many bytes of memory that takes.
        self._lifted: deque[Record] = deque()
        self.lifted_bytes = 0

    @property
    def lost(self) -> int:
        """What the kernel says it had no room for.

        The same as the program's own count of outputs that failed, so not to be added to it.
        It may be less: the kernel says it with the next record that has room again.
        """
        return sum(ring.lost for ring in self._rings)

    @property
    def malformed(self) -> int:
        """Samples that are no record: none, unless another program outputs to the same map."""
        return sum(ring.malformed for ring in self._rings)

    def pending_bytes(self) -> int:
        """Bytes of records that are not yet consumed, also of those that are held back."""
        waiting_bytes = self.lifted_bytes
        for ring in self._rings:
            waiting_bytes += ring.head() - ring.position
        return waiting_bytes

    def lift(self, most_bytes: int) -> None:
        """Move what is due to memory of our own, once it is an eighth of a CPU's ring.

        As :meth:`pycopy.kernel.ring.Ring.lift`: at most ``most_bytes`` of records lie in memory.
        """
        if self.lifted_bytes >= most_bytes:
            return
        for ring in self._rings:
            if ring.head() - ring.position > ring.half >> 2:
                break
        else:
            return
        for record in self._merge(NEVER_NS, CpuRing.records):
            self._lifted.append(record)
            self.lifted_bytes += SEGMENT_BYTES + len(record[1])
            if self.lifted_bytes >= most_bytes:
                break

    def drain(self, limit: int) -> Iterator[Record]:
        """Up to ``limit`` records that are due now: each segment and its payload, by time.

        Stops where what was lifted ends. What was yielded is consumed, also when the caller
        stops half-way (and closes or forgets the iterator). One at a time.
        """
        if self._lifted:
            return self._drain_lifted(limit)
        return self._merge(limit, CpuRing.records)

    def drain_raw(self, limit: int) -> Iterator[bytes]:
        """As :meth:`drain`, but each record's struct pycopy_segment as it is, for the channel."""
        return self._merge(limit, CpuRing.segments)

    def _drain_lifted(self, limit: int) -> Iterator[Record]:
        lifted = self._lifted
        try:
            for _ in range(min(limit, len(lifted))):
                segment, payload = lifted.popleft()
                self.lifted_bytes -= SEGMENT_BYTES + len(payload)
                yield segment, payload
        finally:
            with suppress(ValueError):  # as in _merge()
                self._settle(_NOW_NS)

    def _merge(
        self, limit: int, read: Callable[[CpuRing, int, int], Iterator[Item[Read]]]
    ) -> Iterator[Read]:
        """Records in the order of their times; those of one CPU stay in the order they have."""
        self._look()
        # Before the heads are read: what comes after them is younger than what is due.
        now_ns = self._clock()
        rings, readers, heap, window_ns = self._begin(read)
        heapify(heap)
        horizon_ns, far_ns = now_ns - window_ns, now_ns + _FAR_NS
        left, due_ns = limit, _NOW_NS
        try:
            while heap:
                time_ns, index, end, record = heap[0]
                if horizon_ns < time_ns < far_ns:
                    due_ns = time_ns + window_ns
                    break
                if not left:
                    break
                left -= 1
                rings[index].position = end
                if not left & _COMMIT_MASK:
                    for ring in rings:
                        ring.commit()
                yield record
                following = next(readers[index], None)
                if following is None:
                    heappop(heap)
                else:
                    heapreplace(heap, following)
        finally:
            # Closed half-way (an interrupt): then nobody waits for the room.
            with suppress(ValueError):
                for ring in rings:
                    ring.commit()
                self._settle(due_ns)

    def _begin(
        self, read: Callable[[CpuRing, int, int], Iterator[Item[Read]]]
    ) -> tuple[list[CpuRing], list[Iterator[Item[Read]]], list[Item[Read]], int]:
        """The rings that have something, a reader of each, their first records, and for how
        long to hold back."""
        rings: list[CpuRing] = []
        readers: list[Iterator[Item[Read]]] = []
        items: list[Item[Read]] = []
        window_ns = MERGE_NS
        for ring in self._rings:
            head = ring.head()
            waiting_bytes = head - ring.position
            if not waiting_bytes:
                continue
            if waiting_bytes > ring.half:
                window_ns = PRESSED_NS
            reader = read(ring, len(rings), head)
            rings.append(ring)
            readers.append(reader)
            first = next(reader, None)
            if first is not None:
                items.append(first)
        return rings, readers, items, window_ns

    def _look(self) -> None:
        """The heads are about to be read."""

    def _settle(self, due_ns: int) -> None:
        """A drain ends, and the next one may have something from ``due_ns`` on."""
        if self._lifted:
            due_ns = _NOW_NS
        elif due_ns == _NOW_NS and not self.pending_bytes():
            due_ns = NEVER_NS
        self.due_ns = due_ns


class PerfRing(Merged):
    """The reader of a BPF_MAP_TYPE_PERF_EVENT_ARRAY; ``fileno()`` is readable while records
    are due, and not while they are merely held back.

    The kernel's descriptors cannot say so: each is readable once after a record has come,
    read or not. So they are in an epoll set with an alarm, which goes off when more is due.
    ``ring_bytes`` is for all CPUs; what they take is locked memory. A CPU that comes online
    later has no ring: what it outputs fails. The map's descriptor stays its owner's.
    """

    __slots__ = ("_alarm", "_cpus", "_epoll", "_events", "_map_fd")

    def __init__(self, map_fd: int, ring_bytes: int) -> None:
        self._map_fd = map_fd
        self._cpus: dict[int, int] = {}
        try:
            self._epoll = select.epoll()
            self._alarm = Alarm()
        except OSError as error:
            raise perfevent.unfit(error) from error
        rings: list[CpuRing] = []
        super().__init__(rings, time.monotonic_ns)
        try:
            self._fill(rings, ring_bytes)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise perfevent.unfit(error) from error
            raise

    def _fill(self, rings: list[CpuRing], ring_bytes: int) -> None:
        """Have a ring for each CPU that is online."""
        for cpu in range(syscall.possible_cpus()):
            fd = perfevent.open_output(cpu)
            if fd is not None:
                self._cpus[cpu] = fd
        data_bytes = share_bytes(ring_bytes, len(self._cpus))
        self._epoll.register(self._alarm, select.EPOLLIN)
        for cpu, fd in self._cpus.items():
            rings.append(CpuRing(perfevent.map_ring(fd, data_bytes), data_bytes))
            self._epoll.register(fd, select.EPOLLIN)
            perfevent.put_to_use(fd, self._map_fd, cpu)
        self._events = 1 + len(self._cpus)

    def fileno(self) -> int:
        """An epoll descriptor, readable when new records are there or held back ones are due."""
        return self._epoll.fileno()

    def _look(self) -> None:
        # Each descriptor that is readable would else end a wait of its own.
        self._epoll.poll(0, self._events)

    def _settle(self, due_ns: int) -> None:
        super()._settle(due_ns)
        self._alarm.set(0 if self.due_ns == NEVER_NS else self.due_ns)

    def close(self) -> None:
        """End what outputs to the rings, and unmap them."""
        for cpu, fd in self._cpus.items():
            with suppress(OSError):  # its owner has closed the map
                perfevent.put_out_of_use(self._map_fd, cpu)
            os.close(fd)
        self._cpus.clear()
        for ring in self._rings:
            ring.close()
        self._alarm.close()
        self._epoll.close()


def share_bytes(ring_bytes: int, cpus: int) -> int:
    """Bytes of each CPU's ring: a power of two, since a ring's data pages are."""
    share = max(ring_bytes // max(cpus, 1), SHARE_BYTES_MIN)
    return 1 << share.bit_length() - 1
