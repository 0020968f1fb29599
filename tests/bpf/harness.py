"""The loaded programs as the tests see them: a frame in, records and counters out.

Every frame that goes through `Program.run` is checked for what must always hold: the
verdict, the bytes unchanged, the counters balanced.
"""

import ctypes
import ipaddress
import os
import struct
import subprocess
import time

from pycopy.kernel import abi, syscall
from pycopy.kernel.abi import CaptureCount, InterceptCount
from pycopy.kernel.attach import Hook
from pycopy.kernel.module import make_map
from pycopy.sources.live import Services
from pycopy.tap import Settings, Tap, Transport, load_tap
from pycopy.wire.segment import FIN, KEY, KIND_CLIENT, KIND_TARGET, RST, SYN
from tests.bpf.oracle import FRAGMENT, MALFORMED, TRUNCATED, WHOLE, look

RING_BYTES = 1 << 22

XDP_DROP, XDP_PASS = 1, 2
TC_CONTINUE, TC_SHOT = 0xFFFFFFFF, 2
CONTINUE = {"tc": TC_CONTINUE, "xdp": XDP_PASS}
SWALLOW = {"tc": TC_SHOT, "xdp": XDP_DROP}

#: BPF_PROG_TEST_RUN takes no less (Linux 6.18: the IP header must be there) and no more.
TC_MIN_BYTES, TC_MAX_BYTES, XDP_MIN_BYTES = {4: 34, 6: 54}, 3600, 14

#: One service on whatever port the packet is addressed to, and what the map has for each.
EVERY_PORT = "every port"
ANYBODYS_FIRST = struct.pack("=I", abi.PORT_ANYBODYS)


def heartbeat(beat_ns=(1 << 64) - 1):
    """A map that says when user space was heard of last; as it is: it always will have been."""
    fd = make_map("heartbeat")
    syscall.map_update(fd, bytes(4), beat_ns.to_bytes(8, "little"))
    return fd


def runnable(hook, frame):
    """Whether BPF_PROG_TEST_RUN accepts the frame at this hook."""
    if hook == "xdp":
        return XDP_MIN_BYTES <= len(frame) <= 70000
    family = {b"\x08\x00": 4, b"\x86\xdd": 6}.get(frame[12:14])
    return TC_MIN_BYTES.get(family, XDP_MIN_BYTES) <= len(frame) <= TC_MAX_BYTES


class Program:
    """One loaded program with its ring and its counters."""

    def __init__(
        self, role, hook, counts, *, ring_bytes=RING_BYTES, l2_bytes=14, kernel=None, perf=False,
        expression="", given=None, entries=None, beat_ns=(1 << 64) - 1, **settings,
    ):  # fmt: skip
        self.hook = hook
        self.kinds = counts
        self.beats = heartbeat(beat_ns)
        transport = Transport(ring_bytes, perf, {"heartbeat": self.beats})
        self.tap = load_tap(
            role, l2_bytes, Hook.XDP if hook == "xdp" else Hook.TC_INGRESS, transport,
            Settings(**settings), Tap, kernel and kernel.maps, expression=expression, given=given,
            entries=entries,
        )  # fmt: skip
        self.module, self.ring = self.tap.module, self.tap.ring
        self.maps = self.module.maps
        self.changed = {}

    def beat(self, beat_ns):
        syscall.map_update(self.beats, bytes(4), beat_ns.to_bytes(8, "little"))

    def close(self):
        self.tap.close()
        os.close(self.beats)

    def counts(self):
        return {kind: self.maps["counts"].sum_percpu(kind) for kind in self.kinds}

    def records(self):
        return list(self.ring.drain(1 << 20))

    def call(self, frame):
        """One run: the verdict. Bytes and balance are checked, `changed` is what was counted."""
        before = self.counts()
        result = syscall.test_run(self.module.program_fd, frame)
        assert result.data == frame, "the packet came back changed"
        after = self.counts()
        self.changed = {
            kind: after[kind] - before[kind] for kind in after if after[kind] != before[kind]
        }
        self.check_balance(after)
        return result.retval


class Capture(Program):
    def __init__(self, hook, *, services=(), forwarded=True, **more):
        """``services``: (address or None, port) each, or EVERY_PORT."""
        everywhere = services == EVERY_PORT
        maps = Services([] if everywhere else services, forwarded)
        for port in range(1 << 16) if everywhere else ():
            syscall.map_update(maps.given["service_ports"], struct.pack("=I", port), ANYBODYS_FIRST)
        super().__init__("capture", hook, CaptureCount, given=maps.given, **more)
        maps.close()

    @staticmethod
    def check_balance(counts):
        outcomes = sum(counts[kind] for kind in CaptureCount if kind > CaptureCount.EXTRA_PIECES)
        assert counts[CaptureCount.SELECTED] + counts[CaptureCount.EXTRA_PIECES] == outcomes

    def run(self, frame):
        """The records of one frame, which must pass."""
        assert self.call(frame) == CONTINUE[self.hook]
        return self.records()

    def one(self, frame):
        """The one record that the frame must make."""
        records = self.run(frame)
        assert len(records) == 1, f"{len(records)} records, counted {self.changed}"
        assert self.changed == {CaptureCount.SELECTED: 1, CaptureCount.CAPTURED: 1}
        return records[0]

    def fate(self, frame):
        """The one counter beside SELECTED that the frame went to, None if it was not selected."""
        self.run(frame)
        if not self.changed:
            return None
        assert self.changed.pop(CaptureCount.SELECTED) == 1
        ((kind, times),) = self.changed.items()
        assert times == 1
        return kind


class Intercept(Program):
    def __init__(self, hook, *, targets=None, ports=(0, 0), channel=0, **more):
        """``targets``: the zero-route mode, with these (address, port) each."""
        if targets is not None:
            more["entries"] = {"servers": max(len(targets), 1), "ours": 1 << 14}
        super().__init__(
            "intercept" if targets is None else "self", hook, InterceptCount,
            port_lo=ports[0], port_hi=ports[1], channel_port=channel, **more,
        )  # fmt: skip
        for target in targets or ():
            self.maps["servers"].update(abi.ENDPOINT.pack(*target), bytes(4))
        self.claimed = set()

    def own(self, client, server, client_port, server_port):
        """Self placement: that connection is a copy."""
        self.maps["ours"].update(KEY.pack(client, server, client_port, server_port), b"\1")

    @staticmethod
    def check_balance(counts):
        assert counts[InterceptCount.MATCHED] == sum(
            counts[kind] for kind in InterceptCount if kind
        )

    def claim(self, address, prefix_bits, value):
        key = abi.CLAIM_KEY.pack(prefix_bits, address)
        self.maps["claims"].update(key, struct.pack("=I", value))
        self.claimed.add(key)

    def unclaim(self):
        for key in self.claimed:
            self.maps["claims"].delete(key)
        self.claimed.clear()
        self.set_default(abi.PASS)

    def set_default(self, value):
        self.maps["claims_default"].update(bytes(4), struct.pack("=I", value))

    def run(self, frame):
        """(whether it was swallowed, the counter beside MATCHED or None, records)."""
        verdict = self.call(frame)
        assert verdict in (CONTINUE[self.hook], SWALLOW[self.hook])
        kind = None
        if self.changed:
            assert self.changed.pop(InterceptCount.MATCHED) == 1
            ((kind, times),) = self.changed.items()
            assert times == 1
        return verdict == SWALLOW[self.hook], kind, self.records()


def mapped(address):
    """The 16 bytes of an address given as text, IPv4-mapped for IPv4."""
    parsed = ipaddress.ip_address(address)
    return parsed.packed if parsed.version == 6 else bytes(10) + b"\xff\xff" + parsed.packed


def expected_fate(seen, ports=None):
    """capture.c's counter for what the oracle saw, no handshake being under way.

    `ports` are those of services at any address; None means all.
    """
    if seen.fate == FRAGMENT:
        return CaptureCount.FRAGMENT
    if not seen.flow or (ports is not None and seen.dport not in ports):
        return None
    if seen.fate != WHOLE:
        return {TRUNCATED: CaptureCount.TRUNCATED, MALFORMED: CaptureCount.MALFORMED}[seen.fate]
    wanted = seen.payload or seen.fields["tcp_flags"] & (SYN | FIN | RST)
    return CaptureCount.CAPTURED if wanted else CaptureCount.PURE_ACK


def check_record(record, frame, *, kind=KIND_CLIENT, service=0, l2_bytes=14):
    """Every field of a record against the oracle's reading of the frame."""
    segment, payload = record
    seen = look(frame, l2_bytes)
    assert seen.fate == WHOLE
    sides = [(seen.src, seen.sport), (seen.dst, seen.dport)]
    if kind == KIND_TARGET:
        sides.reverse()
    (client, client_port), (server, server_port) = sides
    got = segment._asdict()
    sack_words = struct.unpack("=8I", got.pop("sack"))
    blocks = got.pop("sack_blocks")
    assert sack_words[: 2 * blocks] == seen.fields["sack"]
    assert not any(sack_words[2 * blocks :])
    assert abs(time.monotonic_ns() - got.pop("time_ns")) < 60_000_000_000
    expected = {name: value for name, value in seen.fields.items() if name != "sack"}
    captured = seen.payload if kind == KIND_CLIENT else b""
    assert got == {
        **expected,
        "kind": kind,
        "service": service,
        "payload_bytes": len(captured),
        "key": KEY.pack(client, server, client_port, server_port),
    }
    assert payload == captured


_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000


class Namespaces:
    """Anonymous network namespaces, entered by this thread; gone when closed."""

    def __init__(self):
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        self._fds = []

    def new(self):
        """Make one and enter it; the descriptor names it for enter() and `ip`."""
        if _libc.unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        self._fds.append(fd)
        sh("sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0")
        sh("sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0")
        sh("ip link set lo up")
        return fd

    def enter(self, fd):
        if _libc.setns(fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")

    def close(self):
        self.enter(self._home)
        for fd in (*self._fds, self._home):
            os.close(fd)


def sh(command):
    subprocess.run(command.split(), check=True, stdin=subprocess.DEVNULL, timeout=20)


def wait_for(condition, seconds=10.0):
    """Poll until `condition()` is true; its value. An assertion error at the deadline."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return value
