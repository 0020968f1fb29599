"""The fast path on a bench: both programs over one set of maps, a wire to look at, a clock.

Frames go in by BPF_PROG_TEST_RUN, which executes no redirect: what a response turns into
comes back as the packet, what is cloned leaves by a veth pair. Either way it is checked
before a test sees it: lengths, checksums of IP and TCP, addresses of link and network.
"""

import contextlib
import socket
import struct
from types import SimpleNamespace

from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from pycopy.fastpath.kernel import KernelSessions
from pycopy.kernel import abi, syscall
from pycopy.kernel.abi import FastCount
from pycopy.session.fields import KERNEL_SESSION, KernelSession
from pycopy.session.rules import Rules
from pycopy.wire.segment import KEY
from tests.bpf.frames import CLIENT, CLIENT6, SERVER, SERVER6, SYN_OPTIONS, tcp
from tests.bpf.harness import TC_CONTINUE, TC_SHOT, Capture, Intercept, mapped, sh

OURS = {4: "10.0.0.1", 6: "fd00::1"}
TARGET = {4: "10.0.0.9", 6: "fd00::9"}
CLIENTS, SERVERS = {4: CLIENT, 6: CLIENT6}, {4: SERVER, 6: SERVER6}
ONLINE_PORT, TARGET_PORT = 80, 8080
PORTS = (20000, 20999)
LINK = bytes.fromhex("020000000009 020000000001")
TC_REDIRECT = 7
SECOND = 1_000_000_000
ETH_P_ALL = 3


class Wire:
    """A veth pair in the namespace we are in; what leaves by one end can be read."""

    def __init__(self, mtu=65000):
        sh("ip link add out0 type veth peer name out1")
        for name in ("out0", "out1"):
            sh(f"sysctl -qw net.ipv6.conf.{name}.disable_ipv6=1")
            sh(f"ip link set {name} mtu {mtu} up")
        self.ifindex = socket.if_nametoindex("out0")
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._socket.bind(("out1", ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        self._socket.setblocking(False)

    def read(self):
        """Everything that came out since the last time."""
        frames = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frames.append(self._socket.recv(1 << 17))
        return frames

    def close(self):
        self._socket.close()


class Bench:
    """Service 0 is IPv4, service 1 IPv6. The clock stands still unless a test moves it."""

    def __init__(self, *, slots=256, mss=1460, rules=None):
        self.wire = Wire()
        self.rules = rules or Rules()
        self.kernel = KernelSessions(2, slots)
        shared = {"kernel": self.kernel}
        self.capture = Capture(
            "tc", services=[(mapped(SERVERS[f]), ONLINE_PORT) for f in (4, 6)], **shared
        )
        self.intercept = Intercept(
            "tc", targets=[(mapped(TARGET[f]), TARGET_PORT) for f in (4, 6)], ports=PORTS, **shared
        )
        self.kernel.configure(self.rules)
        self.kernel.use_ports(list(range(PORTS[0], PORTS[1] + 1)))
        for family in (4, 6):
            self.set_hop(family, mss)
        self.now_ns = 1000 * SECOND
        self.advance(0)
        self.kernel.load(14)
        self._clients = iter(range(1024, 65536))
        self._fetched = []

    def set_hop(self, family, mss=1460, usable=True):
        ether_type = b"\x08\x00" if family == 4 else b"\x86\xdd"
        hop = SimpleNamespace(
            ifindex=self.wire.ifindex, usable=usable, l2=LINK + ether_type,
            source=mapped(OURS[family]), destination=mapped(TARGET[family]),
        )  # fmt: skip
        self.kernel.set_hop(int(family == 6), hop, family, TARGET_PORT, mss)

    def advance(self, ns):
        self.now_ns += ns
        self.kernel.set_clock(self.now_ns)

    def counts(self):
        values = self.kernel.counters()
        counts = {count: values[count] for count in FastCount}
        check_balance(counts)
        return counts

    def left(self):
        """{reason: times} of the sessions that the kernel handed over."""
        values = self.kernel.counters()
        return {left: values[FastCount.LEFT + left] for left in abi.Left
                if values[FastCount.LEFT + left]}  # fmt: skip

    def sessions(self):
        """Every slot's session."""
        table = self.kernel.maps.by_name["sessions"]
        return [
            KernelSession(*KERNEL_SESSION.unpack(table.lookup(slot.to_bytes(4, "little"))))
            for slot in range(self.kernel.maps.slots)
        ]

    def client(self, frame):
        """A client's frame: what leaves for the target. The frame itself must go on as it was."""
        assert self.capture.call(frame) == TC_CONTINUE
        return self.wire.read()

    def response(self, frame):
        """The target's frame, swallowed: what leaves for the target because of it."""
        run = syscall.test_run(self.intercept.module.program_fd, frame, room_bytes=4096)
        assert run.retval in (TC_SHOT, TC_REDIRECT), run.retval
        return self.wire.read() + ([run.data] if run.retval == TC_REDIRECT else [])

    def tick(self):
        """The timer comes by: (what leaves for the target, the sessions handed over)."""
        handed_over = list(self.kernel.on_timer())
        return self.wire.read(), handed_over

    def clear(self):
        """Every session is over, every slot free, as for the next test."""
        self.advance(self.rules.time_wait_ns)
        self.kernel.set_closed(True)
        fetched = [*self._fetched, *self.tick()[1], *self.kernel.fetch_all()]
        for session, _ in fetched:
            self.disown(session)
        self.kernel.set_closed(False)
        for _ in range(3):
            self.kernel.forget_released()
            self.kernel.forget_disowned(lambda: False)
        for program in (self.capture, self.intercept):
            program.records()
        self.wire.read()

    def kernel_sessions(self):
        """All that the kernel has or has handed over, fetched once: with what is in the log."""
        if not self._fetched:
            self._fetched = [*self.tick()[1], *self.kernel.fetch_all()]
        return self._fetched

    def disown(self, session):
        """User space is done with a session that it has fetched."""
        self._fetched = [each for each in self._fetched if each[0] is not session]
        self.kernel.disown_online(session.online)
        self.kernel.release(session.target)

    def free_slots(self):
        """How many there are; all are put back."""
        stack, slots = self.kernel.maps.by_name["slots"].fd, []
        while (slot := syscall.stack_pop(stack, 4)) is not None:
            slots.append(slot)
        for slot in reversed(slots):
            syscall.stack_push(stack, [int.from_bytes(slot, "little")])
        assert len(set(slots)) == len(slots), "a slot is free twice"
        return len(slots)

    def connection(self, family=4, **options):
        return Connection(self, family, next(self._clients), **options)

    def close(self):
        self.capture.close()
        self.intercept.close()
        self.kernel.close()
        self.wire.close()


def check_balance(counts):
    """bpf/pycopy.h on enum pycopy_fast_count."""
    count = FastCount
    assert counts[count.CLIENT] == sum(
        counts[fate] for fate in (count.SENT_AT_ONCE, count.HELD, count.STEERED, count.DUPLICATE)
    )
    assert counts[count.RELEASED] <= counts[count.HELD]
    assert counts[count.RESPONSES] == (
        counts[count.RESPONSES_STEERED] + counts[count.RESPONSES_DUPLICATE]
    )


class Connection:
    """One client connection and its copy, as both would really be: numbers, options, sizes."""

    def __init__(
        self, bench, family, port, *, timestamps=True, options=None, iss=0xFFFFFF00,
        link_name="untagged",
    ):  # fmt: skip
        self.bench, self.family, self.port = bench, family, port
        self.timestamps = timestamps
        if options is None:
            options = SYN_OPTIONS if timestamps else [("MSS", 1460), ("NOP", 0), ("WScale", 7)]
        self._options = options
        self._link = link_name
        self.seq = iss
        self.online_irs, self.irs = 0xFFFFFFF0, 0x7FFFFFF0
        self.online_nxt, self.rcv_nxt = self.online_irs, self.irs
        self.copy_port = 0

    def _network(self, src, dst):
        return IP(src=src, dst=dst) if self.family == 4 else IPv6(src=src, dst=dst)

    def _stamps(self):
        if not self.timestamps:
            return []
        stamp = self.bench.now_ns // 1_000_000 & 0xFFFFFFFF
        return [("NOP", 0), ("NOP", 0), ("Timestamp", (stamp, 1))]

    def client_frame(self, flags="A", payload=b"", *, back=0, options=None, **more):
        """What the client would say now; ``back``: so many bytes before."""
        network = self._network(CLIENTS[self.family], SERVERS[self.family])
        more.setdefault("ack", 0 if flags == "S" else self.online_nxt)
        return tcp(
            self.port, ONLINE_PORT, flags, payload, ip=network, link=self._link,
            seq=(self.seq - back) & 0xFFFFFFFF, window=65000,
            options=self._stamps() if options is None else options, **more,
        )  # fmt: skip

    def target_frame(self, flags="A", payload=b"", *, acked=None, options=None, **more):
        network = self._network(TARGET[self.family], OURS[self.family])
        more.setdefault("seq", self.rcv_nxt)
        more.setdefault("window", 60000)
        return tcp(
            TARGET_PORT, self.copy_port, flags, payload, ip=network,
            ack=self.seq if acked is None else acked & 0xFFFFFFFF,
            options=self._stamps() if options is None else options, **more,
        )  # fmt: skip

    def open(self):
        """Three-way handshake, on both sides; the copy's SYN and ACK."""
        (syn,) = self.bench.client(self.client_frame("S", options=self._options))
        syn = self.check(syn)
        self.copy_port = syn.sport
        self.seq = self.seq + 1 & 0xFFFFFFFF
        self.online_nxt = self.online_nxt + 1 & 0xFFFFFFFF
        answer = self.target_frame("SA", options=self._options)
        self.rcv_nxt = self.rcv_nxt + 1 & 0xFFFFFFFF
        (ack,) = self.bench.response(answer)
        ack = self.check(ack)
        assert self.bench.client(self.client_frame()) == []
        return syn, ack

    def ask(self, payload, flags="PA"):
        """A request, which must leave at once or be held; what left."""
        frame = self.client_frame(flags, payload)
        self.seq = self.seq + len(payload) + ("F" in flags) & 0xFFFFFFFF
        return [self.check(each) for each in self.bench.client(frame)]

    def answered_online(self, size):
        self.online_nxt = self.online_nxt + size & 0xFFFFFFFF

    def answer(self, payload, flags="PA", acked=None):
        """The target's answer; what leaves then."""
        frame = self.target_frame(flags, payload, acked=acked)
        self.rcv_nxt = self.rcv_nxt + len(payload) + ("F" in flags) & 0xFFFFFFFF
        return [self.check(each) for each in self.bench.response(frame)]

    def exchange(self, request, answer):
        """A request, its answer online, and the target's: one frame leaves."""
        (sent,) = self.ask(request)
        assert bytes(sent.payload) == request
        self.answered_online(len(answer))
        assert self.answer(answer) in ([], [bytes])
        return sent

    def state(self):
        """The kernel's session of this connection."""
        key = KEY.pack(
            mapped(OURS[self.family]), mapped(TARGET[self.family]), self.copy_port, TARGET_PORT
        )
        return next(each for each in self.bench.sessions()
                    if each.target == key and each.owner != abi.Owner.FREE)  # fmt: skip

    def check(self, frame):
        """Hold a frame to what every frame to the target must be; its TCP part."""
        return check_frame(frame, self.family)


def check_frame(frame, family, ours=None, target=None, link_header=None):
    """Lengths, checksums, addresses; the TCP layer."""
    ether = Ether(frame)
    assert frame[:12] == (link_header or LINK)
    ip = ether.payload
    if family == 4:
        assert type(ip) is IP and ip.ihl == 5 and ip.len == len(frame) - 14
        assert ones_sum(frame[14:34]) == 0xFFFF, "IP checksum"
        addresses, tcp_at = frame[26:34], 34
    else:
        assert type(ip) is IPv6 and ip.plen == len(frame) - 54
        addresses, tcp_at = frame[22:54], 54
    assert (ip.src, ip.dst) == (ours or OURS[family], target or TARGET[family])
    segment = frame[tcp_at:]
    pseudo = addresses + struct.pack("!II", len(segment), 6)
    assert ones_sum(pseudo + segment) == 0xFFFF, "TCP checksum"
    layer = ip.payload
    assert type(layer) is TCP and not layer.urgptr and not layer.reserved
    return layer


def ones_sum(data):
    """RFC 1071: 0xffff if the checksum within is right."""
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total
