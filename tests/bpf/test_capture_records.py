"""capture.c: every field of the records, for every kind of header in front of TCP."""

import itertools

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6

from pycopy.kernel.abi import CaptureCount
from tests.bpf.frames import (
    CLIENT,
    CLIENT6,
    HEADERS,
    LINKS,
    SYN_OPTIONS,
    TIMESTAMPS,
    big_tcp,
    padded,
    tcp,
)
from tests.bpf.harness import Capture, check_record


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("ip", HEADERS)
def test_headers(capture, port, ip, link):
    for payload in (b"x", b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 5):
        frame = tcp(port, payload=payload, ip=ip, link=link, options=TIMESTAMPS)
        check_record(capture.one(frame), frame)


@pytest.mark.parametrize(
    "flags", ["S", "SEC", "PA", "A", "FA", "FPA", "R", "RA", "U", "SFRPAUEC", "PAE", "PAC", ""]
)
def test_flags(capture, port, flags):
    frame = tcp(port, flags=flags, payload=b"data", seq=0xFFFFFFF0, ack=0x80000001, window=0xFFFE)
    check_record(capture.one(frame), frame)


SACK_EDGES = (0x01020304, 0x05060708, 0xFFFFFFF0, 0x10, 5, 6, 7, 0x80000000)


@pytest.mark.parametrize("flags", ["S", "PA"])
@pytest.mark.parametrize(
    "options",
    [
        [],
        SYN_OPTIONS,
        list(reversed(SYN_OPTIONS)),
        [("MSS", 0xFFFF)],
        [("WScale", 14)],
        [("WScale", 255)],
        [("SAckOK", b"")],
        TIMESTAMPS,
        [("Timestamp", (0xFFFFFFFF, 0x80000000))],
        *([("NOP", 0), ("NOP", 0), ("SAck", SACK_EDGES[: 2 * n])] for n in (1, 2, 3, 4)),
        [*TIMESTAMPS, ("NOP", 0), ("NOP", 0), ("SAck", SACK_EDGES[:6])],
        [("NOP", 0)] * 40,
        [("NOP", 0)] * 30 + [("Timestamp", (1, 2))],
        [("EOL", 0), ("MSS", 1)],
        [("MSS", 1460), ("EOL", 0), ("NOP", 0), ("WScale", 3)],
        [(254, b"experimental"), ("MSS", 1200)],
        [(34, b"cookie42"), ("WScale", 2)],
        [("SAck", ())],
        [(5, b"1234567"), ("MSS", 5)],
        [(2, b"123"), ("MSS", 1300)],
        [(3, b""), ("WScale", 1)],
        [(8, b"1234"), ("Timestamp", (7, 8))],
    ],
    ids=str,
)
def test_options(capture, port, options, flags):
    frame = tcp(port, flags=flags, payload=b"x", options=options)
    check_record(capture.one(frame), frame)


def test_syn_with_data(capture, port):
    frame = tcp(port, flags="S", payload=b"early data", options=[*SYN_OPTIONS, (34, b"12345678")])
    segment, payload = capture.one(frame)
    check_record((segment, payload), frame)
    assert (segment.seq, segment.seg_len, payload) == (1000, 10, b"early data")


@pytest.mark.parametrize("ip", ["IPv4", "IPv6"])
def test_padding_is_not_payload(capture, port, ip):
    for payload in (b"", b"1", b"12345"):
        frame = padded(tcp(port, flags="FPA", payload=payload, ip=ip), 100)
        segment, captured = capture.one(frame)
        assert (segment.seg_len, captured) == (len(payload), payload)
        check_record((segment, captured), frame)
    assert capture.fate(padded(tcp(port, flags="A", ip=ip), 100)) is CaptureCount.PURE_ACK


def test_every_payload_length(capture, port):
    """0 to past two classes of record, each byte in its place."""
    material = bytes(i * 7 + 3 & 0xFF for i in range(3500))
    lengths = [*range(1, 300), *range(1500, 1600, 3), 2048, 3333]
    for length in lengths:
        frame = tcp(port, payload=material[-length:])
        assert capture.one(frame)[1] == material[-length:]


PIECE = 16384
SUPER_LENGTHS = [4095, 4096, 4097, 16383, 16384, 16385, 20000, 32768, 32769, 49152, 60000, 65483]


@pytest.fixture(scope="module")
def multi_buffer():
    """XDP only: BPF_PROG_TEST_RUN makes no super-segments at TC. test_live.py sends real ones."""
    program = Capture("xdp", services=[(None, 80)])
    try:
        program.call(tcp(dport=9, payload=bytes(70000 - 54), ip=IP(len=0)))
    except OSError as error:
        pytest.skip(f"BPF_PROG_TEST_RUN takes no multi-buffer XDP frame here: {error}")
    yield program
    program.close()


@pytest.mark.parametrize("length", SUPER_LENGTHS)
@pytest.mark.parametrize("ip", ["IPv4", "IPv6"])
def test_super_segments(multi_buffer, port, ip, length):
    payload = b"".join(i.to_bytes(4, "big") for i in range(16384))[:length]
    frame = tcp(port, flags="FPA", payload=payload, ip=ip, options=TIMESTAMPS)
    check_pieces(multi_buffer.run(frame), payload, "FPA")
    pieces = -(-length // PIECE)
    expected = {CaptureCount.SELECTED: 1, CaptureCount.CAPTURED: pieces}
    if pieces > 1:
        expected[CaptureCount.EXTRA_PIECES] = pieces - 1
    assert multi_buffer.changed == expected


def check_pieces(records, payload, flags, seq=1000):
    """Cut at PIECE bytes, each with its own seq; FIN and PSH on the last only."""
    last_only = 1 | 8
    final = sum({"F": 1, "P": 8, "A": 16}[letter] for letter in flags)
    assert b"".join(piece for _, piece in records) == payload
    at = 0
    for number, (segment, piece) in enumerate(records, 1):
        is_last = number == len(records)
        assert segment.seg_len == segment.payload_bytes == len(piece)
        assert is_last or len(piece) == PIECE
        assert segment.seq == (seq + at) % 2**32
        assert segment.tcp_flags == (final if is_last else final & ~last_only)
        at += len(piece)


def test_super_segment_whose_seq_wraps(multi_buffer, port):
    frame = tcp(port, flags="PA", payload=bytes(40000), seq=0xFFFFF000)
    check_pieces(multi_buffer.run(frame), bytes(40000), "PA", seq=0xFFFFF000)


def test_super_segment_with_syn(multi_buffer, port):
    """Nobody sends one; still the SYN takes a number and is told once."""
    (first, _), (second, _) = multi_buffer.run(tcp(port, flags="S", payload=bytes(20000)))
    assert (first.tcp_flags, first.seq, first.seg_len) == (2, 1000, PIECE)
    assert (second.tcp_flags, second.seq) == (0, 1001 + PIECE)


@pytest.mark.parametrize("ip", ["IPv4", "IPv6", "IPv6 hop-by-hop"])
def test_longer_than_a_length_field(multi_buffer, port, ip):
    """BIG TCP and jumbograms state 0."""
    payload = bytes(range(256)) * 256
    frame = big_tcp(tcp(port, ip=ip)) + payload
    check_pieces(multi_buffer.run(frame), payload, "PA")


def test_what_xdp_cannot_read(multi_buffer, port):
    """The kernel's bpf_xdp_load_bytes() stops at an offset of 64 KB: lost, and counted."""
    payload = bytes(range(256)) * 260
    records = multi_buffer.run(big_tcp(tcp(port)) + payload)
    assert b"".join(piece for _, piece in records) == payload[: 4 * PIECE]
    assert multi_buffer.changed == {
        CaptureCount.SELECTED: 1,
        CaptureCount.EXTRA_PIECES: 4,
        CaptureCount.CAPTURED: 4,
        CaptureCount.TRUNCATED: 1,
    }


@pytest.mark.parametrize("ip", ["IPv4", "IPv6", "IPv6 hop-by-hop"])
def test_no_length_in_a_short_frame(capture, port, ip):
    assert capture.fate(big_tcp(tcp(port, payload=b"x" * 100, ip=ip))) is None


def test_services(capture, port):
    """The first -x entry that fits, by address and port; anything else is not even counted."""
    six = {"ip": IPv6(src=CLIENT6, dst="fd00::1")}
    other = {"ip": IP(src=CLIENT, dst="10.0.0.2")}
    other_six = {"ip": IPv6(src=CLIENT6, dst="fd00::2")}
    expected = [
        (80, {}, 0),
        (80, six, 0),
        (80, other, 0),
        (80, other_six, 0),
        (8080, {}, 1),
        (8080, six, 2),
        (8080, other, None),
        (8080, other_six, None),
        (8081, other, 3),
        (8082, {}, None),
        (0, {}, None),
    ]
    for dport, more, service in expected:
        frame = tcp(port, dport, payload=b"x", **more)
        if service is None:
            assert capture.fate(frame) is None
            assert capture.records() == []
        else:
            check_record(capture.one(frame), frame, service=service)


def test_what_the_server_sends_is_not_copied(capture, port):
    frame = tcp(80, port, payload=b"x", ip=IP(src="10.0.0.1", dst=CLIENT))
    assert capture.fate(frame) is None


def test_many_services(hook):
    services = [(None, port) for port in range(1, 65)]
    program = Capture(hook, services=services)
    for index in (0, 1, 31, 63):
        frame = tcp(dport=index + 1, payload=b"x")
        check_record(program.one(frame), frame, service=index)
    assert program.fate(tcp(dport=65, payload=b"x")) is None
    program.close()


def test_filter(hook, port):
    program = Capture(hook, services=[(None, 80)], expression="src net 192.0.2.0/24 and not ip6")
    assert program.fate(tcp(port, payload=b"x")) is CaptureCount.CAPTURED
    assert program.fate(tcp(port, payload=b"x", link="802.1Q")) is CaptureCount.CAPTURED
    assert program.fate(tcp(port, payload=b"x", ip="IPv6")) is CaptureCount.FILTERED
    far = IP(src="198.51.100.1", dst="10.0.0.1")
    assert program.fate(tcp(port, payload=b"x", ip=far)) is CaptureCount.FILTERED
    assert program.fate(tcp(port, 81, payload=b"x", ip=far)) is None
    # A SYN that the user does not want begins no handshake.
    assert program.fate(tcp(port, flags="S", ip=far)) is CaptureCount.FILTERED
    assert program.fate(tcp(port, flags="A", seq=1001, ip=far)) is CaptureCount.FILTERED
    program.close()


def test_filter_on_payload(hook, port):
    program = Capture(
        hook, services=[(None, 80)], expression="tcp[((tcp[12] & 0xf0) >> 2):4] = 0x47455420"
    )
    for options in ([], TIMESTAMPS):
        get = tcp(port, payload=b"GET / HTTP/1.0\r\n\r\n", options=options)
        post = tcp(port, payload=b"POST / HTTP/1.0\r\n\r\n", options=options)
        assert program.fate(get) is CaptureCount.CAPTURED
        assert program.fate(post) is CaptureCount.FILTERED
    program.close()


def test_ring_full(hook, port):
    """Every lost record is counted, whatever part of a segment it was; the rest goes on."""
    program = Capture(hook, services=[(None, 80)], ring_bytes=4096)
    outcomes = []
    for number in range(5):
        program.call(tcp(port, payload=b"x" * 1300, seq=number))
        outcomes.append(program.changed)
    taken = {CaptureCount.SELECTED: 1, CaptureCount.CAPTURED: 1}
    lost = {CaptureCount.SELECTED: 1, CaptureCount.RING_FULL: 1}
    assert outcomes == [taken, taken, lost, lost, lost]
    # A smaller record still fits into what is left.
    program.call(tcp(port, flags="FA"))
    assert program.changed == taken
    assert [segment.seq for segment, _ in program.records()] == [0, 1, 1000]
    program.call(tcp(port, payload=b"x"))
    assert program.changed == taken
    program.close()


def test_ring_full_in_the_middle_of_a_super_segment(multi_buffer, port):
    program = Capture("xdp", services=[(None, 80)], ring_bytes=32768)
    program.call(tcp(port, payload=bytes(60000)))
    assert program.changed == {
        CaptureCount.SELECTED: 1,
        CaptureCount.EXTRA_PIECES: 3,
        CaptureCount.CAPTURED: 2,
        CaptureCount.RING_FULL: 2,
    }
    # The last piece is smaller: it fits into what is left.
    assert [segment.seq for segment, _ in program.records()] == [1000, 1000 + 3 * 16384]
    program.close()


def test_many_records_through_a_small_ring(hook, port):
    """The ring wraps many times; nothing is lost as long as it is drained."""
    program = Capture(hook, services=[(None, 80)], ring_bytes=8192)
    for number, length in zip(range(400), itertools.cycle((1, 200, 300, 1500, 0)), strict=False):
        payload = bytes([number & 0xFF]) * length
        frame = tcp(port, flags="PA" if length else "FA", payload=payload, seq=number)
        check_record(program.one(frame), frame)
    program.close()
