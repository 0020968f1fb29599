"""Frames from pycopy's sender on a real wire, accepted by a real TCP; next hops that follow.

Two namespaces of its own, joined by two veth pairs: ``near`` sends copies, ``far`` is the
target. ``far`` routes the copied clients' addresses back through ``near``, where they end
(nothing there has them), and where they can be seen.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import shutil
import socket
import struct
import subprocess
import time

import pytest

from pycopy.egress.sender import Sender
from pycopy.errors import PycopyError
from pycopy.host import nexthop
from pycopy.wire import headers
from pycopy.wire.segment import ACK, FIN, PSH, SYN

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes namespaces"),
    pytest.mark.skipif(shutil.which("ethtool") is None, reason="needs ethtool"),
]

MAPPED = bytes(10) + b"\xff\xff"
CLONE_NEWNET = 0x40000000
NEAR_MAC, FAR_MAC, NEW_MAC = "02:00:00:00:01:01", "02:00:00:00:01:02", "02:00:00:00:01:99"
libc = ctypes.CDLL(None, use_errno=True)


def run(command):
    done = subprocess.run(command.split(), capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def mapped(text):
    return (
        socket.inet_pton(socket.AF_INET6, text) if ":" in text else MAPPED + socket.inet_aton(text)
    )


def mac(text):
    return bytes.fromhex(text.replace(":", ""))


def until(condition, timeout_s=10.0, step=lambda: time.sleep(0.01)):
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, "timed out"
        step()
    return value


class Lab:
    """Two namespaces; ``inside`` puts this process into one, as sockets belong to where they
    are made."""

    def __init__(self):
        self.near, self.far = (f"pcpath{os.getpid()}{side}" for side in ("n", "f"))
        self.home = os.open("/proc/self/ns/net", os.O_RDONLY)
        self.sockets = []

    @contextlib.contextmanager
    def inside(self, name):
        fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
        assert libc.setns(fd, CLONE_NEWNET) == 0
        os.close(fd)
        try:
            yield
        finally:
            assert libc.setns(self.home, CLONE_NEWNET) == 0

    def ip(self, side, command):
        return run(f"ip -n {getattr(self, side)} {command}")

    def up(self):
        for name in (self.near, self.far):
            run(f"ip netns add {name}")
            run(f"ip -n {name} link set lo up")
            for key in ("ipv4.conf.all.rp_filter", "ipv4.conf.default.rp_filter"):
                run(f"ip netns exec {name} sysctl -qw net.{key}=0")
            for key in ("all", "default"):
                run(f"ip netns exec {name} sysctl -qw net.ipv6.conf.{key}.accept_dad=0")
        for n in (1, 2):
            a, b = (NEAR_MAC, FAR_MAC) if n == 1 else ("02:00:00:00:02:01", "02:00:00:00:02:02")
            self.ip(
                "near",
                f"link add va{n} address {a} type veth peer vb{n} address {b} netns {self.far}",
            )
            self.address("near", f"va{n}", n, 1)
            self.address("far", f"vb{n}", n, 2)
        until(lambda: "LOWER_UP" in self.ip("near", "link show va1"))
        self.ip("far", "route add 10.88.0.0/16 via 10.77.1.1")
        self.ip("far", "route add fd88::/64 via fd77:1::1")

    def address(self, side, dev, net, host):
        self.ip(side, f"link set {dev} up")
        self.ip(side, f"addr replace 10.77.{net}.{host}/24 dev {dev}")
        self.ip(side, f"addr replace fd77:{net}::{host}/64 dev {dev} nodad")

    def down(self):
        for sock in self.sockets:
            sock.close()
        os.close(self.home)
        for name in (self.near, self.far):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def offload(self, tx):
        features = f"tx {tx} tso {tx} gso on"
        for name, dev in ((self.near, "va1"), (self.far, "vb1")):
            run(f"ip netns exec {name} ethtool -K {dev} {features} gro off")

    def listen_raw(self, side, dev):
        with self.inside(getattr(self, side)):
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
            sock.bind((dev, 3))
        sock.settimeout(5)
        self.sockets.append(sock)
        return sock

    def listen_tcp(self, family):
        with self.inside(self.far):
            sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6)
            sock.bind((far_of(family), 8080))
            sock.listen()
        sock.settimeout(5)
        self.sockets.append(sock)
        return sock


@pytest.fixture
def lab():
    lab = Lab()
    try:
        lab.up()
        yield lab
    finally:
        lab.down()


@pytest.fixture
def hops(lab):
    changed = []
    with lab.inside(lab.near):
        hops = nexthop.NextHops(changed.append)
    hops.changed = changed
    yield hops
    hops.close()


@pytest.fixture
def sender(lab):
    sender = Sender()
    yield sender
    sender.close()


def far_of(family, net=1):
    return f"10.77.{net}.2" if family == 4 else f"fd77:{net}::2"


def client_of(family):
    return mapped("10.88.0.5" if family == 4 else "fd88::5")


def pump(hops, condition, timeout_s=10.0):
    """What the driver's loop does, until ``condition``."""
    poll = select.poll()
    poll.register(hops.fileno(), select.POLLIN)

    def step():
        wait_ns = max(0, min(hops.deadline_ns - time.monotonic_ns(), 50_000_000))
        if poll.poll(wait_ns / 1e6):
            hops.on_readable(select.POLLIN)
        if time.monotonic_ns() >= hops.deadline_ns:
            hops.tick(time.monotonic_ns())

    return until(condition, timeout_s, step)


class Wire:
    """A flow and the buffer its headers are written into."""

    def __init__(self, lab, sender, hop, family, port=4242):
        self.lab, self.sender, self.hop = lab, sender, hop
        self.flow = headers.Flow(family, client_of(family), hop.destination, port, 8080)
        self.buffer = bytearray(headers.HEADER_BYTES_MAX)

    def send(self, seq, ack, bits, options=b"", payload=b"", mss=1400, wnd=65535):
        end = headers.write_frame(
            self.buffer, self.flow, self.hop.l2, seq, ack, bits, wnd, options, len(payload), mss
        )
        header = memoryview(self.buffer)[:end]
        with self.lab.inside(self.lab.near):
            code = self.sender.send(self.hop, header, payload)
        return code, bytes(header[10:])


def fold(data):
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def tcp_frames(sock, family, source):
    """Frames from ``source``: (frame, tcp header, payload), until none came for a while."""
    ip_bytes = 20 if family == 4 else 40
    address = source[-4:] if family == 4 else source
    at = 26 if family == 4 else 22
    sock.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        while True:
            frame = sock.recv(1 << 17)
            if frame[at : at + len(address)] != address or frame[23 if family == 4 else 20] != 6:
                continue
            tcp = frame[14 + ip_bytes :]
            yield frame, tcp[:20], tcp[(tcp[12] >> 4) * 4 :]


def sums_are_right(frame, family):
    packet = frame[14:]
    if family == 4:
        assert fold(packet[:20]) == 0xFFFF
        segment, addresses = packet[20:], packet[12:20]
    else:
        segment, addresses = packet[40:], packet[8:40]
    return fold(addresses + struct.pack("!II", 6, len(segment)) + segment) == 0xFFFF


def ready(lab, hops, family, net=1):
    hop = hops.resolve(mapped(far_of(family, net)))
    pump(hops, lambda: hop.usable)
    return hop


# ---- sender ----------------------------------------------------------------------------


@pytest.mark.parametrize("tx", ["off", "on"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_frame_arrives_byte_exact(lab, hops, sender, family, tx):
    lab.offload(tx)
    peer = lab.listen_raw("far", "vb1")
    line = Wire(lab, sender, ready(lab, hops, family), family)
    options = headers.data_options(11, 12)
    sent = []
    for n in (0, 1, 100, 1400):
        payload = os.urandom(n)
        code, header = line.send(1000 + n, 77, ACK | PSH, options, payload)
        assert code == 0
        sent.append((header, payload))
    got = list(tcp_frames(peer, family, client_of(family)))
    assert [payload for _, _, payload in got] == [payload for _, payload in sent]
    csum = 14 + (20 if family == 4 else 40) + 16
    for (frame, _, _), (header, payload) in zip(got, sent, strict=True):
        assert frame[:csum] == header[:csum]
        assert frame[csum + 2 :] == header[csum + 2 :] + payload
        if tx == "off":
            assert sums_are_right(frame, family)
        else:  # a veth carries the promise on: the field still holds the pseudo-header's sum
            assert frame[csum : csum + 2] == header[csum : csum + 2]
    assert sender.errors == {}


@pytest.mark.parametrize("tx", ["off", "on"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_real_tcp_accepts_it(lab, hops, sender, family, tx):
    lab.offload(tx)
    server = lab.listen_tcp(family)
    back = lab.listen_raw("near", "va1")
    hop = ready(lab, hops, family)
    line = Wire(lab, sender, hop, family)
    line.send(999, 0, SYN, headers.syn_options(1400, 7, True, 100))
    target = mapped(far_of(family))
    _, tcp, _ = next(t for t in tcp_frames(back, family, target) if t[1][13] == SYN | ACK)
    irs, acked = struct.unpack_from("!II", tcp, 4)
    assert acked == 1000
    # The request, in one send of 50 KB, and the FIN with it: sent in the kernel's last piece.
    payload = os.urandom(50_000)
    options = headers.data_options(101, 0)
    line.send(1000, irs + 1, ACK, options)
    code, _ = line.send(1000, irs + 1, ACK | PSH | FIN, options, payload)
    assert code == 0
    conn, peer = server.accept()
    lab.sockets.append(conn)
    assert mapped(peer[0]) == client_of(family) and peer[1] == 4242
    conn.settimeout(5)
    got = b""
    while piece := conn.recv(1 << 16):
        got += piece
        # Its first window may hold less than 50 KB; a real session would retransmit.
        line.send(1000 + len(got), irs + 1, ACK | FIN, options, payload[len(got) :])
    assert got == payload
    assert sender.errors == {}


@pytest.mark.parametrize("family", [4, 6])
def test_a_super_segment_arrives_as_frames_of_the_mss(lab, hops, sender, family):
    lab.offload("off")
    peer = lab.listen_raw("far", "vb1")
    line = Wire(lab, sender, ready(lab, hops, family), family)
    payload = os.urandom(50_000)
    options = headers.data_options(1, 2)
    assert line.send(5000, 9, ACK | PSH | FIN, options, payload, mss=1400)[0] == 0
    got = list(tcp_frames(peer, family, client_of(family)))
    assert len(got) == 36
    assert b"".join(piece for _, _, piece in got) == payload
    at = 5000
    for frame, tcp, piece in got:
        assert len(frame) <= 1514
        assert sums_are_right(frame, family)
        assert struct.unpack_from("!II", tcp, 4) == (at, 9)
        last = at + len(piece) == 55_000
        assert tcp[13] == (ACK | PSH | FIN if last else ACK)
        at += len(piece)
    if family == 4:
        ids = [int.from_bytes(frame[18:20], "big") for frame, _, _ in got]
        assert [(n - ids[0]) & 0xFFFF for n in ids] == list(range(36))
        _, header = line.send(1, 1, ACK)
        assert (int.from_bytes(header[18:20], "big") - ids[0]) & 0xFFFF >= 36


def test_what_cannot_be_sent_is_counted(lab, hops, sender):
    hop = ready(lab, hops, 4)
    line = Wire(lab, sender, hop, 4)
    assert line.send(1, 1, ACK)[0] == 0
    # Longer than the device's MTU and not to be cut: what was believed of the path was wrong.
    assert line.send(1, 1, ACK, payload=bytes(1600), mss=1600)[0] == errno.EMSGSIZE
    lab.ip("near", "link set va1 down")
    assert line.send(1, 1, ACK)[0] == errno.ENETDOWN
    lab.address("near", "va1", 1, 1)
    pump(hops, lambda: hop.usable)
    assert line.send(1, 1, ACK)[0] == 0
    lab.ip("near", "link del va1")
    code = line.send(1, 1, ACK)[0]
    assert code in (errno.ENXIO, errno.ENODEV)
    assert sum(sender.errors.values()) == 3
    pump(hops, lambda: not hop.usable)
    # Another device takes its place: found again, with a new socket.
    lab.ip(
        "near",
        f"link add va1 address {NEAR_MAC} type veth peer vb1 address {FAR_MAC} netns {lab.far}",
    )
    lab.address("far", "vb1", 1, 2)
    lab.address("near", "va1", 1, 1)
    pump(hops, lambda: hop.usable)
    assert line.send(1, 1, ACK)[0] == 0


@pytest.mark.alone
def test_a_full_queue_is_back_pressure_then_counted(lab, hops, sender):
    hop = ready(lab, hops, 4)
    line = Wire(lab, sender, hop, 4)
    # 1 Mbit/s behind a queue longer than the socket may fill: EAGAIN after a short wait.
    run(
        f"ip netns exec {lab.near} tc qdisc replace dev va1 root tbf rate 1mbit burst 4k limit 100m"
    )
    until(lambda: line.send(1, 1, ACK, payload=bytes(60_000))[0], 10, lambda: None)
    assert set(sender.errors) == {errno.EAGAIN}
    # Within one flush it is waited for no more: 500 waits would take half a second.
    begin = time.monotonic()
    for _ in range(500):
        line.send(1, 1, ACK, payload=bytes(60_000))
    assert time.monotonic() - begin < 0.3, "no stall"
    sender.begin()
    # A queue shorter than the socket may fill: the qdisc drops, and says so.
    run(f"ip netns exec {lab.near} tc qdisc replace dev va1 root tbf rate 1mbit burst 4k limit 10k")
    until(lambda: line.send(1, 1, ACK, payload=bytes(1400))[0] == errno.ENOBUFS, 10, lambda: None)
    assert sender.errors[errno.ENOBUFS] == 1


def test_a_device_without_link_header(lab, hops, sender):
    with lab.inside(lab.near):
        try:
            tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"pctun", 0x1001))  # IFF_TUN|NO_PI
        except OSError as problem:
            pytest.skip(f"no tun device here: {problem}")
    try:
        lab.ip("near", "addr add 10.79.0.1/24 dev pctun")
        lab.ip("near", "link set pctun up")
        hop = hops.resolve(mapped("10.79.0.2"))
        pump(hops, lambda: hop.usable)
        assert (hop.ifname, hop.l2, hop.source) == ("pctun", b"", mapped("10.79.0.1"))
        _, header = Wire(lab, sender, hop, 4).send(1, 2, ACK, payload=b"request")
        source = client_of(4)[12:]

        def arrived():
            with contextlib.suppress(BlockingIOError):
                packet = os.read(tun, 4096)
                return packet if packet[12:16] == source else None

        packet = until(arrived)
        assert packet[:36] == header[:36] and packet[40:] == b"request"
        assert sums_are_right(bytes(14) + packet, 4)
    finally:
        os.close(tun)


# ---- next hops -------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
def test_a_silent_neighbour_is_resolved_by_asking_the_kernel(lab, hops, family):
    neighbours = lab.ip("near", "neigh show")
    assert far_of(family) not in neighbours
    hop = hops.resolve(mapped(far_of(family)))
    hops.wait_usable(5)
    ethertype = b"\x08\x00" if family == 4 else b"\x86\xdd"
    assert hop.l2 == mac(FAR_MAC) + mac(NEAR_MAC) + ethertype
    assert (hop.ifname, hop.mtu, hop.trouble) == ("va1", 1500, "")
    assert hop.source == mapped("10.77.1.1" if family == 4 else "fd77:1::1")
    with lab.inside(lab.near):
        assert hop.ifindex == socket.if_nametoindex("va1")
    assert hops.changed and set(map(id, hops.changed)) == {id(hop)}


@pytest.mark.parametrize("family", [4, 6])
def test_a_changed_mac_is_followed(lab, hops, family):
    hop = ready(lab, hops, family)
    lab.ip("far", f"link set vb1 address {NEW_MAC}")
    # It announces itself, as hosts do after a fail-over (gratuitous ARP, unsolicited ND):
    # here by asking us something. The kernel believes an ARP only a second after the last.
    near = "10.77.1.1" if family == 4 else "fd77:1::1"
    lab.ip("far", "neigh flush all")
    with lab.inside(lab.far):
        sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    lab.sockets.append(sock)

    def followed():
        sock.sendto(b"", (near, 9))
        lab.ip("far", "neigh flush all")
        return hop.l2[:6] == mac(NEW_MAC)

    pump(hops, followed)
    assert hop.usable and hop.l2[6:12] == mac(NEAR_MAC)


def test_a_mac_that_changes_in_silence_is_found_by_the_refresh(lab, hops):
    # The kernel's timers, shortened: distrust after 0.5 s, probe after 1 s, 0.1 s apart.
    for key, value in (
        ("base_reachable_time_ms", 300),
        ("delay_first_probe_time", 1),
        ("retrans_time_ms", 100),
    ):
        run(f"ip netns exec {lab.near} sysctl -qw net.ipv4.neigh.va1.{key}={value}")
    hop = ready(lab, hops, 4)
    lab.ip("far", f"link set vb1 address {NEW_MAC}")
    pump(hops, lambda: hop.usable and hop.l2[:6] == mac(NEW_MAC), 20)


def test_the_entry_does_not_age_out_while_in_use(lab, hops):
    for key, value in (("base_reachable_time_ms", 300), ("delay_first_probe_time", 1)):
        run(f"ip netns exec {lab.near} sysctl -qw net.ipv4.neigh.va1.{key}={value}")
    hop = ready(lab, hops, 4)
    begin = time.monotonic()
    confirmed = 0

    def often_enough():
        nonlocal confirmed
        hops.look_at_all()
        confirmed += "REACHABLE" in lab.ip("near", "neigh show 10.77.1.2 dev va1")
        assert hop.usable
        return time.monotonic() - begin > 3 and confirmed

    pump(hops, often_enough)
    assert "FAILED" not in lab.ip("near", "neigh show 10.77.1.2")


@pytest.mark.parametrize("family", [4, 6])
def test_a_route_to_another_device_is_followed(lab, hops, family):
    target = "10.99.0.1" if family == 4 else "fd99::1"
    lab.ip("near", f"route add {target} via {far_of(family, 1)}")
    hop = hops.resolve(mapped(target))
    hops.wait_usable(5)
    assert (hop.ifname, hop.l2[:6]) == ("va1", mac(FAR_MAC))
    lab.ip("near", f"route replace {target} via {far_of(family, 2)} mtu lock 1280")
    pump(hops, lambda: hop.usable and hop.ifname == "va2")
    assert (hop.l2[:12], hop.mtu) == (mac("02:00:00:00:02:02") + mac("02:00:00:00:02:01"), 1280)
    assert hop.source == mapped("10.77.2.1" if family == 4 else "fd77:2::1")
    lab.ip("near", f"route del {target}")
    pump(hops, lambda: not hop.usable)
    assert hop.trouble == "no route"


@pytest.mark.parametrize("family", [4, 6])
def test_link_down_and_up_mtu_and_rename(lab, hops, family):
    hop = ready(lab, hops, family)
    lab.ip("near", "link set va1 mtu 1400")
    pump(hops, lambda: hop.mtu == 1400)
    lab.ip("near", "link set va1 down")
    pump(hops, lambda: not hop.usable)
    assert hop.trouble
    lab.ip("near", "link set va1 name renamed")
    lab.address("near", "renamed", 1, 1)
    pump(hops, lambda: hop.usable)
    assert hop.ifname == "renamed" and hop.l2[:6] == mac(FAR_MAC)
    lab.ip("far", "link set vb1 down")
    pump(hops, lambda: not hop.usable)
    assert "carrier" in hop.trouble or hop.trouble == "no route"
    lab.address("far", "vb1", 1, 2)
    pump(hops, lambda: hop.usable)


def test_ipv4_through_an_ipv6_gateway(lab, hops):
    lab.ip("near", "route add 10.99.0.1 via inet6 fd77:1::2")
    hop = hops.resolve(mapped("10.99.0.1"))
    hops.wait_usable(5)
    assert hop.l2 == mac(FAR_MAC) + mac(NEAR_MAC) + b"\x08\x00"


def test_of_several_next_hops_one(lab, hops):
    lab.ip("near", "route add 10.99.0.0/16 nexthop via 10.77.1.2 nexthop via 10.77.2.2")
    hop = hops.resolve(mapped("10.99.0.1"))
    hops.wait_usable(5)
    assert hop.ifname in ("va1", "va2")
    assert hop.l2[:6] == mac(FAR_MAC if hop.ifname == "va1" else "02:00:00:00:02:02")


@pytest.mark.parametrize("kind", ["nud permanent", "nud reachable extern_learn", "managed"])
def test_a_neighbour_kept_by_somebody_else_is_used_and_left_alone(lab, hops, kind):
    lladdr = "" if kind == "managed" else f"lladdr {NEW_MAC}"
    lab.ip("near", f"neigh replace 10.77.1.2 {lladdr} dev va1 {kind}")
    hop = ready(lab, hops, 4)
    assert hop.l2[:6] == mac(FAR_MAC if kind == "managed" else NEW_MAC)
    for _ in range(3):
        hops.look_at_all()
    assert kind.split()[-1] in lab.ip("near", "neigh show 10.77.1.2").lower()
    assert hop.usable


def test_lost_events_are_made_up_for(lab, hops):
    hop = ready(lab, hops, 4)
    hops._events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    batch = "".join(f"route add 10.98.0.{n} via 10.77.1.2\n" for n in range(1, 101))
    subprocess.run(["ip", "-n", lab.near, "-batch", "-"], input=batch, text=True, check=True)
    lab.ip("near", "link set va1 mtu 1300")
    error = hops._events.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    assert error == errno.ENOBUFS, "the test must overrun the socket"
    lab.ip("near", "route flush root 10.98.0.0/16")  # overruns it again; the last one read it
    pump(hops, lambda: hop.mtu == 1300)


@pytest.mark.parametrize(
    ("target", "route", "cause"),
    [
        ("10.99.0.1", None, "no route to 10.99.0.1"),
        ("fd99::1", None, "no route to fd99::1"),
        ("10.99.0.1", "blackhole", "no route to 10.99.0.1: its route is a blackhole"),
        ("10.99.0.1", "unreachable", "no route to 10.99.0.1: its route says unreachable"),
        ("10.99.0.1", "prohibit", "no route to 10.99.0.1: its route says prohibit"),
        ("fd99::1", "blackhole", "no route to fd99::1: its route is a blackhole"),
        ("fd99::1", "prohibit", "no route to fd99::1: its route says prohibit"),
        ("fd99::1", "unreachable", "no route to fd99::1: its route says unreachable"),
        ("10.77.1.255", None, "no route to 10.77.1.255: it is a broadcast address"),
        ("10.77.1.77", None, "target 10.77.1.77 does not answer ARP on va1"),
        ("fd77:1::77", None, "target fd77:1::77 does not answer neighbour discovery on va1"),
        (
            "10.99.0.1",
            "via 10.77.1.77",
            "gateway 10.77.1.77 of target 10.99.0.1 does not answer ARP on va1",
        ),
    ],
)
def test_what_start_up_says_of_a_target_out_of_reach(lab, hops, target, route, cause):
    if route:
        via = route.startswith("via")
        lab.ip("near", f"route add {target} {route}" if via else f"route add {route} {target}")
    hop = hops.resolve(mapped(target))
    begin = time.monotonic()
    with pytest.raises(PycopyError) as failed:
        hops.wait_usable(0.5)
    assert 0.4 < time.monotonic() - begin < 2
    assert failed.value.cause == cause
    assert failed.value.cure
    assert not hop.usable
