"""From the session's space to the target's wire: options and headers of one emission.

The only place where sequence numbers, acknowledgements, timestamps and options become
header bytes. Still no I/O: the caller owns buffer, next hop and socket.
"""

from pycopy.session.connection import Connection, Emission
from pycopy.wire import headers
from pycopy.wire.segment import ACK, OPT_SACK_PERM, OPT_TIMESTAMPS, OPT_WSCALE, RST, SYN
from pycopy.wire.seq import MASK

#: The window we offer, scaled as the client's SYN says: nobody reads, so there is always room.
WINDOW_FIELD = 0xFFFF

#: What fits into 40 bytes of options; wire.py takes fewer beside timestamps (RFC 2018 3).
MAX_SACK_BLOCKS = 4


def options_of(session: Connection, flags: int, tsval: int) -> bytes:
    """Return the TCP options for a segment with ``flags``, padded to 32-bit words.

    SACK blocks are ours, of the target's stream; the client's describe the online
    server's stream and are never passed on (the original does).
    """
    target = session.target
    used = target.options
    timestamps = used & OPT_TIMESTAMPS
    if flags & SYN:
        return headers.syn_options(
            target.mss,
            target.rcv_wscale if used & OPT_WSCALE else None,
            bool(used & OPT_SACK_PERM),
            tsval if timestamps else None,
            0,
        )
    if flags & RST and not flags & ACK:
        return b""
    if target.early and used & OPT_SACK_PERM:
        blocks = [
            ((target.irs + start) & MASK, (target.irs + end) & MASK)
            for start, end in target.early[:MAX_SACK_BLOCKS]
        ]
        return headers.sack_options(blocks, tsval if timestamps else None, target.ts_recent)
    return headers.data_options(tsval, target.ts_recent) if timestamps else b""


def write(buffer: bytearray, emission: Emission, flow: headers.Flow, l2: bytes, mtu: int) -> int:
    """Write all headers of ``emission`` into ``buffer``; return their length in bytes.

    ``mtu`` is the path's: the largest payload of one frame is what the target accepts
    and the path carries, less our options (RFC 6691).
    """
    session, flags, seq, ack, tsval, data = emission
    options = options_of(session, flags, tsval)
    header_bytes = 40 if session.family == 4 else 60
    mss = min(session.target.mss, mtu - header_bytes) - len(options)
    return headers.write_frame(
        buffer, flow, l2, seq, ack, flags, WINDOW_FIELD, options, len(data), mss
    )
