"""The fast path on real sockets: partial checksums, super-segments, VLAN tags in the metadata.

Client and target are TCP implementations that check what they get; in between is the host
with both programs attached, as replay attaches them.
"""

import contextlib
import fcntl
import os
import socket
import struct
import threading
from types import SimpleNamespace

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6

from pycopy.fastpath.kernel import KernelSessions
from pycopy.kernel.abi import CaptureCount, FastCount, InterceptCount
from pycopy.kernel.attach import Hook, attach
from pycopy.lab import offloads
from pycopy.session.fields import KERNEL_SESSION, KernelSession
from pycopy.session.rules import Rules
from tests.bpf.fast import Bench, check_balance, check_frame
from tests.bpf.frames import SYN_OPTIONS, tcp
from tests.bpf.harness import Capture, Intercept, Namespaces, mapped, sh, wait_for
from tests.bpf.sources import load

families = pytest.mark.parametrize("family", (4, 6))
MATERIAL = bytes(number * 7 & 0xFF for number in range(100_000))
KIND = {4: socket.AF_INET, 6: socket.AF_INET6}
#: client, host towards the client, host towards the target, target
ADDRESSES = {
    4: ("10.5.0.1", "10.5.0.2", "10.6.0.2", "10.6.0.9"),
    6: ("fd05::1", "fd05::2", "fd06::2", "fd06::9"),
}
PORTS = (20000, 20999)
ETH_P_ALL = 3
SIOCGIFHWADDR = 0x8927


class Hosts:
    """Three namespaces in a row: client, online host, target."""

    def __init__(self, family):
        self.family = family
        self.namespaces = Namespaces()
        new = self.namespaces.new
        self.target, self.client, self.online = new(), new(), new()
        for name, there in (("cli", self.client), ("out", self.target)):
            peer = f"name eth0 netns /proc/{os.getpid()}/fd/{there}"
            sh(f"ip link add {name} type veth peer {peer}")
        client, towards_client, towards_target, target = ADDRESSES[family]
        bits = 24 if family == 4 else 64
        for where, device, address in (
            (self.client, "eth0", client), (self.online, "cli", towards_client),
            (self.online, "out", towards_target), (self.target, "eth0", target),
        ):  # fmt: skip
            self.namespaces.enter(where)
            sh(f"ip address add {address}/{bits} dev {device}")
            sh(f"ip link set {device} up")

    @contextlib.contextmanager
    def inside(self, where):
        self.namespaces.enter(where)
        try:
            yield
        finally:
            self.namespaces.enter(self.online)

    def mac(self, where, device):
        request = struct.pack("16s16x", device.encode())
        with self.inside(where), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            return fcntl.ioctl(any_socket, SIOCGIFHWADDR, request)[18:24]

    def listen(self, where, address):
        with self.inside(where):
            listener = socket.create_server((address, 0), family=KIND[self.family])
        listener.settimeout(10)
        return listener


class Copying:
    """Both programs attached on the online host; the timer runs when a test says so."""

    def __init__(self, hosts, online_port, target_port):
        family = hosts.family
        _, online, ours, target = ADDRESSES[family]
        self.kernel = KernelSessions(1, 64)
        shared = {"kernel": self.kernel}
        self.capture = Capture("tc", services=[(mapped(online), online_port)], **shared)
        self.intercept = Intercept(
            "tc", targets=[(mapped(target), target_port)], ports=PORTS, **shared
        )
        self.kernel.configure(Rules())
        self.kernel.use_ports(list(range(*PORTS)))
        ether_type = b"\x08\x00" if family == 4 else b"\x86\xdd"
        self.l2 = hosts.mac(hosts.target, "eth0") + hosts.mac(hosts.online, "out")
        hop = SimpleNamespace(
            ifindex=socket.if_nametoindex("out"), usable=True, l2=self.l2 + ether_type,
            source=mapped(ours), destination=mapped(target),
        )  # fmt: skip
        self.kernel.set_hop(0, hop, family, target_port, 1460 if family == 4 else 1440)
        self.kernel.load(14)
        self._attached = [
            attach(self.intercept.module, "out", Hook.TC_INGRESS),
            attach(self.capture.module, "cli", Hook.TC_INGRESS),
        ]

    def tick(self):
        assert list(self.kernel.on_timer()) == [], self.left()

    def is_quiet(self):
        """Whether the target has acknowledged everything."""
        self.tick()
        table = self.kernel.maps.by_name["sessions"]
        sessions = [
            KernelSession(*KERNEL_SESSION.unpack(table.lookup(slot.to_bytes(4, "little"))))
            for slot in range(self.kernel.maps.slots)
        ]
        return all(session.snd_una == session.snd_nxt for session in sessions)

    def left(self):
        return self.kernel.counters()[FastCount.LEFT :]

    def counts(self):
        values = self.kernel.counters()
        counts = {count: values[count] for count in FastCount}
        check_balance(counts)
        return counts

    def close(self):
        for attachment in self._attached:
            attachment.close()
        self.capture.close()
        self.intercept.close()
        self.kernel.close()


@pytest.fixture(params=(4, 6))
def hosts(request):
    made = Hosts(request.param)
    yield made
    made.namespaces.close()


def serve(listener, received, answers):
    """Take in what comes; after each ``\\n`` the next answer."""
    peer, _ = listener.accept()
    with peer:
        while data := peer.recv(1 << 20):
            received += data
            while answers and received.count(b"\n") >= answers[0][0]:
                peer.sendall(answers.pop(0)[1])


@pytest.mark.parametrize("offloaded", (True, False), ids=("offloads", "no offloads"))
def test_real_connections(hosts, offloaded):
    """Requests up to a dozen segments each, which go out as one super-segment, byte for byte."""
    family = hosts.family
    _, online_address, _, target_address = ADDRESSES[family]
    online = hosts.listen(hosts.online, online_address)
    target = hosts.listen(hosts.target, target_address)
    port = online.getsockname()[1]
    copying = Copying(hosts, port, target.getsockname()[1])
    if not offloaded:
        offloads.set_all("out", False)
    with hosts.inside(hosts.target):
        sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        sniffer.bind(("eth0", ETH_P_ALL))
        sniffer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        sniffer.setblocking(False)
    sizes = (1, 2, 3, 7, 100, 511, 1447, 1448, 1449, 2896, 5001, 9999, 12_345)
    requests = [MATERIAL[n : n + size].replace(b"\n", b"x") + b"\n" for n, size in enumerate(sizes)]
    answers = [(number + 1, b"%d" % number * 50) for number in range(len(sizes))]
    streams = bytearray(), bytearray()
    threads = [
        threading.Thread(target=serve, args=(listener, stream, list(answers)))
        for listener, stream in zip((online, target), streams, strict=True)
    ]
    for thread in threads:
        thread.start()
    with hosts.inside(hosts.client):
        client = socket.socket(KIND[family])
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.settimeout(10)
    client.connect((online_address, port))
    sent_bytes = 0
    for request, (_, answer) in zip(requests, answers, strict=True):
        client.sendall(request)
        got = b""
        while len(got) < len(answer):
            got += client.recv(65536)
        assert got == answer
        sent_bytes += len(request)
        # What the window does not take is the engine's to cut.
        wait_for(lambda wanted=sent_bytes: len(streams[1]) == wanted and copying.is_quiet())
    client.close()
    stream = b"".join(requests)
    wait_for(lambda: [copying.tick(), streams[1] == stream][1])
    for thread in threads:
        thread.join(10)
    wait_for(lambda: [copying.tick(), copying.counts()[FastCount.CLOSED]][1])
    assert bytes(streams[0]) == stream
    counts = copying.counts()
    assert not any(copying.left()) and counts[FastCount.OUT_FAILED] == 0
    assert copying.capture.counts()[CaptureCount.CAPTURED] == 0
    assert copying.intercept.counts()[InterceptCount.CAPTURED] == 0
    sent = check_sniffed(sniffer, copying.l2, family, checksums=not offloaded)
    assert (max(sent) > 1448) == offloaded, "one super-segment, or what it is cut into"
    sniffer.close()
    online.close()
    target.close()
    copying.close()


def check_sniffed(sniffer, l2, family, checksums):
    """Each frame that came to the target from us, by its payload's length."""
    lengths = []
    _, _, ours, target = ADDRESSES[family]
    with contextlib.suppress(BlockingIOError):
        while True:
            frame = sniffer.recv(1 << 17)
            if frame[:6] != l2[:6] or frame[12:14] not in (b"\x08\x00", b"\x86\xdd"):
                continue
            if frame[23 if family == 4 else 20] != 6:
                continue
            if checksums:
                layer = check_frame(frame, family, ours, target, l2)
                lengths.append(len(bytes(layer.payload)))
            else:
                lengths.append(len(frame) - 14 - (52 if family == 4 else 72))
    return lengths


@pytest.fixture(scope="module")
def bench():
    namespaces = Namespaces()
    namespaces.new()
    made = Bench(slots=64)
    yield made
    made.close()
    namespaces.close()


#: What a program behind ours sees of the packet.
LOOK = """
#include <uapi/linux/pkt_cls.h>
#include "parse.h"
struct seen { u32 vlan_present, vlan_tci, vlan_proto, bytes; u8 frame[2048]; };
BPF_ARRAY(packets, struct seen, 1);
int pycopy_look(PYCOPY_CTX *ctx)
{
	int zero = 0;
	struct seen *seen = packets.lookup(&zero);
	u64 bytes = ctx->len;

	PYCOPY_PIN(bytes);
	if (!seen || bytes < 1 || bytes > sizeof(seen->frame))
		return TC_ACT_UNSPEC;
	seen->vlan_present = ctx->vlan_present;
	seen->vlan_tci = ctx->vlan_tci;
	seen->vlan_proto = ctx->vlan_proto;
	bpf_skb_load_bytes(ctx, 0, seen->frame, bytes);
	seen->bytes = bytes;
	return TC_ACT_UNSPEC;
}
"""


class Tagged:
    """A wire into a host on which our capture runs, and a program behind it that looks."""

    def __init__(self, bench, directory):
        sh("ip link add cli type veth peer name srv")
        for name in ("cli", "srv"):
            sh(f"sysctl -qw net.ipv6.conf.{name}.disable_ipv6=1")
            sh(f"ip link set {name} up")
        source = directory / "look.c"
        source.write_text(LOOK)
        self._module = load(source)
        # Whoever comes later runs first.
        self._attached = [
            attach(module, "srv", Hook.TC_INGRESS)
            for module in (self._module, bench.capture.module)
        ]
        self._give = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self._give.bind(("cli", 0))

    def send(self, frame):
        """(tag, bytes) of the packet as it is behind our program."""
        self._module.maps["packets"].update(bytes(4), bytes(16 + 2048))
        self._give.send(frame)

        def seen():
            value = self._module.maps["packets"].lookup(bytes(4))
            return value if struct.unpack_from("=I", value, 12)[0] else None

        value = wait_for(seen)
        present, tci, protocol, size = struct.unpack_from("=4I", value)
        tag = struct.pack("=H", protocol) + struct.pack("!H", tci) if present else b""
        return tag, value[16 : 16 + size]

    def close(self):
        for attachment in self._attached:
            attachment.close()
        self._give.close()
        self._module.close()
        sh("ip link del cli")


@families
def test_a_tagged_packet_keeps_its_tag_and_its_copy_has_none(bench, family, tmp_path):
    """The kernel took the tag off into the metadata; behind our program it is there again."""
    wire = Tagged(bench, tmp_path)
    connection = bench.connection(family, link_name="802.1Q")
    try:
        syn = connection.client_frame("S", options=SYN_OPTIONS)
        assert wire.send(syn) == (syn[12:16], syn[:12] + syn[16:])
        (frame,) = wait_for(bench.wire.read)
        connection.copy_port = connection.check(frame).sport
        connection.seq += 1
        connection.online_nxt = connection.online_nxt + 1 & 0xFFFFFFFF
        bench.response(connection.target_frame("SA", options=SYN_OPTIONS))
        connection.rcv_nxt += 1
        for payload in (b"x", MATERIAL[:1400], MATERIAL[:1301]):
            request = connection.client_frame("PA", payload)
            assert wire.send(request) == (request[12:16], request[:12] + request[16:])
            connection.seq = connection.seq + len(payload) & 0xFFFFFFFF
            (frame,) = wait_for(bench.wire.read)
            assert bytes(connection.check(frame).payload) == payload
    finally:
        wire.close()
        bench.clear()


@families
def test_of_two_tags_the_inner_one_is_no_plain_header(bench, family, tmp_path):
    wire = Tagged(bench, tmp_path)
    opened = bench.counts()[FastCount.OPENED]
    connection = bench.connection(family, link_name="802.1ad and 802.1Q")
    try:
        syn = connection.client_frame("S", options=SYN_OPTIONS)
        assert wire.send(syn) == (syn[12:16], syn[:12] + syn[16:])
        ((record, _),) = wait_for(bench.capture.records)
        assert record.seq == connection.seq
        assert bench.counts()[FastCount.OPENED] == opened
    finally:
        wire.close()
        bench.clear()


@families
def test_a_response_whose_tcp_header_is_further_in_leaves(bench, family):
    """Options of IP: its packet could not become one of ours where its checksum is partial."""
    connection = bench.connection(family)
    connection.open()
    connection.ask(b"request")
    frame = connection.target_frame("PA", b"answer")
    plain = IP(frame[14:]) if family == 4 else IPv6(frame[14:])
    if family == 4:
        header = IP(src=plain.src, dst=plain.dst, options=[b"\x94\x04\x00\x00"])
    else:
        from scapy.layers.inet6 import IPv6ExtHdrDestOpt

        header = IPv6(src=plain.src, dst=plain.dst) / IPv6ExtHdrDestOpt()
    layer = plain.payload
    odd = tcp(
        layer.sport, layer.dport, "PA", b"answer", ip=header, seq=layer.seq, ack=layer.ack,
        options=layer.options,
    )  # fmt: skip
    assert bench.response(odd) == []
    ((record, _),) = bench.intercept.records()
    assert (record.seg_len, record.ack) == (6, layer.ack)
    bench.clear()
