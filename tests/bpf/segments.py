"""A struct pycopy_segment as the frame that carries it, and a frame as what it says.

The other way round from bpf/parse.h and bpf/emit.h, and by the RFCs alone: nothing of
pycopy.wire.headers is used, so that a mistake of one side is not one of the other side as well.
"""

import struct
from typing import NamedTuple

from pycopy.wire.segment import KEY, KIND_CLIENT, OPT_MSS, OPT_SACK_PERM, OPT_TIMESTAMPS, OPT_WSCALE

MAPPED = bytes(10) + b"\xff\xff"


class Frame(NamedTuple):
    """What was sent; ``key`` is that of the connection to the target (KEY)."""

    l2: bytes
    key: bytes
    flags: int
    seq: int
    ack: int
    wnd: int
    options: bytes
    data: bytes


def sum16(data):
    """The one's complement sum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo_header(source, destination, tcp_bytes):
    return source + destination + struct.pack("!II", tcp_bytes, 6)


def options_of(segment):
    """In the order in which Linux writes them (tcp_options_write)."""
    present, words = segment.options, b""
    if present & OPT_MSS:
        words += struct.pack("!BBH", 2, 4, segment.mss)
    if present & OPT_TIMESTAMPS:
        words += b"\x04\x02" if present & OPT_SACK_PERM else b"\x01\x01"
        words += struct.pack("!BBII", 8, 10, segment.tsval, segment.tsecr)
    elif present & OPT_SACK_PERM:
        words += b"\x01\x01\x04\x02"
    if present & OPT_WSCALE:
        words += struct.pack("!BBBB", 1, 3, 3, segment.wscale)
    if segment.sack_blocks:
        edges = struct.unpack("<8I", segment.sack)[: 2 * segment.sack_blocks]
        words += struct.pack(f"!BBBB{len(edges)}I", 1, 1, 5, 2 + 4 * len(edges), *edges)
    return words


def frame_of(segment, payload, l2):
    """The frame of a client's segment, or of a target's: then ``key`` names its receiver."""
    source, destination, source_port, destination_port = KEY.unpack(segment.key)
    if segment.kind != KIND_CLIENT:
        source, destination = destination, source
        source_port, destination_port = destination_port, source_port
    options = options_of(segment)
    tcp = bytearray(
        struct.pack(
            "!HHIIBBHHH", source_port, destination_port, segment.seq, segment.ack,
            (20 + len(options)) << 2, segment.tcp_flags, segment.wnd, 0, 0,
        )
        + options + payload
    )  # fmt: skip
    size = 4 if segment.family == 4 else 16
    source, destination = source[-size:], destination[-size:]
    check = ~sum16(pseudo_header(source, destination, len(tcp)) + tcp) & 0xFFFF
    tcp[16:18] = struct.pack("!H", check)
    if segment.family == 6:
        ip = struct.pack("!IHBB", 0x60000000, len(tcp), 6, 57) + source + destination
        return l2 + b"\x86\xdd" + ip + tcp
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 7, 0x4000, 57, 6, 0)
    check = ~sum16(ip + source + destination) & 0xFFFF
    return l2 + b"\x08\x00" + ip[:10] + struct.pack("!H", check) + source + destination + tcp


def read(frame):
    """What a frame to a target says; an assertion error if no receiver would accept it."""
    ip = frame[14:]
    if frame[12:14] == b"\x08\x00":
        assert ip[0] == 0x45 and ip[9] == 6, "not the IPv4 header of a copy"
        assert sum16(ip[:20]) == 0xFFFF, "wrong checksum of the IPv4 header"
        assert int.from_bytes(ip[2:4], "big") == len(ip), "wrong length in the IPv4 header"
        source, destination, tcp = ip[12:16], ip[16:20], ip[20:]
        addresses = MAPPED + source, MAPPED + destination
    else:
        assert frame[12:14] == b"\x86\xdd", "neither IPv4 nor IPv6"
        assert ip[0] == 0x60 and ip[6] == 6, "not the IPv6 header of a copy"
        assert int.from_bytes(ip[4:6], "big") == len(ip) - 40, "wrong length in the IPv6 header"
        source, destination, tcp = ip[8:24], ip[24:40], ip[40:]
        addresses = source, destination
    assert sum16(pseudo_header(source, destination, len(tcp)) + tcp) == 0xFFFF, "wrong checksum"
    source_port, destination_port, seq, ack, offset, flags, wnd = struct.unpack_from(
        "!HHIIBBH", tcp
    )
    header_bytes = (offset >> 4) * 4
    key = KEY.pack(*addresses, source_port, destination_port)
    options = tcp[20:header_bytes]
    return Frame(frame[:14], key, flags, seq, ack, wnd, options, tcp[header_bytes:])
