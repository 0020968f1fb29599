"""Perf rings of a real kernel: every record once, by time, or counted as lost.

The program is a dozen instructions. On each CPU it outputs that CPU's entry of an array,
after it has put the next number and the time into it.
"""

import errno
import os
import resource
import select
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pycopy.errors import HostUnfit, PycopyError
from pycopy.kernel import perfevent, syscall
from pycopy.kernel.perfring import MERGE_NS, SHARE_BYTES_MIN, PerfRing
from pycopy.process.loop import NEVER_NS, READ, Loop
from pycopy.wire.segment import KIND_CLIENT, PIECE_BYTES, SEGMENT, SEGMENT_BYTES, Segment

SCHED_CLS, PERF_EVENT_ARRAY = 3, 4
MAP_LOOKUP, KTIME, SMP_PROCESSOR_ID, PERF_EVENT_OUTPUT = 1, 5, 8, 25

#: Of an entry of the array: how many were stored, how many failed; then the record.
COUNTS = struct.Struct("=QQ")
TIME_AT, SEQ_AT = COUNTS.size, COUNTS.size + 16
ENTRY_BYTES = COUNTS.size + SEGMENT_BYTES + PIECE_BYTES

NO_ROOM, NO_RING = (1 << 32) - errno.ENOSPC, (1 << 32) - errno.ENOENT
CPUS = sorted(os.sched_getaffinity(0))


def insn(code, destination=0, source=0, offset=0, constant=0):
    return struct.pack("=BBhi", code, source << 4 | destination, offset, constant)


def load_map(register, map_fd):
    return insn(0x18, register, 1, 0, map_fd) + insn(0)


def call(helper):
    return insn(0x85, constant=helper)


def increment(offset):
    """The u64 at r7 + offset."""
    return insn(0x79, 1, 7, offset) + insn(0x07, 1, constant=1) + insn(0x7B, 7, 1, offset)


def program(entries_fd, perf_fd, record_bytes):
    """It returns what the helper does."""
    stored = increment(0) + insn(0x95)
    code = (
        insn(0xBF, 6, 1)
        + call(SMP_PROCESSOR_ID)
        + insn(0x63, 10, 0, -4)
        + load_map(1, entries_fd)
        + insn(0xBF, 2, 10)
        + insn(0x07, 2, constant=-4)
        + call(MAP_LOOKUP)
        + insn(0x55, 0, offset=1)
        + insn(0x95)
        + insn(0xBF, 7, 0)
        # seq += 1
        + insn(0x61, 1, 7, SEQ_AT)
        + insn(0x07, 1, constant=1)
        + insn(0x63, 7, 1, SEQ_AT)
        + call(KTIME)
        + insn(0x7B, 7, 0, TIME_AT)
        + insn(0xBF, 1, 6)
        + load_map(2, perf_fd)
        + insn(0xB4, 3, constant=-1)  # BPF_F_CURRENT_CPU
        + insn(0xBF, 4, 7)
        + insn(0x07, 4, constant=TIME_AT)
        + insn(0xB7, 5, constant=record_bytes)
        + call(PERF_EVENT_OUTPUT)
        + insn(0x55, 0, offset=len(stored) // 8)
        + stored
        + increment(8)
        + insn(0x95)
    )
    return syscall.program_load(SCHED_CLS, "perfring", code, "GPL")


class Output:
    """The program and its maps; ``payload_bytes`` travel with each record."""

    def __init__(self, payload_bytes):
        cpus = syscall.possible_cpus()
        self.payload = bytes(index % 251 for index in range(payload_bytes))
        self.perf_fd = syscall.map_create(PERF_EVENT_ARRAY, "records", 4, 4, cpus)
        self.entries_fd = syscall.map_create(syscall.ARRAY, "entries", 4, ENTRY_BYTES, cpus)
        self.program_fd = program(self.entries_fd, self.perf_fd, SEGMENT_BYTES + payload_bytes)
        for cpu in range(cpus):
            fields = Segment(
                time_ns=0,
                kind=KIND_CLIENT,
                tcp_flags=0x18,
                options=0,
                wscale=0,
                service=cpu,
                wnd=1000,
                seq=0,
                ack=0,
                tsval=0,
                tsecr=0,
                seg_len=payload_bytes,
                payload_bytes=payload_bytes,
                mss=0,
                family=4,
                sack_blocks=0,
                key=bytes(range(36)),
                sack=bytes(32),
            )
            entry = COUNTS.pack(0, 0) + SEGMENT.pack(*fields) + self.payload
            syscall.map_update(
                self.entries_fd, struct.pack("=I", cpu), entry.ljust(ENTRY_BYTES, b"\0")
            )
        self.packet = bytes(64)

    def run(self, cpu=None, repeat=1):
        """What the helper returned to the last run, on ``cpu`` from now on."""
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})
        return syscall.test_run(self.program_fd, self.packet, repeat=repeat).retval

    def counts(self):
        """Over all CPUs: stored, failed."""
        entries = [
            syscall.map_lookup(self.entries_fd, struct.pack("=I", cpu), ENTRY_BYTES) for cpu in CPUS
        ]
        return tuple(map(sum, zip(*(COUNTS.unpack_from(entry) for entry in entries), strict=True)))

    def close(self):
        for fd in (self.program_fd, self.entries_fd, self.perf_fd):
            os.close(fd)


@pytest.fixture(params=[0, 1448, PIECE_BYTES], ids=["header", "1448B", "16KB"])
def payload_bytes(request):
    return request.param


@pytest.fixture
def output(payload_bytes):
    output = Output(payload_bytes)
    yield output
    output.close()
    os.sched_setaffinity(0, CPUS)


@pytest.fixture
def ring(output):
    """As small as one can be."""
    ring = PerfRing(output.perf_fd, 0)
    yield ring
    ring.close()


def drained(ring, method="drain"):
    """All that has been output, as the drivers empty a ring when a run ends."""
    records = []
    while ring.pending_bytes():
        records += getattr(ring, method)(100)
    return records


def room(payload_bytes):
    """Records that fit into one CPU's ring."""
    return SHARE_BYTES_MIN // ((12 + SEGMENT_BYTES + payload_bytes + 7) & ~7)


def assert_by_time(records):
    times = [segment.time_ns for segment, _ in records]
    assert times == sorted(times)


def test_every_record_once_by_time_round_and_round(output, ring, payload_bytes):
    numbers = dict.fromkeys(CPUS, 0)
    last_ns = 0
    for turn in range(12):
        for step in range(room(payload_bytes) - 1):
            assert output.run(CPUS[(turn + step // 2) % len(CPUS)]) == 0
        records = drained(ring)
        assert len(records) == room(payload_bytes) - 1
        assert_by_time(records)
        assert records[0][0].time_ns > last_ns
        last_ns = records[-1][0].time_ns
        for segment, payload in records:
            numbers[segment.service] += 1
            assert segment.seq == numbers[segment.service]
            assert payload == output.payload
    assert (ring.lost, ring.malformed) == (0, 0)
    assert output.counts() == (sum(numbers.values()), 0)


def test_raw(output, ring):
    for step in range(3):
        output.run(CPUS[step % len(CPUS)])
    read = drained(ring, "drain_raw")
    assert {len(each) for each in read} == {SEGMENT_BYTES}
    segments = [Segment(*SEGMENT.unpack(each)) for each in read]
    assert [segment.service for segment in segments] == [
        CPUS[step % len(CPUS)] for step in (0, 1, 2)
    ]
    assert_by_time([(segment, b"") for segment in segments])


def test_a_full_ring_loses_and_counts(output, ring, payload_bytes):
    cpu = CPUS[-1]
    stored = 0
    while output.run(cpu) == 0:
        stored += 1
    assert 0 <= room(payload_bytes) - stored <= 1
    assert output.run(cpu, repeat=50) == NO_ROOM
    assert output.counts() == (stored, 51)
    read = drained(ring)
    assert [segment.seq for segment, _ in read] == list(range(1, stored + 1))
    assert ring.lost == 0, "told with the next one"
    assert output.run(cpu) == 0
    assert [segment.seq for segment, _ in drained(ring)] == [stored + 52]
    assert ring.lost == 51
    assert output.counts() == (stored + 1, 51)


def readable(fd, timeout_s=0.0):
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN)
        return bool(epoll.poll(timeout_s))


def test_readable_while_something_is_due(output, ring):
    """Also in an epoll set that has been told so before, which is the drivers' loop."""
    with select.epoll() as epoll:
        epoll.register(ring.fileno(), select.EPOLLIN)
        assert epoll.poll(0) == []
        for step in range(3):
            output.run(CPUS[step % len(CPUS)])
        assert epoll.poll(1) == [(ring.fileno(), select.EPOLLIN)]
        time.sleep(MERGE_NS / 1e9)
        assert len(list(ring.drain(1))) == 1
        for _ in range(3):
            assert epoll.poll(0) != [], "two are left"
        assert len(list(ring.drain(2))) == 2
        assert ring.due_ns == NEVER_NS
        assert epoll.poll(0) == []


def test_not_readable_while_records_are_held_back(output, ring):
    with select.epoll() as epoll:
        epoll.register(ring.fileno(), select.EPOLLIN)
        while True:
            output.run()
            held = list(ring.drain(10)) == []
            at_once = epoll.poll(0)
            if held and time.monotonic_ns() < ring.due_ns:
                break
            drained(ring)  # something else had the CPU for a millisecond
        assert at_once == []
        due_ns = ring.due_ns
        assert ring.pending_bytes()
        assert epoll.poll(5) != []
        assert time.monotonic_ns() >= due_ns
        assert len(list(ring.drain(10))) == 1
        assert epoll.poll(0) == []


def test_what_is_lifted_is_read_in_order(output, ring, payload_bytes):
    for step in range(room(payload_bytes) - 1):
        output.run(CPUS[step % len(CPUS)])
    time.sleep(MERGE_NS / 1e9)
    ring.lift(1 << 30)
    assert ring.lifted_bytes == (room(payload_bytes) - 1) * (SEGMENT_BYTES + payload_bytes)
    assert readable(ring.fileno())
    records = drained(ring)
    assert len(records) == room(payload_bytes) - 1
    assert_by_time(records)


def test_reading_while_all_cpus_write(output, ring):
    """Wake-ups by the loop alone: nobody waits for ever, nothing comes twice or torn."""

    def write(cpu):
        os.sched_setaffinity(0, {cpu})  # of this thread
        for _ in range(300):
            output.run(repeat=10)

    def read(_events):
        ring.lift(1 << 16)
        records.extend(ring.drain(64))
        if ring.lifted_bytes:
            loop.again(ring.fileno())

    records = []
    loop = Loop()
    loop.add(ring.fileno(), READ, read)
    threads = [threading.Thread(target=write, args=(cpu,)) for cpu in CPUS]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        loop.wait(time.monotonic_ns() + 1_000_000)
    waits = 0
    while ring.pending_bytes():
        waits += 1
        loop.wait(time.monotonic_ns() + 5_000_000_000)
    loop.close()
    stored, failed = output.counts()
    assert stored + failed == len(CPUS) * 3000
    assert len(records) == stored
    assert waits <= 2 * stored
    assert ring.lost <= failed
    assert ring.malformed == 0
    for cpu in CPUS:
        seqs = [segment.seq for segment, _ in records if segment.service == cpu]
        assert seqs == sorted(set(seqs))
    assert all(payload == output.payload for _, payload in records)


def test_one_that_waits_for_records_does_not_spin(output, ring):
    """Each record may end a few waits, and no more."""
    loop = Loop()
    turns = 0

    def read(_events):
        nonlocal turns
        turns += 1
        records.extend(ring.drain(64))

    records = []
    loop.add(ring.fileno(), READ, read)
    for step in range(20):
        output.run(CPUS[step % len(CPUS)])
        while ring.pending_bytes():
            loop.wait(time.monotonic_ns() + 5_000_000_000)
    loop.close()
    assert len(records) == 20
    assert turns <= 20 * 4


def test_closing_leaves_nothing(output):
    before = sorted(os.listdir("/proc/self/fd"))
    ring = PerfRing(output.perf_fd, 1 << 20)
    assert output.run() == 0
    drain = ring.drain(10)
    ring.close()
    drain.close()
    ring.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    with open("/proc/self/maps", encoding="ascii") as file:
        assert "perf_event" not in file.read()
    assert output.run() == NO_RING, "nothing is output to any more"
    again = PerfRing(output.perf_fd, 1 << 20)
    assert output.run() == 0
    assert [segment.seq for segment, _ in drained(again)] == [3]
    again.close()


def test_closing_after_the_map(output):
    fd = os.dup(output.perf_fd)
    ring = PerfRing(fd, 0)
    os.close(fd)
    ring.close()


def test_what_is_no_map_is_said_and_leaves_nothing():
    with open("/dev/null", encoding="ascii") as file:
        before = sorted(os.listdir("/proc/self/fd"))
        with pytest.raises(PycopyError, match="CPU 0"):
            PerfRing(file.fileno(), 0)
        assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_cpu_that_is_offline_is_left_out(output, monkeypatch):
    online = perfevent.open_output
    monkeypatch.setattr(perfevent, "open_output", lambda cpu: None if cpu == 0 else online(cpu))
    ring = PerfRing(output.perf_fd, 0)
    assert [output.run(cpu) for cpu in CPUS] == [NO_RING if cpu == 0 else 0 for cpu in CPUS]
    assert [segment.service for segment, _ in drained(ring)] == [cpu for cpu in CPUS if cpu]
    ring.close()


def test_without_descriptors_it_says_so_and_leaves_nothing(output):
    before = sorted(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in before)
    refused = []
    try:
        for limit in range(3, highest + 4 + 2 * len(CPUS)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
            try:
                PerfRing(output.perf_fd, 0).close()
            except HostUnfit as error:
                refused.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(refused) >= 2 + 2 * len(CPUS)
    assert all("descriptor" in said for said in refused)
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("without", "cure"),
    [("-perfmon,-sys_admin", "CAP_PERFMON"), ("-ipc_lock", "kernel.perf_event_mlock_kb")],
)
def test_a_privilege_that_is_missing_is_named(without, cure):
    if int(Path("/proc/sys/kernel/perf_event_paranoid").read_text()) < 1:
        pytest.skip("kernel.perf_event_paranoid of this host lets everybody do that")
    program = "import pycopy.kernel.perfring as p; p.PerfRing(0, 1 << 28)"
    command = ["setpriv", "--bounding-set", without, sys.executable, "-c", program]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=50,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0)),
    )  # fmt: skip
    assert "HostUnfit" in done.stderr and cure in done.stderr, done.stderr
