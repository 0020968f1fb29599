"""The ring's reader on real rings: every record once, in order, or counted as lost."""

import ctypes
import os
import select
import socket
import subprocess
import threading
import time

import pytest

from pycopy.kernel import ring as ring_module
from pycopy.kernel import syscall
from pycopy.kernel.attach import Hook, attach
from pycopy.kernel.ring import Ring
from pycopy.wire.segment import KIND_CLIENT, SEGMENT, SEGMENT_BYTES, Segment
from tests.bpf.sources import load

RING_BYTES = 1 << 18
HEADER_BYTES = 14

#: What follows the Ethernet header of a packet becomes a record, cut at RECORD_BYTES.
PROGRAM = """
BPF_RINGBUF_OUTPUT(segments, RING_BYTES / PAGE_SIZE);
BPF_PERCPU_ARRAY(counts, u64, 2);
static inline void count(u32 index)
{
	u64 *value = counts.lookup(&index);
	if (value)
		*value += 1;
}
int pycopy_record(PYCOPY_CTX *ctx)
{
	u16 ethertype;
	void *record;

	if (PYCOPY_LOAD_BYTES(ctx, 12, &ethertype, 2) || ethertype != htons(0x88b5))
		return VERDICT;
	record = segments.ringbuf_reserve(RECORD_BYTES);
	if (!record) {
		count(1);
		return VERDICT;
	}
	if (PYCOPY_LOAD_BYTES(ctx, 14, record, RECORD_BYTES)) {
		segments.ringbuf_discard(record, 0);
		return VERDICT;
	}
	segments.ringbuf_submit(record, 0);
	count(0);
	return VERDICT;
}
"""


@pytest.fixture(params=[0, 1448], ids=["header", "1448B"])
def payload_bytes(request):
    return request.param


@pytest.fixture
def module(tmp_path, payload_bytes):
    source = tmp_path / "record.c"
    source.write_text(PROGRAM)
    module = load(
        source, RING_BYTES=RING_BYTES, RECORD_BYTES=SEGMENT_BYTES + payload_bytes, VERDICT=-1
    )
    yield module
    module.close()


@pytest.fixture(params=[RING_BYTES, RING_BYTES // 4], ids=["whole", "a window"])
def ring(module, request, monkeypatch):
    """Mapped as a whole, or a quarter of it at a time."""
    monkeypatch.setattr(ring_module, "WINDOW_BYTES", request.param)
    ring = Ring(module.maps["segments"].fd, RING_BYTES)
    yield ring
    ring.close()


#: Every payload is a piece of this; made one by one, they would take most of the time.
PATTERN = bytes(index % 251 for index in range(251 + 1448))


def pattern(seq, payload_bytes):
    return PATTERN[seq % 251 : seq % 251 + payload_bytes]


def packet(seq, payload_bytes):
    payload = pattern(seq, payload_bytes)
    fields = Segment(
        time_ns=time.monotonic_ns(),
        kind=KIND_CLIENT,
        tcp_flags=0x18,
        options=0,
        wscale=0,
        service=0,
        wnd=1000,
        seq=seq,
        ack=0,
        tsval=0,
        tsecr=0,
        seg_len=payload_bytes,
        payload_bytes=payload_bytes,
        mss=0,
        family=4,
        sack_blocks=0,
        key=seq.to_bytes(36, "big"),
        sack=bytes(32),
    )
    return b"\xff" * 6 + b"\x02\0\0\0\0\1" + b"\x88\xb5" + SEGMENT.pack(*fields) + payload


def whole(segment, payload):
    expected = pattern(segment.seq, segment.payload_bytes)
    return payload == expected and segment.key == segment.seq.to_bytes(36, "big")


def room(payload_bytes):
    """Records that fit into the ring."""
    return RING_BYTES // (8 + SEGMENT_BYTES + payload_bytes)


def test_every_record_once_in_order_round_and_round(module, ring, payload_bytes):
    seq = seen = 0
    for _ in range(6):
        for _ in range(room(payload_bytes) // 2 + 1):
            syscall.test_run(module.program_fd, packet(seq, payload_bytes))
            seq += 1
        for segment, payload in ring.drain(1 << 20):
            assert segment.seq == seen
            assert whole(segment, payload)
            seen += 1
        assert seen == seq
        assert ring.pending_bytes() == 0


def test_raw(module, ring, payload_bytes):
    sent = [packet(seq, payload_bytes) for seq in range(20)]
    for each in sent:
        syscall.test_run(module.program_fd, each)
    expected = [each[HEADER_BYTES : HEADER_BYTES + SEGMENT_BYTES] for each in sent]
    assert list(ring.drain_raw(100)) == expected


def test_discarded_records_are_passed_over(module, ring, payload_bytes):
    for seq in range(10):
        whole_packet = packet(seq, payload_bytes)
        syscall.test_run(module.program_fd, whole_packet if seq % 3 else whole_packet[:60])
    assert [segment.seq for segment, _ in ring.drain(100)] == [1, 2, 4, 5, 7, 8]


def test_a_full_ring_loses_and_counts(module, ring, payload_bytes):
    many = room(payload_bytes) + 50
    syscall.test_run(module.program_fd, packet(1, payload_bytes), repeat=many)
    counts = module.maps["counts"]
    stored, lost = counts.sum_percpu(0), counts.sum_percpu(1)
    assert stored + lost == many
    assert lost >= 50
    assert sum(1 for _ in ring.drain(1 << 20)) == stored
    syscall.test_run(module.program_fd, packet(2, payload_bytes))
    assert [segment.seq for segment, _ in ring.drain(10)] == [2]


def test_epoll(module, ring, payload_bytes):
    with select.epoll() as epoll:
        epoll.register(ring.fileno(), select.EPOLLIN)
        assert epoll.poll(0) == []
        for seq in range(3):
            syscall.test_run(module.program_fd, packet(seq, payload_bytes))
        assert epoll.poll(1) == [(ring.fileno(), select.EPOLLIN)]
        assert len(list(ring.drain(2))) == 2
        assert epoll.poll(1) != [], "one is left"
        assert len(list(ring.drain(2))) == 1
        assert epoll.poll(0) == []


@pytest.fixture
def veth():
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/self/ns/net", os.O_RDONLY)
    assert libc.unshare(0x40000000) == 0
    try:
        subprocess.run("ip link add va type veth peer name vb".split(), check=True)
        for ifname in ("va", "vb"):
            subprocess.run(f"ip link set {ifname} mtu 2000 up".split(), check=True)
        yield "va", "vb"
    finally:
        assert libc.setns(before, 0x40000000) == 0
        os.close(before)


def test_reading_while_the_kernel_writes(veth, module, ring, payload_bytes):
    """Wake-ups by epoll alone: nobody waits for ever, and nothing comes twice or torn."""
    near, far = veth
    attachment = attach(module, near, Hook.TC_INGRESS)
    total = 20_000
    sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    sender.bind((far, 0))

    def send():
        # From one CPU: each has a queue of its own, so that from two they come in any order.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        for seq in range(total):
            sender.send(packet(seq, payload_bytes))

    thread = threading.Thread(target=send)
    thread.start()
    counts = module.maps["counts"]
    last, got = -1, 0
    with select.epoll() as epoll:
        epoll.register(ring.fileno(), select.EPOLLIN)
        while thread.is_alive() or ring.pending_bytes():
            epoll.poll(0.2)
            for segment, payload in ring.drain(500):
                assert segment.seq > last
                assert whole(segment, payload)
                last, got = segment.seq, got + 1
    thread.join()
    sender.close()
    attachment.close()
    stored, lost = counts.sum_percpu(0), counts.sum_percpu(1)
    assert stored + lost == total
    assert got == stored
    assert got
