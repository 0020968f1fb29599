"""The fields of a session, declared once for both executors.

:class:`KernelSession` is what the kernel keeps of a session, and what changes hands. From its
annotations come

* ``struct pycopy_session`` and the reset of its slot (bpf/generated.h, made by
  fastpath/generate.py, which a test holds against this file),
* the struct format, :data:`KERNEL_SESSION`,
* whatever fastpath/handover.py can translate without a rule of its own,
* :data:`FIELDS`, by which the states of both executors are compared.

An annotation has the C type, the space, and what the field means; then, where it is so, where
the engine has it (:class:`At`), the bit without which it means nothing (:class:`Known`), what
it begins with when the kernel opens a session (:class:`Reset`, else 0), its unit, and whether
it is :data:`SAMPLED`. A rule that needs one bit more takes a line in :class:`Known`.

Tests: tests/unit/test_generate.py, tests/unit/test_handover.py
"""

import struct
from enum import Enum, IntEnum, auto
from typing import Annotated, NamedTuple, get_type_hints


class Space(Enum):
    """What a field's number means, and so how it is translated.

    A sequence number is 32 bits wide in the kernel; the engine counts positions from the first
    one of its stream, which never wrap.
    """

    SLOT = auto()  # the kernel's own: which slot it is, and where in the log something lies
    BITS = auto()  # an enumeration, or bits
    COUNT = auto()  # a number, the same in both
    SENT = auto()  # of the client's stream, whose numbers are kept towards the target
    ONLINE = auto()  # of the online server's stream
    TARGET = auto()  # of the target's stream
    TIME = auto()  # nanoseconds of CLOCK_MONOTONIC
    DEADLINE = auto()  # the same; 0: never (the engine's NEVER)
    DURATION = auto()  # nanoseconds
    CONNECTION = auto()  # a key (KEY)


class Type(NamedTuple):
    """In C, and as a letter of :mod:`struct`."""

    c: str
    letter: str


class At(str):
    """Where the engine has it, from its session on."""


class Reset(str):
    """A C expression of what the slot begins with: see ``pycopy_reset()``; "": untouched."""


class Unit(str):
    """What a count counts, or a time is measured in."""


class _Sampled:
    """May differ: how often something is measured is each executor's own choice."""


U8, U16, S16 = Type("__u8", "B"), Type("__u16", "H"), Type("__s16", "h")
U32, U64 = Type("__u32", "I"), Type("__u64", "Q")
_LOCK, _KEY = Type("struct bpf_spin_lock", "I"), Type("struct pycopy_key", "36s")
BYTES, SEGMENTS = Unit("bytes"), Unit("segments")
SAMPLED = _Sampled()


class Known(IntEnum):
    """Bits of ``known``: mask, what it says, and where the engine has it as a truth value."""

    meaning: str
    at: str

    def __new__(cls, mask: int, meaning: str, at: str = "") -> "Known":
        bit = int.__new__(cls, mask)
        bit._value_, bit.meaning, bit.at = mask, meaning, at
        return bit

    IRS = 0x1, "the client has acknowledged"
    NEED = 0x2, "something was put in order"
    FIN = 0x4, "the client's FIN was captured"
    TIME = 0x8, "a round trip is being measured"
    SENT = 0x10, "something was sent"
    OVERLAP = 0x20, "its requests do not wait for responses, it seems", "online.overlapping"
    DOUBT = 0x40, "what was forgiven may have been a pause", "target.doubtful"


# fmt: off
class KernelSession(NamedTuple):
    """``struct pycopy_session``, field by field."""

    lock: Annotated[int, _LOCK, Space.SLOT, "", Reset("")]
    generation: Annotated[int, U32, Space.SLOT, Reset("generation"),
        "of the slot: what refers to an earlier one is stale"]
    owner: Annotated[int, U8, Space.SLOT, Reset("PYCOPY_KERNEL"), "enum pycopy_owner"]
    state: Annotated[int, U8, Space.BITS, Reset("PYCOPY_SYN_SENT"), "enum pycopy_state"]
    family: Annotated[int, U8, Space.COUNT, At("family"), Reset("family"),
        "4 or 6, of the connection to the target"]
    options: Annotated[int, U8, Space.BITS, At("target.options"), Reset("segment->options"),
        "PYCOPY_OPT_* in use with the target, or still offered"]
    snd_wscale: Annotated[int, U8, Space.COUNT, At("target.snd_wscale"),
        "shift of the target's windows"]
    rcv_wscale: Annotated[int, U8, Space.COUNT, At("target.rcv_wscale"), Reset("segment->wscale"),
        "and of ours: the client's"]
    held: Annotated[int, U16, Space.SLOT, SEGMENTS, "how many are held back, from held_at on"]
    service: Annotated[int, U16, Space.COUNT, At("service"), Reset("segment->service"),
        "index of the -x entry"]
    mss: Annotated[int, U16, Space.COUNT, BYTES, At("target.mss"), Reset("mss"),
        "option of our SYN; then the smaller of both sides'"]
    smss: Annotated[int, U16, Space.COUNT, BYTES, At("target.smss"), Reset("mss"),
        "the same less the options of every segment"]
    left: Annotated[int, U16, Space.SLOT, "enum pycopy_left, when not the kernel's any more"]
    known: Annotated[int, U16, Space.BITS, Reset("PYCOPY_KNOWN_TIME"), "PYCOPY_KNOWN_*"]
    stretch: Annotated[int, S16, Space.COUNT, SEGMENTS, At("target.stretch"),
        "that one ACK does for; below 0: a pause"]
    iss: Annotated[int, U32, Space.COUNT, Reset("segment->seq"),
        "the client's first number, kept towards the target"]
    online_irs: Annotated[int, U32, Space.COUNT, Known.IRS, "the online server's"]
    online_snd_nxt: Annotated[int, U32, Space.SENT, At("online.snd_nxt"), Reset("segment->seq + 1"),
        "next byte expected of the client"]
    online_rcv_nxt: Annotated[int, U32, Space.ONLINE, Known.IRS, At("online.rcv_nxt"),
        "highest acknowledgement of the client"]
    online_need: Annotated[int, U32, Space.ONLINE, Known.NEED,
        "ack of the last segment put in order"]
    sent_need: Annotated[int, U32, Space.ONLINE, Known.SENT, "of the last one sent"]
    asked: Annotated[int, U32, Space.SENT, Known.SENT, At("target.asked"),
        "behind the last request sent"]
    irs: Annotated[int, U32, Space.COUNT, At("target.irs"), "the target's first number"]
    snd_una: Annotated[int, U32, Space.SENT, At("target.snd_una"), Reset("segment->seq"),
        "oldest byte that is not acknowledged"]
    snd_nxt: Annotated[int, U32, Space.SENT, At("target.snd_nxt"), Reset("segment->seq + 1"),
        "next byte to send"]
    snd_wnd: Annotated[int, U32, Space.COUNT, BYTES, At("target.snd_wnd"), "the target's window"]
    snd_wl1: Annotated[int, U32, Space.TARGET, At("target.snd_wl1"),
        "seq of the segment that said so"]
    snd_wl2: Annotated[int, U32, Space.SENT, At("target.snd_wl2"), "and its ack"]
    rcv_nxt: Annotated[int, U32, Space.TARGET, At("target.rcv_nxt"),
        "next byte expected of the target"]
    rcv_acked: Annotated[int, U32, Space.TARGET, At("target.rcv_acked"), "last acknowledged to it"]
    ts_recent: Annotated[int, U32, Space.COUNT, At("target.ts_recent"),
        "the target's latest TSval in order (RFC 7323 4.3)"]
    need_base: Annotated[int, U32, Space.COUNT, BYTES,
        "of online responses that count as none, modulo 2^32"]
    answered: Annotated[int, U32, Space.TARGET, Known.SENT, At("target.answered"),
        "rcv_nxt when the last request was sent"]
    said_before: Annotated[int, U32, Space.TARGET, Known.SENT, At("target.said_before"),
        "rcv_nxt while the target had not got it yet"]
    cwnd: Annotated[int, U32, Space.COUNT, BYTES, At("target.cwnd"),
        Reset("PYCOPY_INITIAL_WINDOW * mss"), "congestion window (RFC 5681)"]
    ssthresh: Annotated[int, U32, Space.COUNT, BYTES, At("target.ssthresh"),
        Reset("PYCOPY_NO_SSTHRESH"), "slow start threshold"]
    timed_end: Annotated[int, U32, Space.SENT, Known.TIME, SAMPLED, Reset("segment->seq + 1"),
        "where the measured round trip ends"]
    held_sent: Annotated[int, U32, Space.SLOT, BYTES,
        "what has left of the oldest held segment"]
    timed_ns: Annotated[int, U64, Space.TIME, Known.TIME, SAMPLED, Reset("now_ns"),
        "when it began"]
    srtt_ns: Annotated[int, U64, Space.DURATION, SAMPLED, At("target.srtt_ns"),
        "RFC 6298; 0: not measured yet"]
    rttvar_ns: Annotated[int, U64, Space.DURATION, SAMPLED, At("target.rttvar_ns"),
        "its variation"]
    rto_ns: Annotated[int, U64, Space.DURATION, SAMPLED, At("target.rto_ns"), Reset("rto_ns"),
        "retransmission timeout"]
    rto_at: Annotated[int, U64, Space.DEADLINE, SAMPLED, Reset("now_ns + rto_ns"),
        "0: not running; in TIME_WAIT: when it is over"]
    ack_at: Annotated[int, U64, Space.DEADLINE, At("ack_at"),
        "0: nothing to acknowledge; PYCOPY_AT_ONCE"]
    progress_ns: Annotated[int, U64, Space.TIME, At("progress_ns"), Reset("now_ns"),
        "when the target last acknowledged or sent something new"]
    client_ns: Annotated[int, U64, Space.TIME, At("last_client_ns"), Reset("now_ns"),
        "when the client last spoke"]
    log_last: Annotated[int, U64, Space.SLOT,
        "where the client's last segment is in the log, 0: nowhere"]
    held_at: Annotated[int, U64, Space.SLOT, "and the oldest one held"]
    asked_ns: Annotated[int, U64, Space.TIME, At("online.asked_ns"), Reset("now_ns"),
        "when the last request was captured, or else the SYN"]
    client_rtt_ns: Annotated[int, U64, Space.DURATION, At("online.rtt_ns"),
        "from here to the client and back, 0: not known"]
    online: Annotated[bytes, _KEY, Space.CONNECTION, At("key"), Reset("segment->key"),
        "the connection online"]
    target: Annotated[bytes, _KEY, Space.CONNECTION, At("target_key"), Reset("*target"),
        "and ours to the target"]
# fmt: on


class Field(NamedTuple):
    """One annotation of :class:`KernelSession`, taken apart."""

    name: str
    type: Type
    space: Space
    meaning: str
    at: str = ""
    present: Known | None = None
    reset: str = "0"
    unit: str = ""
    sampled: bool = False


def _field(name: str, facts: tuple[object, ...]) -> Field:
    by_kind = {type(fact): fact for fact in facts}
    known: dict[str, object] = {
        "type": by_kind[Type], "space": by_kind[Space], "meaning": by_kind[str],
        "at": by_kind.get(At, ""), "present": by_kind.get(Known),
        "reset": by_kind.get(Reset, "0"), "unit": by_kind.get(Unit, ""),
        "sampled": _Sampled in by_kind,
    }  # fmt: skip
    assert len(by_kind) == len(facts), name
    return Field(name, **known)  # type: ignore[arg-type]


#: In the order of the struct.
FIELDS: tuple[Field, ...] = tuple(
    _field(name, hint.__metadata__)
    for name, hint in get_type_hints(KernelSession, include_extras=True).items()
)

KERNEL_SESSION = struct.Struct("<" + "".join(field.type.letter for field in FIELDS))
