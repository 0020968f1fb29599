"""The same packets through libpcap's interpreter and through our C in the kernel: one verdict."""

import ctypes
import os
import random
import socket
import struct
import subprocess
import threading

import pytest

from pycopy import link
from pycopy.loader import Hook, attach, load
from pycopy.pcapfilter import compile_filter, matches

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
    "udp or icmp",
    "dst net 10.0.0.0/8 and not (tcp src portrange 1-1023)",
    "not tcp",
]

#: Without a link header (PYCOPY_L2_BYTES 0) there is no Ethernet to ask about.
L3_EXPRESSIONS = [each for each in EXPRESSIONS if "ether" not in each]

PROGRAM = """
BPF_PERCPU_ARRAY(counts, u64, 1);
int pycopy_verdict(PYCOPY_CTX *ctx)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	u32 zero = 0;
	u64 *wanted = counts.lookup(&zero);
	int verdict = pycopy_filter(ctx, data, data_end, LEN);

	if (verdict && wanted)
		*wanted += 1;
#if PYCOPY_HOOK_XDP
	return verdict ? XDP_PASS : XDP_DROP;
#else
	return LIVE ? -1 : verdict;
#endif
}
"""


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


def loaded(tmp_path, expression, l2_bytes, xdp, live=0):
    source = tmp_path / "verdict.c"
    source.write_text(PROGRAM)
    defines = {
        "PYCOPY_HOOK_XDP": int(xdp),
        "LEN": "data_end - data" if xdp else "ctx->len",
        "LIVE": live,
    }
    return load(str(source), defines=defines, prelude=compile_filter(expression, l2_bytes))


def mismatches(module, expression, inputs, l2_bytes, xdp):
    """Inputs on which kernel and libpcap differ; those it cannot run (EINVAL) do not count."""
    wrong, wanted, run = [], 0, 0
    for packet in inputs:
        try:
            retval = link.test_run(module.program_fd, packet).retval
        except OSError:
            continue  # too short for the kernel's own test harness
        run += 1
        verdict = retval == (2 if xdp else 1)
        wanted += verdict
        if verdict != matches(expression, packet, l2_bytes):
            wrong.append(packet.hex())
    assert run > 0.9 * len(inputs)
    assert 0 < wanted < run, "an expression that tells nothing apart tests nothing"
    return wrong


@pytest.mark.parametrize("xdp", [False, True], ids=["tc", "xdp"])
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_frames(packets, tmp_path, expression, xdp):
    module = loaded(tmp_path, expression, 14, xdp)
    inputs = [frame(packet) for packet in packets]
    assert mismatches(module, expression, inputs, 14, xdp) == []
    module.close()


@pytest.mark.parametrize("expression", L3_EXPRESSIONS[:4] + L3_EXPRESSIONS[-6:])
def test_datagrams(packets, tmp_path, expression):
    module = loaded(tmp_path, expression, 0, False)
    assert mismatches(module, expression, packets, 0, False) == []
    module.close()


@pytest.mark.parametrize("xdp", [False, True], ids=["tc", "xdp"])
def test_tags_make_no_difference(packets, tmp_path, xdp):
    expression = "tcp dst port 80 and greater 60 and ether[0] = 2"
    module = loaded(tmp_path, expression, 14, xdp)
    for tags in (b"\x81\0\0\x64", b"\x88\xa8\0\1\x81\0\0\2"):
        inputs = [frame(packet, tags) for packet in packets]
        assert mismatches(module, expression, inputs, 14, xdp) == []
        for packet, tagged in zip(packets, inputs, strict=True):
            assert matches(expression, tagged, 14) == matches(expression, frame(packet), 14)
    module.close()


@pytest.mark.parametrize("xdp", [False, True], ids=["tc", "xdp"])
def test_no_expression_wants_everything(packets, tmp_path, xdp):
    module = loaded(tmp_path, "", 14, xdp)
    wanted = 2 if xdp else 1
    inputs = [frame(packet) for packet in packets if len(packet) > 40][:50]
    assert all(link.test_run(module.program_fd, each).retval == wanted for each in inputs)
    module.close()


def test_a_long_expression(packets, tmp_path):
    """Hundreds of addresses: long jumps, and a text that clang has to get through."""
    hosts = " or ".join(f"10.{index // 256}.{index % 256}.1" for index in range(300))
    expression = f"tcp and dst host ({hosts})"
    module = loaded(tmp_path, expression, 14, False)
    inputs = [frame(packet) for packet in packets]
    assert mismatches(module, expression, inputs, 14, False) == []
    module.close()


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


def test_payload_beyond_the_linear_part(loopback, tmp_path):
    """A super-segment's payload lies in page fragments, which data..data_end does not reach."""
    expression = "tcp and tcp[((tcp[12] & 0xf0) >> 2):4] = 0x47455420 and greater 20000"
    module = loaded(tmp_path, expression, 14, False, live=1)
    attachment = attach(module, loopback, Hook.TC_INGRESS)
    sent = b"GET " * 50_000
    received = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def receive():
            connection, _ = server.accept()
            with connection:
                while part := connection.recv(1 << 16):
                    received.extend(part)

        reader = threading.Thread(target=receive)
        reader.start()
        with socket.create_connection(server.getsockname()) as client:
            client.sendall(sent)
        reader.join(10)
    assert bytes(received) == sent
    assert module.maps["counts"].sum_percpu(0) > 0
    attachment.close()
    module.close()
