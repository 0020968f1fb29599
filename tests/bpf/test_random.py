"""Random and damaged frames through the programs, and the oracle's opinion of each.

Seeded: a failure names the seed and the frame. The verdict, the bytes and the balance of
the counters are checked by harness.Program on every frame.
"""

import random
import struct

import pytest

from pycopy.kernel.abi import SWALLOW, CaptureCount, InterceptCount
from pycopy.wire.segment import ACK, KIND_TARGET, SYN
from tests.bpf.frames import HEADERS, LINKS, SYN_OPTIONS, TIMESTAMPS, tcp
from tests.bpf.harness import (
    EVERY_PORT,
    Capture,
    Intercept,
    check_record,
    expected_fate,
    runnable,
)
from tests.bpf.oracle import FRAGMENT, MALFORMED, TRUNCATED, WHOLE, look

FRAMES_PER_SEED = 1500
SACK = [*TIMESTAMPS, ("NOP", 0), ("NOP", 0), ("SAck", (1, 2, 3, 4))]

#: Whole frames to damage: every header, with different options and payloads.
SEEDLINGS = [
    tcp(5, flags=flags, payload=payload, ip=ip, link=link, options=options, seq=2**32 - 3)
    for ip in HEADERS
    for link in LINKS
    for flags, payload, options in (
        ("S", b"", SYN_OPTIONS),
        ("A", b"", TIMESTAMPS),
        ("PA", bytes(range(200)), SACK),
        ("FA", b"x" * 300, ()),
    )
]


def headers_bytes(frame):
    """Where the damage is worth most: all but most of the payload."""
    return min(len(frame), 140)


def damage(rng, frame):
    frame = bytearray(frame)
    match rng.randrange(8):
        case 0:
            del frame[rng.randrange(len(frame)) :]
        case 1:
            frame += rng.randbytes(rng.randrange(1, 200))
        case 2:
            at = rng.randrange(headers_bytes(frame))
            frame[at : at + 2] = rng.choice([b"\0\0", b"\xff\xff", b"\0\x01", rng.randbytes(2)])
        case 3:
            at = rng.randrange(headers_bytes(frame))
            del frame[at : at + rng.randrange(1, 9)]
        case 4:
            at = rng.randrange(headers_bytes(frame))
            frame[at:at] = rng.randbytes(rng.randrange(1, 9))
        case 5:
            at = rng.randrange(len(frame))
            frame[at:] = rng.randbytes(len(frame) - at)
        case _:
            for _ in range(rng.randrange(1, 4)):
                frame[rng.randrange(headers_bytes(frame))] ^= 1 << rng.randrange(8)
    return bytes(frame)


def frames(seed):
    rng = random.Random(seed)
    for _ in range(FRAMES_PER_SEED):
        if rng.random() < 0.1:
            frame = rng.randbytes(12) + rng.choice(
                [b"\x08\0", b"\x86\xdd", b"\x81\0", rng.randbytes(2)]
            )
            frame += rng.randbytes(rng.randrange(120))
        else:
            frame = damage(rng, rng.choice(SEEDLINGS))
            while rng.random() < 0.3 and len(frame) > 14:
                frame = damage(rng, frame)
        yield frame


class Handshakes:
    """The rule of capture.c's `handshakes`, to know which pure ACK is wanted."""

    def __init__(self):
        self.begun = {}

    def fate(self, seen):
        expected = expected_fate(seen)
        if seen.fate != WHOLE:
            return expected
        flow = seen.src, seen.dst, seen.sport, seen.dport
        fields = seen.fields
        flags = fields["tcp_flags"]
        if flags & (SYN | ACK) == SYN:
            self.begun[flow] = fields["seq"], fields["seg_len"]
        elif expected is CaptureCount.CAPTURED:
            self.begun.pop(flow, None)
        elif flow in self.begun and flags & ACK:
            iss, syn_len = self.begun[flow]
            if (fields["seq"] - iss - 1) % 2**32 <= syn_len:
                del self.begun[flow]
                return CaptureCount.CAPTURED
        return expected


@pytest.mark.parametrize("seed", range(4))
def test_capture(hook, seed):
    program = Capture(hook, services=EVERY_PORT)
    handshakes = Handshakes()
    fates = set()
    for number, frame in enumerate(frames(seed)):
        if not runnable(hook, frame):
            continue
        expected = handshakes.fate(look(frame))
        records = program.run(frame)
        counted = [kind for kind in program.changed if kind is not CaptureCount.SELECTED]
        assert counted == ([] if expected is None else [expected]), (number, frame.hex())
        if expected is CaptureCount.CAPTURED:
            (record,) = records
            check_record(record, frame)
        else:
            assert records == []
        fates.add(expected)
    program.close()
    # The damage is such that all of them occur.
    assert fates >= {
        None,
        CaptureCount.CAPTURED,
        CaptureCount.PURE_ACK,
        CaptureCount.FRAGMENT,
        CaptureCount.TRUNCATED,
        CaptureCount.MALFORMED,
    }


@pytest.mark.parametrize("seed", range(4, 8))
def test_intercept(hook, seed):
    program = Intercept(hook)
    program.set_default(SWALLOW)
    kinds = {
        FRAGMENT: InterceptCount.FRAGMENT,
        TRUNCATED: InterceptCount.TRUNCATED,
        MALFORMED: InterceptCount.MALFORMED,
        WHOLE: InterceptCount.CAPTURED,
    }
    for number, frame in enumerate(frames(seed)):
        if not runnable(hook, frame):
            continue
        seen = look(frame)
        expected = kinds.get(seen.fate)
        swallowed, kind, records = program.run(frame)
        assert (swallowed, kind) == (expected is not None, expected), (number, frame.hex())
        if seen.fate == WHOLE:
            (record,) = records
            check_record(record, frame, kind=KIND_TARGET)
        else:
            assert records == []
    program.close()


def test_options_area(hook):
    """All of the damage to the options, of which most of the parser's branches are about."""
    rng = random.Random(99)
    program = Capture(hook, services=EVERY_PORT)
    base = tcp(5, flags="S", payload=b"tail", options=[("NOP", 0)] * 40)
    fates = []
    for _ in range(FRAMES_PER_SEED):
        options = bytearray()
        while len(options) < 40:
            kind = rng.choice([0, 1, 1, 2, 3, 4, 5, 8, 254])
            length = rng.choice([2, 3, 4, 10, 10, 18, rng.randrange(256)])
            options += struct.pack("BB", kind, length)[: 1 if kind < 2 else 2]
            options += rng.randbytes(max(0, min(length, 40) - 2)) if kind > 1 else b""
        flags = rng.choice([SYN, ACK])
        frame = bytearray(base)
        frame[54:94] = options[:40]
        frame[47] = flags
        frame = bytes(frame)
        expected = expected_fate(look(frame))
        assert program.call(frame) is not None
        records = program.records()
        assert expected in program.changed, frame.hex()
        fates.append(expected)
        if records:
            check_record(records[0], frame)
    program.close()
    assert {CaptureCount.CAPTURED, CaptureCount.MALFORMED} == set(fates)
