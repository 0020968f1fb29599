"""capture.c: which ACKs without payload are wanted: the one that completes a handshake.

Its ack tells the session engine the online server's irs. All others say nothing that the
next data segment does not say as well.
"""

import pytest

from pycopy.kernel.abi import CaptureCount
from pycopy.wire.segment import ACK
from tests.bpf.frames import SYN_OPTIONS, TIMESTAMPS, tcp

CAPTURED, PURE_ACK = CaptureCount.CAPTURED, CaptureCount.PURE_ACK
ISS = 0xFFFFFFFF  # so that iss + 1 wraps


@pytest.fixture(params=["IPv4", "IPv6"])
def flow(request, port):
    """Frames of one flow: flow(flags, seq - iss, payload)."""

    def make(flags, offset, payload=b"", **more):
        seq = (ISS + offset) % 2**32
        return tcp(port, flags=flags, seq=seq, payload=payload, ip=request.param, **more)

    return make


def fates(capture, *frames):
    return [capture.fate(frame) for frame in frames]


def test_third_ack_once(capture, flow):
    capture.one(flow("S", 0, options=SYN_OPTIONS))
    segment, payload = capture.one(flow("A", 1, options=TIMESTAMPS, ack=777))
    assert (segment.tcp_flags, segment.seq, segment.ack, payload) == (ACK, 0, 777, b"")
    assert fates(capture, flow("A", 1), flow("A", 1), flow("A", 5)) == [PURE_ACK] * 3


def test_no_syn_seen(capture, flow):
    assert fates(capture, flow("A", 1), flow("A", 0), flow("", 1)) == [PURE_ACK] * 3


def test_syn_again(capture, flow):
    """A retransmitted SYN keeps the flow waiting, a new one with another iss starts anew."""
    assert fates(capture, flow("S", 0), flow("S", 0), flow("A", 1)) == [CAPTURED] * 3
    assert capture.fate(flow("A", 1)) is PURE_ACK
    assert fates(capture, flow("S", 0), flow("S", 1000)) == [CAPTURED] * 2
    assert fates(capture, flow("A", 1), flow("A", 1001)) == [PURE_ACK, CAPTURED]


def test_other_sequence_numbers(capture, flow):
    capture.one(flow("S", 0))
    assert fates(capture, *(flow("A", n) for n in (0, 2, 1000, -1, 2**31))) == [PURE_ACK] * 5
    assert capture.fate(flow("", 1)) is PURE_ACK
    assert capture.fate(flow("A", 1)) is CAPTURED


@pytest.mark.parametrize("flags, payload", [("PA", b"data"), ("FA", b""), ("RA", b""), ("R", b"")])
def test_what_ends_the_wait(capture, flow, flags, payload):
    assert fates(capture, flow("S", 0), flow(flags, 1, payload)) == [CAPTURED] * 2
    assert capture.fate(flow("A", 1)) is PURE_ACK


@pytest.mark.parametrize("covered", [0, 1, 5])
def test_syn_with_data(capture, flow, covered):
    """RFC 7413: the server may take none, some or all of the data in the SYN."""
    assert capture.fate(flow("S", 0, b"early")) is CAPTURED
    assert capture.fate(flow("A", 7)) is PURE_ACK
    assert capture.fate(flow("A", 1 + covered)) is CAPTURED
    assert capture.fate(flow("A", 1 + covered)) is PURE_ACK


def test_ecn_setup(capture, flow):
    assert fates(capture, flow("SEC", 0), flow("A", 1)) == [CAPTURED] * 2


def test_syn_ack_towards_the_service(capture, flow):
    """Simultaneous open or a scan: recorded, and no handshake that the client began."""
    assert fates(capture, flow("SA", 0), flow("A", 1)) == [CAPTURED, PURE_ACK]


def test_flows_do_not_mix(capture, port):
    def syn(sport, dport=80, ip="IPv4"):
        return tcp(sport, dport, "S", seq=5, ip=ip)

    def ack(sport, dport=80, ip="IPv4"):
        return tcp(sport, dport, "A", seq=6, ip=ip)

    other = port + 10000
    assert capture.fate(syn(port)) is CAPTURED
    others = (ack(other), ack(port, 8081), ack(port, ip="IPv6"))
    assert fates(capture, *others) == [PURE_ACK] * 3
    assert capture.fate(ack(port)) is CAPTURED


def test_data_is_never_an_idle_ack(capture, flow):
    """A keep-alive probe with its garbage byte, and data below what was seen, have payload."""
    assert fates(capture, flow("A", 0, b"\0"), flow("A", 1, b"\0")) == [CAPTURED] * 2


def test_table_is_bounded(capture):
    """More handshakes than fit: the latest are remembered, nothing fails."""
    entries = capture.maps["handshakes"].max_entries
    total = entries + 4096
    for number in range(total):
        capture.call(tcp_syn(number))
        if number % 1024 == 0:
            capture.records()
    capture.records()
    assert fates(capture, *(tcp_ack(total - 1 - n) for n in range(64))) == [CAPTURED] * 64
    assert capture.fate(tcp_ack(0)) is PURE_ACK


_SYN = bytearray(tcp(1, flags="S", seq=5))
_ACK = bytearray(tcp(1, flags="A", seq=6))


def tcp_syn(number):
    """Quicker than scapy: the number in the source address."""
    _SYN[26:30] = (0x0B000000 + number).to_bytes(4, "big")
    return bytes(_SYN)


def tcp_ack(number):
    _ACK[26:30] = (0x0B000000 + number).to_bytes(4, "big")
    return bytes(_ACK)
