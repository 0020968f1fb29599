"""Frames in place: virtio_net_hdr, link header, IP and TCP headers in one ``pack_into``.

The payload is not here: it travels beside the header in one sendmsg. The kernel completes
the TCP checksum and cuts super-segments (PACKET_VNET_HDR), so all that is computed per
segment is the IPv4 header checksum and the sum of the pseudo-header. Integers are host
order at this module's edge. It must not know sessions, sockets or routes.
"""

import struct
from collections.abc import Sequence

#: A frame's headers never need more: virtio 10, link 14, IPv6 40, TCP 60.
HEADER_BYTES_MAX = 10 + 14 + 40 + 60

_VNET_BYTES = 10
_NEEDS_CSUM = 1
_GSO_TCPV4 = 1
_GSO_TCPV6 = 4
_TCP_CSUM_OFFSET = 16
_HOP_LIMIT = 64
_TCP = 6

# struct virtio_net_hdr, in the byte order of the host (this is the legacy layout):
# flags, gso_type, hdr_len, gso_size, csum_start, csum_offset.
_VNET = struct.Struct("=BBHHHH")
# Everything after the options length is known goes in with one call. The prefix is the
# virtio header and the link header; options are zero-filled to the 40 bytes the buffer
# always has room for. Two constants per flow (addresses and ports) are packed as bytes.
_TCP_PART = "IIBBHHH40s"
_V4 = "HHHHHH12s" + _TCP_PART
_V6 = "IHH36s" + _TCP_PART
_PACK = {
    (4, 0): struct.Struct("!10s" + _V4).pack_into,
    (4, 14): struct.Struct("!24s" + _V4).pack_into,
    (6, 0): struct.Struct("!10s" + _V6).pack_into,
    (6, 14): struct.Struct("!24s" + _V6).pack_into,
}

# (l2, family, options_bytes) -> virtio and link header of a segment that is not cut. Many
# flows share few next hops; bounded because MAC addresses may come and go for weeks.
_prefixes: dict[tuple[bytes, int, int], bytes] = {}
_PREFIXES_MAX = 1024


def _prefix(l2: bytes, family: int, options_bytes: int) -> bytes:
    key = (l2, family, options_bytes)
    prefix = _prefixes.get(key)
    if prefix is None:
        if len(_prefixes) >= _PREFIXES_MAX:
            _prefixes.clear()
        csum_start = len(l2) + (20 if family == 4 else 40)
        hdr_len = csum_start + 20 + options_bytes
        prefix = _VNET.pack(_NEEDS_CSUM, 0, hdr_len, 0, csum_start, _TCP_CSUM_OFFSET) + l2
        _prefixes[key] = prefix
    return prefix


def _sum16(data: bytes) -> int:
    # A number is congruent, modulo 65535, to the sum of its 16-bit digits.
    return int.from_bytes(data, "big") % 65535


class Flow:
    """The constant half of a connection's headers; the only per-flow state is the IP id.

    Addresses are 16 bytes (IPv4-mapped for family 4) or plain 4 bytes.
    """

    __slots__ = (
        "_constant",
        "_ip_id",
        "_ip_sum",
        "_l2",
        "_options_bytes",
        "_pack",
        "_prefix",
        "_pseudo_sum",
        "destination",
        "destination_port",
        "family",
        "source",
        "source_port",
    )

    def __init__(
        self,
        family: int,
        source: bytes,
        destination: bytes,
        source_port: int,
        destination_port: int,
    ) -> None:
        size = 4 if family == 4 else 16
        if (
            family not in (4, 6)
            or len(source) not in (size, 16)
            or len(destination) not in (size, 16)
        ):
            raise ValueError("family must be 4 or 6 and the addresses must fit it")
        addresses = source[-size:] + destination[-size:]
        self.family = family
        self.source = source
        self.destination = destination
        self.source_port = source_port
        self.destination_port = destination_port
        ports = struct.pack("!HH", source_port, destination_port)
        self._constant = addresses + ports
        # RFC 1071: the parts that never change. 65534 - (x - 1) % 65535 is the one's
        # complement of x with zero written as 0x0000, the way every sender writes it.
        self._ip_sum = 0x4500 + 0x4000 + (_HOP_LIMIT << 8 | _TCP) + _sum16(addresses) - 1
        self._pseudo_sum = _sum16(addresses) + _TCP
        self._ip_id = _sum16(ports)
        self._l2: bytes | None = None
        self._options_bytes = -1
        self._prefix = b""
        self._pack = _PACK[family, 14]

    def _follow(self, l2: bytes, options_bytes: int) -> None:
        # The next hop or the options' length changed: rare, so it is remembered here.
        self._l2 = l2
        self._options_bytes = options_bytes
        self._prefix = _prefix(l2, self.family, options_bytes)
        self._pack = _PACK[self.family, len(l2)]


def write_frame(
    buffer: bytearray,
    flow: Flow,
    l2: bytes,
    seq: int,
    ack: int,
    flags: int,
    wnd: int,
    options: bytes,
    payload_bytes: int,
    mss: int,
) -> int:
    """Write one segment's headers at the start of ``buffer``; return their length.

    ``buffer`` has room for HEADER_BYTES_MAX and keeps garbage after the header. With more
    than ``mss`` bytes of payload it is a super-segment, which the kernel cuts (FIN and PSH
    go to the last piece). A length that does not fit its 16 bits raises struct.error.
    """
    options_bytes = len(options)
    if l2 is not flow._l2 or options_bytes != flow._options_bytes:
        flow._follow(l2, options_bytes)
    tcp_bytes = 20 + options_bytes + payload_bytes
    offset_byte = 80 + (options_bytes << 2)
    if flow.family == 4:
        ip_id = flow._ip_id
        # One id per frame on the wire: the kernel counts on from here when it cuts.
        flow._ip_id = (ip_id + (payload_bytes // mss + 1 if payload_bytes > mss else 1)) & 0xFFFF
        total = tcp_bytes + 20
        flow._pack(
            buffer,
            0,
            flow._prefix,
            0x4500,
            total,
            ip_id,
            0x4000,
            0x4006,
            65534 - (flow._ip_sum + total + ip_id) % 65535,
            flow._constant,
            seq,
            ack,
            offset_byte,
            flags,
            wnd,
            (flow._pseudo_sum + tcp_bytes) % 65535,
            0,
            options,
        )
        end = len(flow._prefix) + 40 + options_bytes
    else:
        flow._pack(
            buffer,
            0,
            flow._prefix,
            0x60000000,
            tcp_bytes,
            0x0640,
            flow._constant,
            seq,
            ack,
            offset_byte,
            flags,
            wnd,
            (flow._pseudo_sum + tcp_bytes) % 65535,
            0,
            options,
        )
        end = len(flow._prefix) + 60 + options_bytes
    if payload_bytes > mss:
        _VNET.pack_into(
            buffer,
            0,
            _NEEDS_CSUM,
            _GSO_TCPV4 if flow.family == 4 else _GSO_TCPV6,
            end - _VNET_BYTES,
            mss,
            end - _VNET_BYTES - 20 - options_bytes,
            _TCP_CSUM_OFFSET,
        )
    return end


# TCP options, most significant byte first, as one word each so that two NOPs keep the rest
# on a 4-byte boundary (RFC 7323 appendix A).
_NOP_NOP_TIMESTAMPS = 0x0101080A
_SACK_PERM_TIMESTAMPS = 0x0402080A
_NOP_NOP_SACK_PERM = 0x01010402
_NOP_WSCALE = 0x01030300
_MSS = 0x02040000
_NOP_NOP_SACK = 0x01010500
_WORD = struct.Struct("!I").pack
_TWO_WORDS = struct.Struct("!II").pack
_THREE_WORDS = struct.Struct("!III").pack


def syn_options(
    mss: int, wscale: int | None, sack_permitted: bool, tsval: int | None, tsecr: int = 0
) -> bytes:
    """Options of a SYN in the order Linux sends them; None leaves an option out."""
    options = _WORD(_MSS | mss)
    if tsval is not None:
        head = _SACK_PERM_TIMESTAMPS if sack_permitted else _NOP_NOP_TIMESTAMPS
        options += _THREE_WORDS(head, tsval, tsecr)
    elif sack_permitted:
        options += _WORD(_NOP_NOP_SACK_PERM)
    if wscale is not None:
        options += _WORD(_NOP_WSCALE | wscale)
    return options


def data_options(tsval: int, tsecr: int) -> bytes:
    """The timestamps option every segment carries once negotiated (RFC 7323), 12 bytes."""
    return _THREE_WORDS(_NOP_NOP_TIMESTAMPS, tsval, tsecr)


def sack_options(
    blocks: Sequence[tuple[int, int]], tsval: int | None = None, tsecr: int = 0
) -> bytes:
    """Timestamps, if any, and as many ``(left, right)`` blocks as fit, the first ones first.

    RFC 2018 section 3: three with timestamps, four without. No block, no SACK option.
    """
    options = b"" if tsval is None else _THREE_WORDS(_NOP_NOP_TIMESTAMPS, tsval, tsecr)
    blocks = blocks[: 4 if tsval is None else 3]
    if blocks:
        options += _WORD(_NOP_NOP_SACK | 2 + 8 * len(blocks))
        for left, right in blocks:
            options += _TWO_WORDS(left, right)
    return options
