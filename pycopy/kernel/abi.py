"""Twin of bpf/pycopy.h: the records, counters and constants shared with the BPF programs.

Nothing here knows what a record means. tests/bpf/test_abi.py compares every size
and offset with what the compiler made of the header. A session's fields are not declared here,
but in pycopy/session/fields.py.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

from pycopy.wire.segment import SEGMENT_BYTES

ABI_VERSION = 2

# --- what the programs are linked with -----------------------------------------------------------


class Constant(IntEnum):
    """``enum pycopy_constant``: sizes of this host or run that the verifier has to know."""

    PERF = 1
    LOG_MASK = 2
    SLOTS = 3


LINK_CONSTANT, LINK_FILTER = 15, 0x70790001

#: ``struct pycopy_settings``: worker, workers, own ports (low, high), channel's port, datagrams'
#: port, redirect_away, reserved.
SETTINGS = struct.Struct("<II4HB7x")

#: How old a heartbeat may be until the programs stop copying, and swallowing.
LAPSE_NS, GRACE_NS = 2_000_000_000, 10_000_000_000

#: ``struct pycopy_endpoint``: address (16 bytes), port (network order).
ENDPOINT = struct.Struct("!16sH2x")

PORT_OWN, PORT_ANYBODYS, PORT_GIVEN, PORT_INDEX = 0x10000, 0x20000, 0x40000, 0xFFFF

SCRATCH_BYTES, RELAY_WORK_BYTES = 17152, 256

# --- counters ------------------------------------------------------------------------------------


class CaptureCount(IntEnum):
    """``enum pycopy_capture_count``: index into the per-CPU array ``counts`` of capture.c."""

    SELECTED = 0
    EXTRA_PIECES = 1
    CAPTURED = 2
    PURE_ACK = 3
    FILTERED = 4
    FRAGMENT = 5
    TRUNCATED = 6
    MALFORMED = 7
    RING_FULL = 8
    KEPT = 9
    LAPSED = 10


class InterceptCount(IntEnum):
    """``enum pycopy_intercept_count``: index into ``counts`` of intercept.c."""

    MATCHED = 0
    CAPTURED = 1
    PASSED = 2
    FRAGMENT = 3
    TRUNCATED = 4
    MALFORMED = 5
    RING_FULL = 6
    TOO_BIG = 7
    KEPT = 8
    RELAYED = 9
    LAPSED = 10


PASS = 0
SWALLOW = 1
#: And above: swallow, by way of a relay's number.
RELAY = 2

#: ``struct pycopy_claim_key``: prefix length in bits (IPv4: 96 + n), address (16 bytes).
CLAIM_KEY = struct.Struct("<I16s")


# --- responses straight from one kernel to the other -----------------------------------------

RELAYS = 64

#: ``struct pycopy_relay``, see :class:`RelayEntry`.
RELAY_ENTRY = struct.Struct("<QIBB14s16s16s2s2s")


class RelayEntry(NamedTuple):
    """The way to one replay: where datagrams go, and from where; ports in network order."""

    cookie: int
    ifindex: int
    family: int
    reserved: int
    l2: bytes
    source: bytes
    destination: bytes
    source_port: bytes
    destination_port: bytes


RELAYED_SEGMENT, PROBE = 1, 2

#: ``struct pycopy_datagram`` before its segment: cookie, junk, kind, reserved.
DATAGRAM_HEAD = struct.Struct("<QHHI")
DATAGRAM_BYTES = DATAGRAM_HEAD.size + SEGMENT_BYTES


# --- sessions that the kernel keeps ------------------------------------------------------


class Owner(IntEnum):
    """``enum pycopy_owner``: who moves a session on."""

    FREE = 0
    KERNEL = 1
    LEAVING = 2
    USER = 3


class Left(IntEnum):
    """``enum pycopy_left``: why a session left the kernel."""

    ORDER = 0
    RESET = 1
    TIMEOUT = 2
    DUP_ACK = 3
    RESPONSE = 4
    QUEUE = 5
    LOG = 6
    CLOSE = 7
    QUIET = 8
    OPTIONS = 9
    REUSED = 10
    HOP = 11
    SILENT = 12
    ASKED = 13


HELD_MAX = 4096


#: ``struct pycopy_session``: pycopy/session/fields.py.
SESSION_BYTES = 288

#: ``struct pycopy_flow``.
FLOW = struct.Struct("<II")
NO_SLOT = 0xFFFFFFFF


class LogRecord(NamedTuple):
    """``struct pycopy_log_record``; the payload follows it."""

    bytes: int
    slot: int
    generation: int
    seq: int
    ack: int
    seg_len: int
    tcp_flags: int
    end: int
    time_ns: int
    before: int
    next: int


#: ``struct pycopy_lingering``: slot, generation, until.
LINGERING = struct.Struct("<IIQ")
LOG_RECORD = struct.Struct("<8I3Q")
#: Bit of ``LogRecord.tcp_flags``: a request begins here.
LOG_BOUNDARY = 0x100
#: ``struct pycopy_log_head``: head, tail, reserved.
LOG_HEAD = struct.Struct("<QQ48s")
LOG_CPU_SHIFT = 48
LOG_PAYLOAD = 65536
#: Longest payload of one frame made of the log.
RELEASE_BYTES = 9216
LOG_ROOM = LOG_PAYLOAD + RELEASE_BYTES + 1024

#: ``struct pycopy_hop``, see :class:`HopEntry`.
HOP = struct.Struct("<IBBH14s2s16s16s")


class HopEntry(NamedTuple):
    """The way to a service's target; its port in network order."""

    ifindex: int
    usable: int
    family: int
    mss: int
    l2: bytes
    target_port: bytes
    source: bytes
    target: bytes


#: ``struct pycopy_fast_config``, see :class:`FastConfig`.
FAST_CONFIG = struct.Struct("<10Q6I")


class FastConfig(NamedTuple):
    """The times and choices of a run; times in nanoseconds, as in pycopy/session/rules.py."""

    now_ns: int = 0  #: a test's clock; 0: the kernel's
    quiet_ns: int = 0
    quiet_max_ns: int = 0
    delayed_ack_ns: int = 0
    rto_initial_ns: int = 0
    rto_min_ns: int = 0
    rto_max_ns: int = 0
    time_wait_ns: int = 0
    response_idle_ns: int = 0
    idle_ns: int = 0
    timestamp_origin: int = 0
    closed: int = 0  #: not zero: no session is opened
    wait_for_response: int = 0
    ports: int = 0  #: how many are in map "ports"; 0: the client's own
    pool4: int = 0  #: how many networks of each family are in map "pool"
    pool6: int = 0


POOL_NETWORKS = 16
#: ``struct pycopy_pool``: upper and lower half of the first host, hosts before it.
POOL = struct.Struct("<QQQ")

#: ``struct pycopy_command`` without its session: request, slot, generation, reserved.
COMMAND = struct.Struct("<4I")
TAKE, HAVE, GIVE, DROP, FILL = 1, 2, 3, 4, 5
FILL_SLOTS = 256

#: ``struct pycopy_pending``: a byte for each of so many sessions.
PENDING_SLOTS = 64
#: Entries of the map "cursors".
CURSORS = 3

#: ``struct pycopy_attention``.
ATTENTION = struct.Struct("<II")

TIMER_BEGIN, TIMER_BEGIN_ALL, TIMER_GO_ON, TIMER_GO_ON_ALL, TIMER_DONE = 1, 2, 3, 4, 5
TIMER_PENDING, TIMER_HELD, TIMER_ATTENTION, TIMER_SEEN = 0x100, 0x200, 0x400, 0x700

WORK_BYTES = 512
HOLD_BUCKETS = 7


class FastCount(IntEnum):
    """``enum pycopy_fast_count``: index into the per-CPU array ``fast_counts``."""

    CLIENT = 0
    SENT_AT_ONCE = 1
    HELD = 2
    RELEASED = 3
    STEERED = 4
    DUPLICATE = 5
    SYN = 6
    PAYLOAD = 7
    PAYLOAD_BYTES = 8
    RESPONSES = 9
    RESPONSES_STEERED = 10
    RESPONSES_DUPLICATE = 11
    RESPONSE_PAYLOAD = 12
    RESPONSE_FIN = 13
    OPENED = 14
    ESTABLISHED = 15
    CLOSED = 16
    TAKEN = 17
    GIVEN = 18
    RELEASED_BY_QUIET = 19
    OUT_SEGMENTS = 20
    OUT_PAYLOAD = 21
    OUT_SYN = 22
    OUT_FIN = 23
    OUT_ACK = 24
    OUT_FAILED = 25
    HOLD_TIME = 26
    LEFT = 33


FAST_COUNTS = FastCount.LEFT + len(Left)
