"""Headers against scapy's reading of them and against checksums computed the long way."""

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pycopy.wire import headers
from pycopy.wire.segment import ACK, FIN, PSH, RST, SYN

scapy_all = pytest.importorskip("scapy.all")

MAPPED = bytes(10) + b"\xff\xff"
MACS = bytes.fromhex("020000000102020000000101")
L2 = {4: MACS + b"\x08\x00", 6: MACS + b"\x86\xdd"}
GARBAGE = b"\xa5" * 160
VNET = struct.Struct("=BBHHHH")

u16 = st.integers(0, 0xFFFF)
u32 = st.integers(0, 0xFFFFFFFF)
flags = st.sampled_from([SYN, ACK, ACK | PSH, FIN | ACK, RST])


def fold(data):
    """RFC 1071, digit by digit."""
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def flow_of(family, source=b"\x0a\x58\x00\x05", destination=b"\x0a\x4d\x00\x02", ports=(4242, 80)):
    if family == 6:
        source = bytes.fromhex("fd88") + bytes(13) + source[-1:]
        destination = bytes.fromhex("fd77") + bytes(13) + destination[-1:]
    else:
        source, destination = MAPPED + source, MAPPED + destination
    return headers.Flow(family, source, destination, *ports)


def write(flow, options=b"", payload=b"", mss=1448, l2=None, seq=1, ack=2, bits=ACK, wnd=3):
    buffer = bytearray(GARBAGE)
    l2 = L2[flow.family] if l2 is None else l2
    end = headers.write_frame(buffer, flow, l2, seq, ack, bits, wnd, options, len(payload), mss)
    assert end <= headers.HEADER_BYTES_MAX
    assert bytes(buffer[headers.HEADER_BYTES_MAX :]) == GARBAGE[headers.HEADER_BYTES_MAX :]
    return bytes(buffer[:10]), bytes(buffer[10:end])


def complete(vnet, frame, payload):
    """Finish the checksum as a device does: sum from csum_start, store at csum_offset."""
    _, _, _, _, start, offset = VNET.unpack(vnet)
    whole = bytearray(frame + payload)
    struct.pack_into("!H", whole, start + offset, ~fold(bytes(whole[start:])) & 0xFFFF or 0xFFFF)
    return bytes(whole)


def tcp_sum_is_right(packet, family):
    if family == 4:
        assert fold(packet[:20]) == 0xFFFF, "IPv4 header checksum"
        segment, addresses = packet[20:], packet[12:20]
    else:
        segment, addresses = packet[40:], packet[8:40]
    return fold(addresses + struct.pack("!II", 6, len(segment)) + segment) == 0xFFFF


@pytest.mark.parametrize("family", [4, 6])
@given(
    u32,
    u32,
    flags,
    u16,
    st.binary(max_size=200),
    st.integers(0, 10),
    u16,
    u16,
    st.binary(min_size=1, max_size=1),
)
def test_every_field_is_read_back(family, seq, ack, bits, wnd, payload, words, sport, dport, last):
    flow = flow_of(family, source=b"\x0a\x58\x00" + last, ports=(sport, dport))
    options = b"\x01" * 4 * words
    vnet, frame = write(flow, options, payload, seq=seq, ack=ack, bits=bits, wnd=wnd)
    ip_bytes = 20 if family == 4 else 40
    assert VNET.unpack(vnet) == (1, 0, 34 + len(options) + ip_bytes, 0, 14 + ip_bytes, 16)
    assert frame[:14] == L2[family]
    whole = complete(vnet, frame, payload)
    assert tcp_sum_is_right(whole[14:], family)
    packet = scapy_all.Ether(whole)
    ip = packet[scapy_all.IP if family == 4 else scapy_all.IPv6]
    assert (ip.version, ip.src, ip.dst) == (
        family,
        socket.inet_ntop(
            socket.AF_INET if family == 4 else socket.AF_INET6,
            flow.source[-4 if family == 4 else 0 :],
        ),
        socket.inet_ntop(
            socket.AF_INET if family == 4 else socket.AF_INET6,
            flow.destination[-4 if family == 4 else 0 :],
        ),
    )
    if family == 4:
        assert (ip.ihl, ip.tos, ip.len, int(ip.flags), ip.frag, ip.ttl, ip.proto) == (
            5, 0, 40 + len(options) + len(payload), 2, 0, 64, 6,
        )  # fmt: skip
    else:
        assert (ip.tc, ip.fl, ip.plen, ip.nh, ip.hlim) == (
            0, 0, 20 + len(options) + len(payload), 6, 64,
        )  # fmt: skip
    tcp = packet[scapy_all.TCP]
    assert (tcp.sport, tcp.dport, tcp.seq, tcp.ack, int(tcp.flags), tcp.window, tcp.urgptr) == (
        sport, dport, seq, ack, bits, wnd, 0,
    )  # fmt: skip
    assert tcp.dataofs == 5 + words
    assert frame[14 + ip_bytes + 20 :] == options


@pytest.mark.parametrize("family", [4, 6])
def test_no_link_header_on_l3_devices(family):
    vnet, frame = write(flow_of(family), b"\x01" * 12, b"data", l2=b"")
    ip_bytes = 20 if family == 4 else 40
    assert VNET.unpack(vnet) == (1, 0, ip_bytes + 32, 0, ip_bytes, 16)
    assert frame[0] >> 4 == family
    assert tcp_sum_is_right(complete(vnet, frame, b"data"), family)


def test_ipv4_checksum_is_right_for_every_id():
    # All 65,536 sums occur, so the two ways to write zero do, too.
    flow = flow_of(4)
    ids = set()
    for _ in range(0x10000):
        _, frame = write(flow)
        header = frame[14:34]
        assert fold(header) == 0xFFFF
        assert header[10:12] != b"\xff\xff", "zero is written as 0x0000"
        ids.add(header[4:6])
    assert len(ids) == 0x10000


@pytest.mark.parametrize("family", [4, 6])
def test_more_than_mss_is_a_super_segment_and_exactly_mss_is_not(family):
    flow = flow_of(family)
    ip_bytes = 20 if family == 4 else 40
    options = headers.data_options(7, 8)
    vnet, _ = write(flow, options, bytes(1448), mss=1448)
    assert VNET.unpack(vnet)[1] == 0
    vnet, frame = write(flow, options, bytes(1449), mss=1448)
    hdr_len = 14 + ip_bytes + 32
    assert VNET.unpack(vnet) == (1, 1 if family == 4 else 4, hdr_len, 1448, 14 + ip_bytes, 16)
    assert len(frame) == hdr_len
    # The next plain one must not inherit the mark.
    vnet, _ = write(flow, options, b"x")
    assert VNET.unpack(vnet)[1:4] == (0, hdr_len, 0)


def test_a_super_segment_takes_one_ip_id_per_frame():
    flow = flow_of(4)

    def ip_id(payload_bytes):
        return int.from_bytes(write(flow, b"", bytes(payload_bytes), mss=1000)[1][18:20], "big")

    first = ip_id(10_001)
    assert (ip_id(0) - first) & 0xFFFF >= 11


def test_flow_follows_a_changed_link_header():
    flow = flow_of(4)
    other = bytes(12) + b"\x08\x00"
    assert write(flow)[1][:14] == L2[4]
    assert write(flow, l2=other)[1][:14] == other
    assert write(flow, l2=b"")[1][0] == 0x45
    assert write(flow)[1][:14] == L2[4]


def test_prefix_cache_is_bounded():
    flow = flow_of(4)
    for n in range(3000):
        write(flow, l2=n.to_bytes(12, "big") + b"\x08\x00")
    assert len(headers._prefixes) <= headers._PREFIXES_MAX


def test_plain_and_mapped_ipv4_addresses_are_the_same():
    plain = headers.Flow(4, b"\x0a\x58\x00\x05", b"\x0a\x4d\x00\x02", 4242, 80)
    assert write(plain) == write(flow_of(4))


@pytest.mark.parametrize("family", [4, 6])
def test_the_longest_payload_and_the_first_too_long(family):
    write(flow_of(family), bytes(40), bytes(60_000))
    with pytest.raises(struct.error):
        write(flow_of(family), b"", bytes(0x10000 - 20))


@pytest.mark.parametrize(
    ("family", "source", "destination"),
    [(5, bytes(16), bytes(16)), (6, bytes(4), bytes(16)), (4, bytes(5), bytes(4))],
)
def test_flow_refuses_addresses_that_do_not_fit(family, source, destination):
    with pytest.raises(ValueError, match="family"):
        headers.Flow(family, source, destination, 1, 2)


def read_options(options):
    """Through scapy, and that the padding is whole words."""
    assert len(options) % 4 == 0 and len(options) <= 40
    _, frame = write(flow_of(4), options)
    return dict(scapy_all.Ether(frame)[scapy_all.TCP].options)


@pytest.mark.parametrize("wscale", [None, 0, 7, 14])
@pytest.mark.parametrize("sack_permitted", [False, True])
@pytest.mark.parametrize("tsval", [None, 0, 0xFFFFFFFF])
def test_syn_options(wscale, sack_permitted, tsval):
    read = read_options(headers.syn_options(1460, wscale, sack_permitted, tsval, 5))
    read.pop("NOP", None)
    assert read.pop("MSS") == 1460
    assert read.pop("WScale", None) == wscale
    assert ("SAckOK" in read) == sack_permitted
    read.pop("SAckOK", None)
    assert read.pop("Timestamp", None) == (None if tsval is None else (tsval, 5))
    assert not read


@given(u32, u32)
def test_data_options(tsval, tsecr):
    options = headers.data_options(tsval, tsecr)
    assert len(options) == 12
    assert read_options(options)["Timestamp"] == (tsval, tsecr)


@given(st.lists(st.tuples(u32, u32), max_size=6), st.none() | u32, u32)
def test_sack_options(blocks, tsval, tsecr):
    options = headers.sack_options(blocks, tsval, tsecr)
    read = read_options(options)
    assert read.get("Timestamp") == (None if tsval is None else (tsval, tsecr))
    fitting = blocks[: 4 if tsval is None else 3]
    edges = tuple(edge for block in fitting for edge in block)
    assert read.get("SAck", ()) == edges
