"""The programs attached, on packets that BPF_PROG_TEST_RUN cannot make.

Super-segments whose bytes are not in the linear part, VLAN tags that the kernel took off,
devices without a link header, BIG TCP, real connections. All in anonymous namespaces.
"""

import contextlib
import fcntl
import os
import select
import socket
import struct
import threading
from collections import Counter

import pytest

from pycopy.kernel.abi import SWALLOW, CaptureCount, InterceptCount
from pycopy.kernel.attach import Hook, attach
from pycopy.wire.segment import ACK, FIN, KEY, KIND_TARGET, PIECE_BYTES, PSH, SYN
from tests.bpf.frames import HEADERS, LINKS, SYN_OPTIONS, TIMESTAMPS, tcp
from tests.bpf.harness import (
    EVERY_PORT,
    Capture,
    Intercept,
    check_record,
    expected_fate,
    sh,
    wait_for,
)
from tests.bpf.oracle import look

HOOKS = {"tc": Hook.TC_INGRESS, "xdp": Hook.XDP}
MARKER_PORT = 9


@pytest.fixture(scope="module", params=["tc", "xdp"])
def attachable(request):
    program = Capture(request.param, services=EVERY_PORT)
    yield program
    program.close()


@pytest.fixture
def wire(attachable, namespaces):
    """A veth pair in one namespace: what goes into `cli` is captured on `srv`."""
    namespaces.new()
    sh("ip link add cli type veth peer name srv")
    # The sender's end last: it can send at once. The other gets its queue a moment later,
    # and until then what is sent into it is dropped.
    sh("ip link set srv mtu 65000 up")
    sh("ip link set cli mtu 65000 up")
    made = Wire(attachable)
    yield made
    made.close()


#: VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4 and _TCPV6.
NEEDS_CSUM, GSO = 1, {4: 1, 6: 4}


class Wire:
    """One end to send into, the other with a capture program on it."""

    def __init__(self, program):
        self.program = program
        # Each CPU has a queue of its own for what a veth brings: sent from two, frames may
        # overtake each other, and so may the marker.
        self._cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(self._cpus)})
        self._was = Counter(program.counts())
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self._socket.setsockopt(263, 15, 1)  # SOL_PACKET, PACKET_VNET_HDR
        self._socket.bind(("cli", 0))
        self.attachment = attach(program.module, "srv", HOOKS[program.hook])

    def send(self, frame, *, linear=14, gso_bytes=0, headers=0, family=4):
        """`linear` bytes of it in the linear part; with `gso_bytes` as one super-segment."""
        if gso_bytes:
            tcp_at = headers - 32
            head = struct.pack("=BBHHHH", NEEDS_CSUM, GSO[family], headers, gso_bytes, tcp_at, 16)
        else:
            head = struct.pack("=BBHHHH", 0, 0, linear, 0, 0, 0)
        self._socket.send(head + frame)

    def drain(self):
        """All records up to one that is sent here to know that the others have come."""
        self.send(tcp(1, MARKER_PORT, payload=b"marker"))
        records = []

        def marked():
            records.extend(self.program.records())
            return records and records[-1][1] == b"marker"

        wait_for(marked)
        return records[:-1]

    def counted(self):
        """What was counted since the start, without the markers' share."""
        now = Counter(self.program.counts())
        self.program.check_balance(now)
        self._was, changed = now, now - self._was
        changed[CaptureCount.SELECTED] -= 1
        changed[CaptureCount.CAPTURED] -= 1
        return +changed

    def close(self):
        self.attachment.close()
        self._socket.close()
        self.program.records()
        os.sched_setaffinity(0, self._cpus)


@pytest.mark.parametrize("ip", HEADERS)
def test_headers_outside_the_linear_part(wire, port, ip):
    for linear in (14, 20, 34, 40, 60, 1000):
        frame = tcp(port, payload=bytes(range(256)) * 4, ip=ip, options=TIMESTAMPS)
        wire.send(frame, linear=linear)
        (record,) = wire.drain()
        check_record(record, frame)
    assert wire.counted().keys() == {CaptureCount.SELECTED, CaptureCount.CAPTURED}


def test_cut_at_every_length(wire, port):
    """Shorter than BPF_PROG_TEST_RUN allows at TC."""
    for ip in ("IPv4", "IPv6", "IPv6 all of them"):
        frame = tcp(port, flags="S", payload=b"0123456789", ip=ip, options=SYN_OPTIONS)
        expected = Counter()
        for length in range(15, len(frame) + 1):
            wire.send(frame[:length])
            fate = expected_fate(look(frame[:length]))
            if fate is not None:
                expected += {CaptureCount.SELECTED: 1, fate: 1}
        (record,) = wire.drain()
        check_record(record, frame)
        assert wire.counted() == expected


@pytest.mark.parametrize("link", [*LINKS, "three tags"])
def test_vlan(wire, port, link):
    """At TC the outer tag is in the metadata, only the inner one in the bytes."""
    if link == "three tags":
        tagged = tcp(port, payload=b"x" * 100, link="802.1ad and 802.1Q")
        frame = tagged[:12] + b"\x88\xa8\0\x05" + tagged[12:]
    else:
        frame = tcp(port, payload=b"x" * 100, link=link)
    unchanged = wire.program.hook == "xdp" or link == "untagged"
    stripped = frame if unchanged else frame[:12] + frame[16:]
    wire.send(frame)
    records = wire.drain()
    if look(stripped).flow:
        (record,) = records
        check_record(record, stripped)
    else:
        assert link == "three tags" and records == []


@pytest.mark.parametrize("attachable", ["tc"], indirect=True)
@pytest.mark.parametrize("ip", ["IPv4", "IPv6"])
def test_super_segments(wire, port, ip):
    """GSO super-segments, nothing but the headers linear, every length class of record."""
    material = b"".join(i.to_bytes(4, "big") for i in range(16384))
    pieces = 0
    lengths = [1449, 1536, 1537, 4096, 4097, 10000, 16384, 16385, 32768, 32769, 60000, 65000]
    for length in lengths:
        payload = material[-length:]
        frame = tcp(port, flags="FPA", payload=payload, ip=ip, options=TIMESTAMPS, seq=7)
        wire.send(
            frame,
            gso_bytes=1448,
            headers=len(frame) - length,
            family=look(frame).fields["family"],
        )
        records = wire.drain()
        assert b"".join(piece for _, piece in records) == payload
        at = 7
        for number, (segment, piece) in enumerate(records, 1):
            last = number == len(records)
            assert (segment.seq, segment.seg_len) == (at, len(piece))
            assert segment.tcp_flags == ACK | (FIN | PSH if last else 0)
            assert len(piece) == PIECE_BYTES or last
            at += len(piece)
        pieces += len(records)
        counted = wire.counted()
        assert counted[CaptureCount.EXTRA_PIECES] == len(records) - 1
    assert pieces == sum(-(-length // PIECE_BYTES) for length in lengths)


@contextlib.contextmanager
def tun(name):
    """A device without a link header; what is written to it has been received."""
    fd = os.open("/dev/net/tun", os.O_RDWR)
    iff_tun_no_pi = 0x1001
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), iff_tun_no_pi))
    try:
        sh(f"ip link set {name} up")
        yield fd
    finally:
        os.close(fd)


@pytest.mark.skipif(not os.path.exists("/dev/net/tun"), reason="no /dev/net/tun (CONFIG_TUN)")
def test_no_link_header(hook, namespaces, port):
    namespaces.new()
    program = Capture(hook, services=EVERY_PORT, l2_bytes=0)
    with tun("l3") as fd:
        attachment = attach(program.module, "l3", HOOKS[hook])
        for ip in HEADERS:
            for payload in (b"x", b"y" * 1000):
                datagram = tcp(port, payload=payload, ip=ip, options=TIMESTAMPS)[14:]
                os.write(fd, datagram)
                (record,) = wait_for(program.records)
                check_record(record, datagram, l2_bytes=0)
        datagram = tcp(port, payload=b"z" * 10)[14:]
        for length in range(24, len(datagram)):
            os.write(fd, datagram[:length])
        os.write(fd, datagram)
        assert wait_for(program.records)[-1][1] == b"z" * 10
        counts = program.counts()
        program.check_balance(counts)
        assert counts[CaptureCount.TRUNCATED] == len(datagram) - 24
        attachment.close()
    program.close()


@pytest.fixture
def hosts(namespaces):
    """Two namespaces with a veth between them: `cli` has .1 and ::1, `srv` .2 and ::2."""
    namespaces.srv = namespaces.new()
    namespaces.cli = namespaces.new()
    sh("ip link add cli type veth peer name srv")
    sh(f"ip link set srv netns /proc/{os.getpid()}/fd/{namespaces.srv}")
    for fd, name, host in ((namespaces.cli, "cli", 1), (namespaces.srv, "srv", 2)):
        namespaces.enter(fd)
        sh(f"ip address add 10.5.0.{host}/24 dev {name}")
        sh(f"ip address add fd05::{host}/64 dev {name} nodad")
        sh(f"ip link set {name} up")
    return namespaces


SERVER = {4: (socket.AF_INET, "10.5.0.2"), 6: (socket.AF_INET6, "fd05::2")}


def listening(hosts, family):
    hosts.enter(hosts.srv)
    listener = socket.socket(SERVER[family][0])
    listener.bind((SERVER[family][1], 0))
    listener.listen()
    return listener, listener.getsockname()[1]


def read_all(listener, received):
    peer, _ = listener.accept()
    with peer:
        while chunk := peer.recv(1 << 20):
            received.append(chunk)


def copied_stream(hosts, family, hook, stream):
    """Send `stream` over a real connection; (its records, the program's counts)."""
    listener, port = listening(hosts, family)
    program = Capture(hook, services=[(None, port)], ring_bytes=1 << 25)
    attachment = attach(program.module, "srv", HOOKS[hook])
    received = []
    reader = threading.Thread(target=read_all, args=(listener, received))
    reader.start()
    hosts.enter(hosts.cli)
    with socket.create_connection((SERVER[family][1], port), 20) as client:
        client.sendall(stream)
    reader.join(30)
    assert not reader.is_alive()
    assert b"".join(received) == stream
    records = []

    def finished():
        records.extend(program.records())
        return any(segment.tcp_flags & FIN for segment, _ in records)

    wait_for(finished)
    attachment.close()
    listener.close()
    records.extend(program.records())  # on a busy machine TCP may repeat something after its FIN
    counts = program.counts()
    program.check_balance(counts)
    assert counts[CaptureCount.CAPTURED] == len(records)
    lost = (CaptureCount.TRUNCATED, CaptureCount.MALFORMED, CaptureCount.RING_FULL)
    assert not any(counts[kind] for kind in lost)
    program.close()
    return records, counts


def reassembled(records):
    """The client's stream from its records; retransmissions must repeat the same bytes."""
    syn = records[0][0]
    third_ack = records[1][0]
    assert syn.tcp_flags == SYN and syn.options == 0x0F
    assert (third_ack.tcp_flags, third_ack.seq) == (ACK, (syn.seq + 1) % 2**32)
    pieces = {}
    for segment, payload in records[2:]:
        at = (segment.seq - syn.seq - 1) % 2**32
        if payload:
            pieces[at] = max(payload, pieces.get(at, b""), key=len)
    stream = bytearray()
    for at in sorted(pieces):
        assert at <= len(stream), "a gap"
        overlap = len(stream) - at
        assert pieces[at][:overlap] == stream[at : at + len(pieces[at])][:overlap]
        stream += pieces[at][overlap:]
    return bytes(stream)


STREAM = b"".join(i.to_bytes(4, "big") for i in range(1 << 19))


def longest_segment(records):
    """Pieces of one super-segment have one time."""
    bytes_at = Counter()
    for segment, payload in records:
        bytes_at[segment.time_ns] += len(payload)
    return max(bytes_at.values())


@pytest.mark.parametrize("family", [4, 6])
def test_connection(hosts, hook, family):
    records, counts = copied_stream(hosts, family, hook, STREAM)
    assert reassembled(records) == STREAM
    assert records[0][0].family == family
    if hook == "tc":
        assert longest_segment(records) > PIECE_BYTES
        assert counts[CaptureCount.EXTRA_PIECES] > 0


IFLA_GSO_MAX_SIZE = {4: 63, 6: 41}


def set_gso_max_size(name, family, size):
    """By hand: iproute2 has IPv4's only since 6.3."""
    attribute = struct.pack("=HHI", 8, IFLA_GSO_MAX_SIZE[family], size)
    link = struct.pack("=BxHiII", 0, 0, socket.if_nametoindex(name), 0, 0)
    request, ack, rtm_newlink = 1, 4, 16
    length = 16 + len(link) + len(attribute)
    head = struct.pack("=IHHII", length, rtm_newlink, request | ack, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as netlink:
        netlink.send(head + link + attribute)
        (error,) = struct.unpack_from("=i", netlink.recv(4096), 16)
    if error:
        pytest.skip(f"no BIG TCP for IPv{family}: {os.strerror(-error)}")


@pytest.mark.parametrize("family", [4, 6])
def test_big_tcp(hosts, family):
    """Super-segments beyond 64 KB, whose length fields say 0."""
    for fd, name in ((hosts.cli, "cli"), (hosts.srv, "srv")):
        hosts.enter(fd)
        set_gso_max_size(name, family, 180000)
    records, _ = copied_stream(hosts, family, "tc", STREAM)
    assert reassembled(records) == STREAM
    assert longest_segment(records) > 65536


TCP_INFO_UNACKED = 24


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("side", ["target, egress", "assistant, tc ingress", "assistant, xdp"])
def test_swallowed_on_the_wire(hosts, side, family):
    """Nothing claimed: the connection works. Claimed: the client hears nothing, we all."""
    listener, port = listening(hosts, family)
    # TC_ACT_STOLEN would be "next program" to a TCX link; a redirect to no device is not.
    hook = "xdp" if "xdp" in side else "tc"
    program = Intercept(
        hook, expression=f"tcp src port {port}", redirect_away=side.startswith("target")
    )
    if side.startswith("target"):
        attachment = attach(program.module, "srv", Hook.TC_EGRESS)
    else:
        hosts.enter(hosts.cli)
        attachment = attach(program.module, "cli", HOOKS[program.hook])
    hosts.enter(hosts.cli)
    with socket.create_connection((SERVER[family][1], port), 10) as client:
        peer, _ = listener.accept()
        with peer:
            peer.sendall(b"response")
            assert client.recv(100) == b"response"
            passed = program.counts()[InterceptCount.PASSED]
            assert passed >= 2 and program.records() == []
            # From now on it is a replay's.
            program.set_default(SWALLOW)
            client.sendall(b"request")
            assert peer.recv(100) == b"request"
            peer.sendall(b"next response")
            seen = []

            def answered():
                seen.extend(program.records())
                return any(segment.seg_len == 13 for segment, _ in seen)

            wait_for(answered)
            assert select.select([client], [], [], 0)[0] == []
            # The target's TCP believes it sent it: no re-sending in place.
            info = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            assert struct.unpack_from("=I", info, TCP_INFO_UNACKED) == (1,)
            own = client.getsockname(), client.getpeername()
            for segment, payload in seen:
                fields = KEY.unpack(segment.key)
                assert (fields[2], fields[3]) == (own[0][1], own[1][1])
                assert (segment.kind, segment.family, payload) == (KIND_TARGET, family, b"")
    attachment.close()
    counts = program.counts()
    program.check_balance(counts)
    assert counts[InterceptCount.CAPTURED] >= len(seen)
    assert not any(counts[kind] for kind in InterceptCount if kind > InterceptCount.PASSED)
    listener.close()
    program.close()
