"""One TCP segment, as it was captured or swallowed: the record that all parts of pycopy speak of.

Twin of ``struct pycopy_segment`` and ``struct pycopy_key`` in bpf/pycopy.h; what it means is the
session engine's to say. tests/bpf/test_abi.py compares every size and offset.

Tests: tests/bpf/test_abi.py
"""

import struct
from typing import NamedTuple

KIND_CLIENT = 1
KIND_TARGET = 2
KIND_TOO_BIG = 3

OPT_MSS = 0x01
OPT_WSCALE = 0x02
OPT_SACK_PERM = 0x04
OPT_TIMESTAMPS = 0x08

#: A super-segment with more payload than this becomes several records.
PIECE_BYTES = 16384

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = 1, 2, 4, 8, 16, 32, 64, 128

#: ``struct pycopy_key``: client address, server address (16 bytes each, IPv4-mapped for
#: IPv4), client port, server port (2 bytes each, network order).
KEY = struct.Struct("!16s16sHH")

#: ``struct pycopy_segment``: one unpack gives the fields of :class:`Segment`, in order.
SEGMENT = struct.Struct("<Q4B2H6IH2B36s32s")
SEGMENT_BYTES = SEGMENT.size


class Segment(NamedTuple):
    """One TCP segment as the kernel saw it, host byte order; see ``struct pycopy_segment``.

    ``seq`` and ``ack`` are in the sequence space of whoever sent it: the client and the
    online server for ``KIND_CLIENT``, the target and us for ``KIND_TARGET``. ``key`` and
    ``sack`` are raw bytes (:data:`KEY`; little-endian edge pairs, ``sack_blocks`` valid).
    ``seg_len`` is payload bytes; the payload itself travels beside the tuple. In a
    ``KIND_TOO_BIG`` ``seq`` is ours and ``mss`` the MTU of the path's next hop.
    """

    time_ns: int
    kind: int
    tcp_flags: int
    options: int
    wscale: int
    service: int
    wnd: int
    seq: int
    ack: int
    tsval: int
    tsecr: int
    seg_len: int
    payload_bytes: int
    mss: int
    family: int
    sack_blocks: int
    key: bytes
    sack: bytes
