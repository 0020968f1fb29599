"""The rings of several CPUs, laid out as the kernel lays them out, and read as one.

What comes when it likes on real rings (tests/bpf/test_perfring.py) comes on demand here: the
turn at every offset, what was lost, what is no record, and times in any order.
"""

import errno
import mmap
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pycopy.errors import HostUnfit, PycopyError
from pycopy.kernel import perfevent
from pycopy.kernel.perfring import (
    MERGE_NS,
    PRESSED_NS,
    SHARE_BYTES_MIN,
    CpuRing,
    Merged,
    share_bytes,
)
from pycopy.process.loop import NEVER_NS
from pycopy.wire.segment import KIND_CLIENT, SEGMENT, SEGMENT_BYTES, Segment

DATA_BYTES = 8192
HEAD_AT, TAIL_AT = 1024, 1032
LOST, THROTTLE, SAMPLE = 2, 5, 9
#: A record without payload: head, length of the raw data, segment.
RECORD_BYTES = 8 + 4 + SEGMENT_BYTES + 4


class Cpu:
    """The kernel's part of one CPU's ring."""

    def __init__(self):
        self.pages = mmap.mmap(-1, mmap.PAGESIZE + DATA_BYTES)
        self.head = 0
        self.ring = CpuRing(self.pages, DATA_BYTES)

    @property
    def tail(self):
        return struct.unpack_from("=Q", self.pages, TAIL_AT)[0]

    def raw(self, content):
        assert not len(content) & 7
        for index, byte in enumerate(content):
            self.pages[mmap.PAGESIZE + (self.head + index) % DATA_BYTES] = byte
        self.head += len(content)
        assert self.head - self.tail < DATA_BYTES
        struct.pack_into("=Q", self.pages, HEAD_AT, self.head)

    def write(self, content, kind=SAMPLE):
        """As bpf_perf_event_output() does: what aligns the next record belongs to the raw data."""
        raw_bytes = (len(content) + 4 + 7 & ~7) - 4
        head = struct.pack("=IHHI", kind, 0, 12 + raw_bytes, raw_bytes)
        self.raw(head + content.ljust(raw_bytes, b"\xee"))

    def lose(self, number):
        self.raw(struct.pack("=IHHQQ", LOST, 0, 24, 1, number))


class Bench:
    """Three CPUs, of which one has nothing, and a clock that is moved by hand."""

    def __init__(self):
        self.now_ns = 1_000_000_000
        self.cpus = [Cpu() for _ in range(3)]
        self.merged = Merged([cpu.ring for cpu in self.cpus], lambda: self.now_ns)

    def drained(self, limit=1000):
        return [(segment.seq, payload) for segment, payload in self.merged.drain(limit)]

    def seqs(self, limit=1000):
        return [seq for seq, _ in self.drained(limit)]

    def close(self):
        for cpu in self.cpus:
            cpu.ring.close()


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.close()


def record(seq, payload=b"", time_ns=None, payload_bytes=None):
    fields = Segment(
        time_ns=seq * 1000 if time_ns is None else time_ns,
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
        payload_bytes=len(payload) if payload_bytes is None else payload_bytes,
        mss=0,
        family=4,
        sack_blocks=0,
        key=bytes(range(36)),
        sack=bytes(32),
    )
    return SEGMENT.pack(*fields) + payload


def test_empty(bench):
    assert bench.drained() == []
    assert list(bench.merged.drain_raw(10)) == []
    assert bench.merged.pending_bytes() == 0
    assert bench.merged.due_ns == NEVER_NS


def test_fields_and_payload(bench):
    bench.cpus[0].write(record(1))
    bench.cpus[0].write(record(2, b"GET / HTTP/1.1\r\n"))
    assert bench.merged.pending_bytes() == 128 + 144
    (first, nothing), (second, payload) = bench.merged.drain(10)
    assert isinstance(first, Segment)
    assert (first.seq, first.wnd, first.key, nothing) == (1, 500, bytes(range(36)), b"")
    assert (second.seq, second.seg_len, payload) == (2, 16, b"GET / HTTP/1.1\r\n")
    assert bench.merged.pending_bytes() == 0
    assert bench.cpus[0].tail == bench.cpus[0].head


def test_raw_is_the_struct_alone(bench):
    bench.cpus[0].write(record(2))
    bench.cpus[1].write(record(1, b"payload"))
    assert list(bench.merged.drain_raw(10)) == [record(1, b"payload")[:SEGMENT_BYTES], record(2)]
    assert bench.merged.pending_bytes() == 0


@pytest.mark.parametrize("method", ["drain", "drain_raw"])
def test_cpus_are_merged_by_time(bench, method):
    for seq in (1, 4, 5, 9):
        bench.cpus[0].write(record(seq))
    for seq in (2, 3, 6, 7, 8):
        bench.cpus[2].write(record(seq))
    read = getattr(bench.merged, method)(9)
    if method == "drain_raw":
        seqs = [Segment(*SEGMENT.unpack(each)).seq for each in read]
    else:
        seqs = [segment.seq for segment, _ in read]
    assert seqs == list(range(1, 10))


def test_equal_times_keep_the_order_within_a_cpu(bench):
    for seq in range(4):
        bench.cpus[seq % 2].write(record(seq, time_ns=5))
    assert bench.seqs() == [0, 2, 1, 3]


def test_what_is_young_is_held_back(bench):
    now_ns = bench.now_ns
    bench.cpus[0].write(record(1, time_ns=now_ns - MERGE_NS))
    bench.cpus[0].write(record(2, time_ns=now_ns - MERGE_NS + 1))
    bench.cpus[1].write(record(3, time_ns=now_ns + 5))
    assert bench.seqs() == [1]
    assert bench.merged.due_ns == now_ns + 1
    assert bench.merged.pending_bytes() == 2 * RECORD_BYTES
    bench.now_ns += 1
    bench.cpus[2].write(record(4, time_ns=now_ns - MERGE_NS))
    assert bench.seqs() == [4, 2]
    assert bench.merged.due_ns == now_ns + 5 + MERGE_NS
    bench.now_ns = bench.merged.due_ns
    assert bench.seqs() == [3]
    assert bench.merged.due_ns == NEVER_NS
    assert bench.merged.pending_bytes() == 0


def test_little_is_held_back_where_room_is_scarce(bench):
    now_ns = bench.now_ns
    for seq in range(5):
        bench.cpus[0].write(record(seq, bytes(1000), now_ns - PRESSED_NS))
    bench.cpus[0].write(record(5, time_ns=now_ns - PRESSED_NS + 7))
    assert bench.seqs() == [0, 1, 2, 3, 4]
    assert bench.merged.due_ns == now_ns + 7


def test_a_time_far_ahead_is_not_waited_for(bench):
    bench.cpus[0].write(record(1, time_ns=1 << 63))
    bench.cpus[1].write(record(2))
    assert bench.seqs() == [2, 1]


def test_limit_and_rest(bench):
    for seq in range(10):
        bench.cpus[seq & 1].write(record(seq))
    assert bench.seqs(4) == [0, 1, 2, 3]
    assert bench.merged.due_ns <= bench.now_ns
    assert bench.merged.pending_bytes() == 6 * RECORD_BYTES
    assert bench.seqs(6) == [4, 5, 6, 7, 8, 9]
    assert bench.merged.due_ns == NEVER_NS


def test_the_limit_says_when_the_next_is_due(bench):
    for seq, time_ns in ((1, 0), (2, bench.now_ns)):
        bench.cpus[0].write(record(seq, time_ns=time_ns))
    assert bench.seqs(1) == [1]
    assert bench.merged.due_ns == bench.now_ns + MERGE_NS


@pytest.mark.parametrize("method", ["drain", "drain_raw"])
def test_what_was_yielded_is_consumed_when_the_caller_stops(bench, method):
    for seq in range(6):
        bench.cpus[seq & 1].write(record(seq))
    records = getattr(bench.merged, method)(10)
    for _ in range(3):
        next(records)
    records.close()
    assert [cpu.tail for cpu in bench.cpus] == [2 * RECORD_BYTES, RECORD_BYTES, 0]
    assert bench.seqs() == [3, 4, 5]


@pytest.mark.parametrize("method", ["drain", "drain_raw"])
def test_room_is_given_back_while_draining(bench, method):
    for seq in range(66):
        bench.cpus[seq % 3].write(record(seq))
    records = getattr(bench.merged, method)(128)
    for _ in range(64):
        next(records)
    assert sum(cpu.tail for cpu in bench.cpus) == 64 * RECORD_BYTES
    records.close()


@pytest.mark.parametrize("method", ["drain", "drain_raw"])
def test_round_and_round(bench, method):
    """Records of all lengths cross the end of the ring at every offset."""
    sent = 0
    for turn in range(60):
        expected = []
        for _ in range(3):
            payload = bytes((sent + index) % 251 for index in range(sent * 37 % 1500))
            content = record(sent, payload)
            bench.cpus[0].write(content)
            expected.append(content if method == "drain" else content[:SEGMENT_BYTES])
            sent += 1
        if method == "drain":
            read = [SEGMENT.pack(*segment) + payload for segment, payload in bench.merged.drain(9)]
        else:
            read = list(bench.merged.drain_raw(9))
        assert read == expected, turn
    assert bench.cpus[0].head > 5 * DATA_BYTES


@pytest.mark.parametrize("method", ["drain", "drain_raw"])
def test_what_is_no_record_is_passed_over_once(bench, method):
    """Also when what lies behind it is looked at by more than one drain."""
    drain = getattr(bench.merged, method)
    cpu = bench.cpus[0]
    for _ in range(40):  # until each has crossed the end
        before = bench.merged.lost, bench.merged.malformed
        cpu.lose(5)
        cpu.write(record(1))
        cpu.write(b"short")
        cpu.write(record(2, b"abc", payload_bytes=1 << 20))
        cpu.write(b"what we did not ask for", THROTTLE)
        cpu.lose(2)
        cpu.write(record(3, time_ns=bench.now_ns))
        assert len(list(drain(10))) == 1
        assert len(list(drain(10))) == 0
        bench.now_ns += MERGE_NS
        assert len(list(drain(10))) == 1
        cpu.write(b"short")
        assert list(drain(10)) == []
        assert bench.merged.pending_bytes() == 0
        assert cpu.tail == cpu.head
        lost, malformed = bench.merged.lost - before[0], bench.merged.malformed - before[1]
        assert (lost, malformed) == (7, 3)


@pytest.mark.parametrize("size", [0, 7, 12, 4000])
@pytest.mark.parametrize("kind", [LOST, THROTTLE, SAMPLE])
def test_a_length_that_cannot_be_ends_what_is_there(bench, size, kind):
    cpu = bench.cpus[0]
    cpu.write(record(1))
    cpu.raw(struct.pack("=IHH", kind, 0, size))
    cpu.write(record(2))
    assert bench.seqs() == [1]
    assert bench.merged.malformed == 1
    assert cpu.tail == cpu.head
    cpu.write(record(3))
    assert bench.seqs() == [3]


junk = st.binary(max_size=200).map(lambda content: content.ljust(len(content) + 7 & ~7, b"\0"))


@given(st.lists(junk, max_size=20))
def test_nothing_that_lies_there_raises(contents):
    bench = Bench()
    for content in contents:
        bench.cpus[0].raw(content)
    list(bench.merged.drain(100))
    assert bench.merged.pending_bytes() == 0
    bench.close()


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3_000_000), st.integers(0, 90))),
    st.integers(1, 7),
)
def test_whatever_the_times_nothing_is_lost_or_doubled(writes, limit):
    """Times that go back within a CPU spoil the order at most."""
    bench = Bench()
    seqs, written = [], [[], [], []]
    for seq, (cpu, ahead_ns, payload_bytes) in enumerate(writes):
        bench.cpus[cpu].write(record(seq, bytes(payload_bytes), bench.now_ns + ahead_ns))
        written[cpu].append(seq)
        bench.now_ns += 100_000
        seqs += bench.seqs(limit)
    while bench.merged.pending_bytes():
        bench.now_ns += 100_000
        seqs += bench.seqs(limit)
    for each in written:
        assert [seq for seq in seqs if seq in each] == each
    assert sorted(seqs) == list(range(len(writes)))
    bench.close()


def test_closed_while_a_drain_is_half_way():
    for kind in (Merged.drain, Merged.drain_raw):
        bench = Bench()
        bench.cpus[0].write(record(1))
        bench.cpus[0].write(record(2))
        drain = kind(bench.merged, 10)
        next(drain)
        bench.close()
        drain.close()


def test_little_is_not_lifted(bench):
    bench.cpus[0].write(record(1, bytes(DATA_BYTES // 8 - 200)))
    bench.merged.lift(1 << 20)
    assert bench.merged.lifted_bytes == 0
    assert bench.seqs() == [1]


def test_what_is_lifted_gives_room_and_comes_first(bench):
    for seq in range(1, 6):
        bench.cpus[seq & 1].write(record(seq, bytes([seq]) * 1000))
    bench.merged.lift(1 << 20)
    assert [cpu.tail for cpu in bench.cpus] == [cpu.head for cpu in bench.cpus]
    assert bench.merged.pending_bytes() == bench.merged.lifted_bytes == 5 * (SEGMENT_BYTES + 1000)
    assert bench.merged.due_ns <= bench.now_ns
    bench.cpus[2].write(record(6))
    assert bench.drained(3) == [(seq, bytes([seq]) * 1000) for seq in (1, 2, 3)]
    # A drain ends where what was lifted does; what is in the rings is the next one's.
    assert bench.seqs() == [4, 5]
    assert bench.merged.lifted_bytes == 0
    assert bench.merged.due_ns <= bench.now_ns
    assert bench.seqs() == [6]
    assert bench.merged.pending_bytes() == 0


def test_no_more_is_lifted_than_memory_allows(bench):
    for seq in range(1, 6):
        bench.cpus[0].write(record(seq, bytes(1000)))
    bench.merged.lift(2500)
    assert bench.merged.lifted_bytes == 3 * (SEGMENT_BYTES + 1000)
    bench.merged.lift(2500)
    assert bench.merged.lifted_bytes == 3 * (SEGMENT_BYTES + 1000)
    assert bench.seqs() == [1, 2, 3]
    assert bench.seqs() == [4, 5]


def test_what_is_held_back_is_not_lifted(bench):
    bench.cpus[0].write(record(1, bytes(2000)))
    bench.cpus[0].write(record(2, time_ns=bench.now_ns))
    bench.merged.lift(1 << 20)
    assert bench.seqs() == [1]
    assert bench.seqs() == []
    assert bench.merged.due_ns == bench.now_ns + MERGE_NS


@pytest.mark.parametrize(
    ("ring_bytes", "cpus", "expected"),
    [
        (8 << 20, 2, 4 << 20),
        (8 << 20, 3, 2 << 20),
        (8 << 20, 128, SHARE_BYTES_MIN),
        (1 << 30, 1, 1 << 30),
        (4096, 4, SHARE_BYTES_MIN),
    ],
)
def test_each_cpu_has_a_power_of_two(ring_bytes, cpus, expected):
    assert share_bytes(ring_bytes, cpus) == expected


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.EMFILE, errno.ENOSYS])
def test_what_the_kernel_refuses_has_a_cure(number):
    error = perfevent.unfit(OSError(number, "no"))
    assert isinstance(error, HostUnfit)
    assert error.cure


def test_an_error_nobody_expects_is_told_as_it_is():
    error = perfevent.unfit(OSError(errno.EIO, "Input/output error"))
    assert type(error) is PycopyError
    assert "Input/output error" in str(error)


def test_an_unknown_architecture_is_named(monkeypatch):
    monkeypatch.setattr(perfevent.platform, "machine", lambda: "vax")
    with pytest.raises(HostUnfit, match="vax"):
        perfevent.open_output(0)
