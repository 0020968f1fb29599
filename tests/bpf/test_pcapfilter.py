"""The same packets through libpcap's interpreter and our code in the kernel: one verdict."""

import contextlib
import ctypes
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from typing import NamedTuple

import hypothesis
import pytest
from hypothesis import strategies as st

from pycopy.errors import UsageError
from pycopy.kernel import bpfasm, syscall
from pycopy.kernel.attach import Hook, attach
from pycopy.kernel.bpfasm import Assembler, Label, Register
from pycopy.kernel.pcapfilter import filter_code, matches

#: From the examples of pcap-filter(7) and of tcpdump(8), and the hard corners of each construct.
EXPRESSIONS = [
    "tcp dst port 80",
    "tcp dst port 80 or tcp dst port 8080 or tcp dst port 443",
    "tcp and dst host 10.0.0.1 and dst port 80 and not src net 192.168.0.0/16",
    "host 10.0.0.1 and (10.0.0.2 or 192.168.3.4)",
    "tcp[tcpflags] & (tcp-syn|tcp-fin) != 0 and not src and dst net 10.0.0.0/8",
    "tcp port 80 and (((ip[2:2] - ((ip[0]&0xf)<<2)) - ((tcp[12]&0xf0)>>2)) != 0)",
    "tcp[((tcp[12] & 0xf0) >> 2):4] = 0x47455420",
    "ip6 and tcp dst port 80",
    "ip6 and src net 2001:db8::/32",
    "tcp portrange 8000-9000 and less 600",
    "greater 400 or ip[0] & 0xf != 5",
    "ether[0] & 1 = 0 and ip[16] >= 10",
    "ip proto \\tcp and tcp[0:2] > 1024",
    "tcp[13] / (tcp[12] >> 4) > 1 or tcp[4:4] % (ip[8] - 64) = 3",
    "ip[6:2] & 0x1fff != 0",
    "tcp[tcp[4:4]] > 1 or tcp[60] > 5",
    "tcp[2:2] << (tcp[13] & 63) > 100 and ip[8] * 3 ^ 1 != 0",
    "ip[ip[8] - 64] < 256",
    "ip[0] / (ip[8] - 64) = 0",
    "ip[0] % (ip[8] - 64) != 3",
    "ip[0] << (ip[8] - 32) = 0",
    "ip[8] >> (ip[8] - 32) = 0",
    "udp or icmp",
    "dst net 10.0.0.0/8 and not (tcp src portrange 1-1023)",
    "not tcp",
]

#: Without a link header (PYCOPY_L2_BYTES 0) there is no Ethernet to ask about.
L3_EXPRESSIONS = [each for each in EXPRESSIONS if "ether" not in each]

SCHED_CLS, XDP = 3, 6
CALL, CALL_FUNCTION, LOAD_MAP, ATOMIC_ADD = 0x85, 1, 1, 0xDB
MAP_LOOKUP, GET_BUFF_LEN = 1, 188
TC_ACT_UNSPEC = -1


@pytest.fixture(scope="module")
def packets():
    """Datagrams of all kinds, some damaged: a fixed seed, so that a failure comes again."""
    dice = random.Random(9293)
    return [damaged(dice, datagram(dice)) for _ in range(400)]


def datagram(dice):
    payload = dice.choice([b"", b"GET / HTTP/1.1\r\n", b"z" * 700])
    protocol = dice.choice([6, 6, 6, 6, 17, 1])
    ports = struct.pack(
        "!HH", dice.randrange(65536), dice.choice([22, 80, 81, 443, 8080, 8500, 33024])
    )
    if protocol == 6:
        options = dice.choice([b"", b"\x01\x01\x08\x0a" + bytes(8)])
        flags = dice.choice([2, 4, 0x10, 0x11, 0x12, 0x18])
        seq = dice.choice([dice.randrange(40), dice.randrange(1 << 32)])
        numbers = struct.pack("!II", seq, dice.randrange(1 << 32))
        offset = (20 + len(options)) // 4 << 4
        segment = ports + numbers + struct.pack("!BBHHH", offset, flags, 500, 0, 0) + options
    else:
        segment = ports + struct.pack("!HH", 8 + len(payload), 0)
    segment += payload
    if dice.random() < 0.3:
        hosts = [socket.inet_pton(socket.AF_INET6, each) for each in ("2001:db8::1", "fe80::7")]
        source, target = dice.choice(hosts), dice.choice(hosts)
        return struct.pack("!IHBB", 6 << 28, len(segment), protocol, 64) + source + target + segment
    source = socket.inet_aton(dice.choice(["10.0.0.2", "192.168.3.4", "10.9.1.1"]))
    target = socket.inet_aton(dice.choice(["10.0.0.1", "10.0.0.9", "192.168.3.4"]))
    options = dice.choice([b"", b"", b"\x01" * 8])
    total = 20 + len(options) + len(segment)
    fragment = dice.choice([0, 0, 0, 0x4000, 0x2000, 0x2010])
    head = (0x40 | 5 + len(options) // 4, 0, total, 1, fragment, dice.choice([63, 64, 255]))
    return struct.pack("!BBHHHBBH4s4s", *head, protocol, 0, source, target) + options + segment


def damaged(dice, packet):
    """Mostly not; else cut short, or with a byte changed."""
    harm = dice.random()
    if harm < 0.1:
        return packet[: dice.randrange(24, len(packet))]
    if harm < 0.2:
        at = dice.randrange(len(packet))
        return packet[:at] + bytes([dice.randrange(256)]) + packet[at + 1 :]
    return packet


def frame(packet, tags=b""):
    return bytes(range(2, 14)) + tags + (b"\x86\xdd" if packet[0] >> 4 == 6 else b"\x08\0") + packet


class Program(NamedTuple):
    """A loaded one, as attach() wants it."""

    program_fd: int
    program_name: str
    hook_xdp: bool


@contextlib.contextmanager
def loaded(expression, l2_bytes, xdp, counts_fd=None):
    """A program around the filter: it returns the verdict, or (counts_fd) counts the wanted."""
    code = filter_code(expression, l2_bytes, xdp)
    fd = syscall.program_load(
        XDP if xdp else SCHED_CLS, "verdict", around(code, xdp, counts_fd), "GPL"
    )
    try:
        yield Program(fd, "verdict", xdp)
    finally:
        os.close(fd)


def around(code, xdp, counts_fd):
    head, body = Assembler(), Assembler()
    head.alu64(bpfasm.MOV, Register.R6, Register.R1)
    if xdp:
        head.call(GET_BUFF_LEN)
        head.alu(bpfasm.MOV, Register.R2, Register.R0)
        head.alu64(bpfasm.MOV, Register.R1, Register.R6)
    else:
        head.load(bpfasm.W, Register.R2, Register.R1, 0)
    if counts_fd is not None:
        count(body, counts_fd)
    body.exit()
    # The function stands behind the rest: the call's distance is that of what is between.
    distance = len(body.code()) // bpfasm.INSTRUCTION.size
    head.emit(CALL, source=CALL_FUNCTION, constant=distance)
    return head.code() + body.code() + code


def count(body, counts_fd):
    done = Label()
    body.jump_if(bpfasm.JEQ, Register.R0, 0, done)
    body.store(bpfasm.W, Register.R10, -4, 0)
    body.emit(0x18, Register.R1, LOAD_MAP, constant=counts_fd)
    body.emit(0)
    body.alu64(bpfasm.MOV, Register.R2, Register.R10)
    body.alu64(bpfasm.ADD, Register.R2, -4)
    body.call(MAP_LOOKUP)
    body.jump_if(bpfasm.JEQ, Register.R0, 0, done)
    body.alu(bpfasm.MOV, Register.R1, 1)
    body.emit(ATOMIC_ADD, Register.R0, Register.R1)
    body.place(done)
    body.alu64(bpfasm.MOV, Register.R0, TC_ACT_UNSPEC)


def verdicts(program, expression, inputs, l2_bytes):
    """(kernel's, libpcap's, packet) for every input but those the kernel cannot run (EINVAL)."""
    for packet in inputs:
        try:
            verdict = syscall.test_run(program.program_fd, packet).retval
        except OSError:
            continue  # too short for the kernel's own test harness
        yield verdict, int(matches(expression, packet, l2_bytes)), packet


def check(expression, inputs, l2_bytes, xdp):
    with loaded(expression, l2_bytes, xdp) as program:
        found = list(verdicts(program, expression, inputs, l2_bytes))
    assert [packet.hex() for ours, libpcaps, packet in found if ours != libpcaps] == []
    assert len(found) > 0.9 * len(inputs)
    wanted = sum(ours for ours, _, _ in found)
    assert 0 < wanted < len(found), "an expression that tells nothing apart tests nothing"


@pytest.mark.parametrize("xdp", [False, True], ids=["tc", "xdp"])
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_frames(packets, expression, xdp):
    check(expression, [frame(packet) for packet in packets], 14, xdp)


@pytest.mark.parametrize("expression", L3_EXPRESSIONS)
def test_datagrams(packets, expression):
    check(expression, packets, 0, False)


@pytest.mark.parametrize("xdp", [False, True], ids=["tc", "xdp"])
@pytest.mark.parametrize(
    "expression",
    [
        "tcp dst port 80 and greater 60 and ether[0] = 2",
        "ether[10:4] = 0x0c0d0800",
        "ether[ip[8] - 55:2] != 0x0b0c",
        "ether[(ip[8] & 1) + 10:4] = 0x0c0d0800",
    ],
)
def test_tags_make_no_difference(packets, expression, xdp):
    for tags in (b"\x81\0\0\x64", b"\x88\xa8\0\1\x81\0\0\2"):
        inputs = [frame(packet, tags) for packet in packets]
        check(expression, inputs, 14, xdp)
        for packet, tagged in zip(packets, inputs, strict=True):
            assert matches(expression, tagged, 14) == matches(expression, frame(packet), 14)


def test_a_long_expression(packets):
    """Hundreds of addresses: long jumps."""
    hosts = " or ".join(f"10.{index // 256}.{index % 256}.1" for index in range(300))
    check(f"tcp and dst host ({hosts})", [frame(packet) for packet in packets], 14, False)


def test_an_expression_that_accepts_everything(packets):
    with loaded("ip or not ip", 14, False) as program:
        assert syscall.test_run(program.program_fd, frame(packets[0])).retval == 1


# -- random expressions --------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(0, 70),
    st.sampled_from([80, 255, 1024, 33024, 65535, 65536, 1 << 31, (1 << 31) - 1, (1 << 32) - 1]),
)
HOSTS = st.sampled_from(
    ["host 10.0.0.1", "host 2001:db8::1", "net 10.0.0.0/8", "net 192.168.0.0/16",
     "net 2001:db8::/32", "port 80", "port 33024", "portrange 22-443"]
)  # fmt: skip


def accesses(headers, numbers):
    """``tcp[2:4]``: with any number in the brackets."""
    return st.builds("{}[{}:{}]".format, headers, numbers, st.sampled_from([1, 2, 4]))


def numbers(headers):
    operators = st.sampled_from("+ - * / % & | ^ << >>".split())
    leaves = st.one_of(
        NUMBERS.map(str), st.just("len"), accesses(headers, st.integers(0, 60)),
        accesses(headers, NUMBERS),
    )  # fmt: skip
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds("({} {} {})".format, inner, operators, inner),
            st.builds("(- {})".format, inner),
            accesses(headers, inner),
        ),
        max_leaves=6,
    )


def expressions(l2_bytes):
    names = ["ip", "tcp", "udp", "ip6", "icmp"] + ["ether"] * bool(l2_bytes)
    of_header = numbers(st.sampled_from(names))
    comparisons = st.sampled_from("= != > < >= <=".split())
    primitives = st.one_of(
        st.sampled_from(["ip", "ip6", "tcp", "udp", "icmp", "ip proto 6", "ip6 proto 17"]),
        st.builds("{} {}".format, st.sampled_from(["src", "dst", "src or dst"]), HOSTS),
        st.builds("{} {}".format, st.sampled_from(["less", "greater"]), st.integers(20, 800)),
        st.builds("{} {} {}".format, of_header, comparisons, of_header),
        st.builds("{} {} {}".format, of_header, comparisons, of_header),
    )
    return st.recursive(
        primitives,
        lambda inner: st.one_of(
            st.builds("({} and {})".format, inner, inner),
            st.builds("({} or {})".format, inner, inner),
            st.builds("(not {})".format, inner),
        ),
        max_leaves=4,
    )


def random_inputs(dice, l2_bytes):
    """Packets of all kinds, tagged or not, whole or not; some are noise."""
    tags = dice.choice([b"", b"\x81\0\0\x64", b"\x88\xa8\0\1", b"\x81\0\0\1\x88\xa8\0\2"])
    packet = datagram(dice)
    if not l2_bytes:
        tags = b""
    else:
        packet = frame(packet, tags)
    if dice.random() < 0.1:
        packet = packet[: 14 + len(tags)] + dice.randbytes(len(packet) - 14 - len(tags))
    if dice.random() < 0.3:
        # Not within a tag: what would be left has no length without it.
        packet = packet[: dice.randrange(14 + len(tags), len(packet) + 1)]
    return packet


@pytest.mark.parametrize(
    ("l2_bytes", "xdp"), [(14, False), (14, True), (0, False)], ids=["tc", "xdp", "datagrams"]
)
def test_random_expressions(l2_bytes, xdp):
    counts = Counter()

    @hypothesis.settings(max_examples=150)
    @hypothesis.given(expression=expressions(l2_bytes), seed=st.integers(0, 1 << 32))
    def compare(expression, seed):
        dice = random.Random(seed)
        inputs = [random_inputs(dice, l2_bytes) for _ in range(25)]
        try:
            with loaded(expression, l2_bytes, xdp) as program:
                found = list(verdicts(program, expression, inputs, l2_bytes))
        except UsageError:
            return  # such as "expression rejects all packets"
        for ours, libpcaps, packet in found:
            counts[ours] += 1
            assert ours == libpcaps, packet.hex()

    compare()
    assert counts.total() > 1000
    assert min(counts[0], counts[1]) > counts.total() / 20


@pytest.fixture
def loopback():
    """A namespace of our own, with nothing but loopback in it."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/self/ns/net", os.O_RDONLY)
    assert libc.unshare(0x40000000) == 0
    try:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        yield "lo"
    finally:
        assert libc.setns(before, 0x40000000) == 0
        os.close(before)


def test_payload_beyond_the_linear_part(loopback):
    """A super-segment's payload lies in page fragments, which data..data_end does not reach."""
    expression = "tcp and tcp[((tcp[12] & 0xf0) >> 2):4] = 0x47455420 and greater 20000"
    counts_fd = syscall.map_create(syscall.ARRAY, "counts", 4, 8, 1)
    sent = b"GET " * 50_000
    received = bytearray()

    def receive(server):
        connection, _ = server.accept()
        with connection:
            while part := connection.recv(1 << 16):
                received.extend(part)

    with loaded(expression, 14, False, counts_fd) as program:
        attachment = attach(program, loopback, Hook.TC_INGRESS)
        with socket.create_server(("127.0.0.1", 0)) as server:
            reader = threading.Thread(target=receive, args=(server,))
            reader.start()
            with socket.create_connection(server.getsockname()) as client:
                client.sendall(sent)
            reader.join(10)
        attachment.close()
    assert bytes(received) == sent
    assert int.from_bytes(syscall.map_lookup(counts_fd, bytes(4), 8), sys.byteorder) > 0
    os.close(counts_fd)
