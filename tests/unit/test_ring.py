"""The ring's reader on a file laid out as the kernel lays a ring out.

Records still being written, discarded ones and the turn at the end come when they like on
a real ring (tests/bpf/test_ring.py); here they come on demand.
"""

import mmap
import os
import struct

import pytest

from pycopy.kernel import ring as ring_module
from pycopy.kernel.ring import Ring
from pycopy.wire.segment import KIND_CLIENT, SEGMENT, SEGMENT_BYTES, Segment

RING_BYTES = 8192
BUSY, DISCARD = 1 << 31, 1 << 30


class Writer:
    """The kernel's part: one page for each position, then the data, mapped twice in a row."""

    def __init__(self):
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 2 * mmap.PAGESIZE + 2 * RING_BYTES)
        self.pages = mmap.mmap(self.fd, 0)
        self.position = 0

    @property
    def consumed(self):
        return struct.unpack_from("=Q", self.pages, 0)[0]

    def _copy(self, at, content):
        for index, byte in enumerate(content):
            data_at = (at + index) % RING_BYTES
            for copy in (0, RING_BYTES):
                self.pages[2 * mmap.PAGESIZE + copy + data_at] = byte

    def head(self, at, length, flags=0):
        self._copy(at, struct.pack("=II", length | flags, 0))

    def write(self, content, flags=0):
        """Where the record begins."""
        at = self.position
        self.head(at, len(content), flags)
        self._copy(at + 8, content)
        self.position += (len(content) + 15) & ~7
        assert self.position - self.consumed <= RING_BYTES
        struct.pack_into("=Q", self.pages, mmap.PAGESIZE, self.position)
        return at


@pytest.fixture
def writer():
    writer = Writer()
    yield writer
    writer.pages.close()
    os.close(writer.fd)


@pytest.fixture(params=[RING_BYTES, RING_BYTES // 2], ids=["whole", "a window"])
def ring(writer, request, monkeypatch):
    """Mapped as a whole, or half of it at a time."""
    monkeypatch.setattr(ring_module, "WINDOW_BYTES", request.param)
    ring = Ring(writer.fd, RING_BYTES)
    yield ring
    ring.close()


def record(seq, payload=b"", room=0):
    """As the programs write them: ``room`` bytes of the reserved record stay unused."""
    fields = Segment(
        time_ns=seq * 1000,
        kind=KIND_CLIENT,
        tcp_flags=0x18,
        options=0,
        wscale=0,
        service=3,
        wnd=500,
        seq=seq,
        ack=7,
        tsval=0,
        tsecr=0,
        seg_len=len(payload),
        payload_bytes=len(payload),
        mss=0,
        family=4,
        sack_blocks=0,
        key=bytes(range(36)),
        sack=bytes(32),
    )
    return SEGMENT.pack(*fields) + payload + b"\xee" * room


def drained(ring, limit=1000):
    return [(segment.seq, payload) for segment, payload in ring.drain(limit)]


def test_empty(ring):
    assert drained(ring) == []
    assert list(ring.drain_raw(10)) == []
    assert ring.pending_bytes() == 0


def test_fields_and_payload(ring, writer):
    writer.write(record(1))
    writer.write(record(2, b"GET / HTTP/1.1\r\n", room=40))
    assert ring.pending_bytes() == 120 + 176
    (first, nothing), (second, payload) = ring.drain(10)
    assert isinstance(first, Segment)
    assert (first.seq, first.wnd, first.key, nothing) == (1, 500, bytes(range(36)), b"")
    assert (second.seq, second.seg_len, payload) == (2, 16, b"GET / HTTP/1.1\r\n")
    assert ring.pending_bytes() == 0
    assert writer.consumed == writer.position


def test_raw_is_the_struct_alone(ring, writer):
    writer.write(record(1))
    writer.write(record(2, b"payload"))
    assert list(ring.drain_raw(10)) == [record(1), record(2, b"payload")[:SEGMENT_BYTES]]
    assert writer.consumed == writer.position


@pytest.mark.parametrize("method", ["drain", "drain_raw"])
def test_stops_at_a_record_that_is_being_written(ring, writer, method):
    writer.write(record(1))
    at = writer.write(record(2), BUSY)
    writer.write(record(3))
    assert len(list(getattr(ring, method)(10))) == 1
    assert writer.consumed == at
    assert list(getattr(ring, method)(10)) == []
    writer.head(at, SEGMENT_BYTES)
    assert len(list(getattr(ring, method)(10))) == 2


@pytest.mark.parametrize("method", ["drain", "drain_raw"])
def test_passes_over_discarded_records(ring, writer, method):
    writer.write(record(1), DISCARD)
    writer.write(record(2))
    writer.write(record(3, bytes(99)), DISCARD)
    assert len(list(getattr(ring, method)(10))) == 1
    assert writer.consumed == writer.position


def test_limit_and_rest(ring, writer):
    for seq in range(10):
        writer.write(record(seq))
    assert [seq for seq, _ in drained(ring, 4)] == [0, 1, 2, 3]
    assert ring.pending_bytes() == 6 * 120
    assert [seq for seq, _ in drained(ring)] == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("method", ["drain", "drain_raw"])
def test_what_was_yielded_is_consumed_when_the_caller_stops(ring, writer, method):
    for seq in range(5):
        writer.write(record(seq))
    records = getattr(ring, method)(10)
    next(records)
    next(records)
    records.close()
    assert writer.consumed == 2 * 120
    assert [seq for seq, _ in drained(ring)] == [2, 3, 4]


@pytest.mark.parametrize("method", ["drain", "drain_raw"])
def test_room_is_given_back_while_draining(ring, writer, method):
    for seq in range(65):
        writer.write(record(seq))
    records = getattr(ring, method)(128)
    for _ in range(64):
        next(records)
    assert writer.consumed == 64 * 120
    records.close()


def test_round_and_round(ring, writer):
    """Records of all lengths cross the end of the ring at every offset."""
    sent = 0
    for turn in range(60):
        expected = []
        for _ in range(3):
            payload = bytes((sent + index) % 251 for index in range(sent * 37 % 1500))
            writer.write(record(sent, payload))
            expected.append((sent, payload))
            sent += 1
        assert drained(ring) == expected, turn
    assert writer.position > 5 * RING_BYTES


def test_a_second_reader_goes_on_where_the_first_stopped(writer):
    writer.write(record(1))
    writer.write(record(2))
    first = Ring(writer.fd, RING_BYTES)
    assert drained(first, 1) == [(1, b"")]
    first.close()
    second = Ring(writer.fd, RING_BYTES)
    assert drained(second) == [(2, b"")]
    second.close()


def test_closed_while_a_drain_is_half_way(writer):
    """An interrupt ends the loop over a drain, and the driver closes what it has."""
    for kind in (Ring.drain, Ring.drain_raw):
        half_way = Ring(writer.fd, RING_BYTES)
        writer.write(record(1))
        writer.write(record(2))
        drain = kind(half_way, 10)
        next(drain)
        half_way.close()
        drain.close()


def test_little_is_not_lifted(ring, writer):
    writer.write(record(1, bytes(RING_BYTES // 8 - 200)))
    ring.lift(1 << 20)
    assert ring.lifted_bytes == 0
    assert [seq for seq, _ in drained(ring)] == [1]


def test_what_is_lifted_gives_room_and_comes_first(ring, writer):
    for seq in range(1, 6):
        writer.write(record(seq, bytes([seq]) * 1000))
    ring.lift(1 << 20)
    assert writer.consumed == writer.position
    assert ring.pending_bytes() == ring.lifted_bytes == 5 * (SEGMENT_BYTES + 1000)
    writer.write(record(6))
    assert drained(ring, 3) == [(seq, bytes([seq]) * 1000) for seq in (1, 2, 3)]
    # A drain ends where what was lifted does; what is in the ring is the next one's.
    assert [seq for seq, _ in drained(ring)] == [4, 5]
    assert ring.lifted_bytes == 0
    assert [seq for seq, _ in drained(ring)] == [6]
    assert ring.pending_bytes() == 0


def test_no_more_is_lifted_than_memory_allows(ring, writer):
    for seq in range(1, 6):
        writer.write(record(seq, bytes(1000)))
    ring.lift(2500)
    assert ring.lifted_bytes == 3 * (SEGMENT_BYTES + 1000)
    ring.lift(2500)
    assert ring.lifted_bytes == 3 * (SEGMENT_BYTES + 1000)
    assert [seq for seq, _ in drained(ring)] == [1, 2, 3]
    assert [seq for seq, _ in drained(ring)] == [4, 5]


def test_lifting_stops_at_a_record_that_is_being_written(ring, writer):
    writer.write(record(1, bytes(2000)))
    at = writer.write(record(2, b"late"), BUSY)
    ring.lift(1 << 20)
    assert [seq for seq, _ in drained(ring)] == [1]
    assert ring.pending_bytes() == writer.position - at
    writer.head(at, len(record(2, b"late")))
    assert drained(ring) == [(2, b"late")]


class Reused:
    """The consumer's position, before which the kernel writes anew as soon as it is moved."""

    def __init__(self, writer, word):
        self._writer, self._word = writer, word

    def __getitem__(self, index):
        return self._word[index]

    def __setitem__(self, index, position):
        for at in range(self._word[index], position):
            self._writer._copy(at, b"\xee")
        self._word[index] = position

    def release(self):
        self._word.release()


@pytest.mark.parametrize("drain", ["drain", "drain_raw"])
def test_a_record_is_copied_before_its_room_is_given_back(writer, ring, monkeypatch, drain):
    monkeypatch.setattr(ring_module, "_COMMIT_MASK", 0)
    ring._consumer = Reused(writer, ring._consumer)
    written = [record(seq, b"payload") for seq in range(3)]
    for content in written:
        writer.write(content)
    found = list(getattr(ring, drain)(3))
    if drain == "drain":
        found = [SEGMENT.pack(*segment) + payload for segment, payload in found]
    assert found == [content[: len(each)] for content, each in zip(written, found, strict=True)]
