"""Channel frames: whatever the split, the same frames; whatever the garbage, one error."""

import contextlib
import ipaddress
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pycopy.channel import codec
from pycopy.channel.codec import (
    HEADER,
    MAGIC,
    MAX_KEYS,
    MAX_RANGES,
    MAX_RECORDS,
    Bye,
    Claim,
    Decoder,
    Hello,
    Ping,
    Placement,
    Pong,
    ProtocolError,
    Range,
    Records,
    Refuse,
    Relay,
    Relaying,
    Release,
    Taken,
    Type,
    Welcome,
)
from pycopy.wire.segment import SEGMENT

EVERYTHING = frozenset(Type)
U64 = st.integers(0, 2**64 - 1)
KEYS = st.lists(st.binary(min_size=36, max_size=36), min_size=1, max_size=40).map(tuple)


#: The longest frame of any type, header included.
MAX_FRAME_BYTES = 65536 + 8


def prefix(number: int, bits: int) -> Range:
    return Range((number >> (128 - bits) << (128 - bits)).to_bytes(16, "big"), bits)


RANGES = st.lists(
    st.builds(prefix, st.integers(0, 2**128 - 1), st.integers(0, 128)), max_size=20
).map(tuple)
FRAMES = st.one_of(
    st.builds(lambda *fields: Hello(*fields), U64, RANGES, st.integers(0, 65535), U64),
    st.builds(
        lambda *fields: Welcome(*fields), U64, st.sampled_from(Placement), st.sampled_from(Relaying)
    ),
    st.builds(Relay, st.sampled_from(Relaying)),
    st.builds(Refuse, st.text("abc é€", max_size=100)),
    st.builds(
        Records,
        U64,
        st.integers(0, 5).flatmap(lambda n: st.binary(min_size=n * 112, max_size=n * 112)),
    ),
    st.builds(Claim, KEYS),
    st.builds(Release, KEYS),
    st.builds(Taken, KEYS),
    st.builds(Ping, U64),
    st.builds(Pong, U64),
    st.builds(Bye, U64),
)


def decode(pieces, accepts=EVERYTHING):
    decoder = Decoder(accepts)
    frames = []
    for piece in pieces:
        frames += decoder.feed(piece)
        assert len(decoder._buffer) < MAX_FRAME_BYTES
    return frames


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@given(st.lists(FRAMES, max_size=8), st.lists(st.integers(0, 2**20), max_size=30))
def test_any_split_decodes_the_same(frames, places):
    stream = b"".join(frame.encode() for frame in frames)
    decoded = decode(cut(stream, places))
    assert decoded == frames
    assert [type(frame) for frame in decoded] == [type(frame) for frame in frames]


def test_byte_by_byte():
    frames = [Hello(7, (prefix(0, 96),)), Claim((b"k" * 36,)), Bye(0)]
    stream = b"".join(frame.encode() for frame in frames)
    assert decode(bytes([byte]) for byte in stream) == frames


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5), st.booleans())
def test_garbage_raises_nothing_but_protocol_error(data, places, framed):
    decoder = Decoder(EVERYTHING)
    if framed:
        data = MAGIC + data
    try:
        for piece in cut(data, places):
            list(decoder.feed(piece))
            assert len(decoder._buffer) <= len(data)
    except ProtocolError as error:
        assert str(error)
        assert len(decoder._buffer) == 0
        with pytest.raises(ProtocolError):
            list(decoder.feed(b""))


@given(
    st.integers(0, 255),
    st.integers(0, 2**32 - 1) | st.integers(0, 70000),
    st.binary(max_size=400),
)
def test_any_header_is_refused_or_bounded(number, length, body):
    decoder = Decoder(EVERYTHING)
    try:
        list(decoder.feed(HEADER.pack(MAGIC, number, 0, length)))
        assert length <= MAX_FRAME_BYTES
        list(decoder.feed(body))
    except ProtocolError:
        return
    assert len(decoder._buffer) < MAX_FRAME_BYTES


@given(st.lists(FRAMES, min_size=1, max_size=4), st.integers(0, 2**20), st.integers(0, 255))
def test_one_wrong_byte_never_raises_anything_else(frames, place, byte):
    stream = bytearray(b"".join(frame.encode() for frame in frames))
    stream[place % len(stream)] = byte
    with contextlib.suppress(ProtocolError):
        decode([bytes(stream)])


def test_frames_before_the_garbage_are_delivered():
    decoder = Decoder(EVERYTHING)
    frames = []
    with pytest.raises(ProtocolError, match="GET"):
        for frame in decoder.feed(Ping(3).encode() + b"GET / HTTP/1.1"):
            frames.append(frame)
    assert frames == [Ping(3)]


@pytest.mark.parametrize("first", [b"G", b"\x00", b"\xab\x00", b"PYCP"])
def test_a_stranger_is_known_by_its_first_bytes(first):
    with pytest.raises(ProtocolError):
        decode([first])


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        (Type.HELLO, 31),
        (Type.HELLO, 32 + 18 + MAX_RANGES * 20 + 1),
        (Type.HELLO, 2**32 - 1),
        (Type.WELCOME, 31),
        (Type.RECORDS, 7),
        (Type.RECORDS, 8 + 111),
        (Type.RECORDS, 8 + (MAX_RECORDS + 1) * 112),
        (Type.CLAIM, 0),
        (Type.CLAIM, 35),
        (Type.CLAIM, (MAX_KEYS + 1) * 36),
        (Type.RELEASE, 37),
        (Type.REFUSE, 1001),
        (Type.PING, 7),
        (Type.PONG, 9),
        (Type.BYE, 0),
        (Type.RELAY, 2),
    ],
)
def test_lengths_are_checked_before_the_payload_comes(kind, length):
    with pytest.raises(ProtocolError, match=f"{kind.name} cannot have {length} bytes"):
        decode([HEADER.pack(MAGIC, kind, 0, length)])


def test_the_largest_frames_pass():
    frames = [
        Hello(1, tuple(prefix(n << 100, 128) for n in range(MAX_RANGES))),
        Records(9, bytes(MAX_RECORDS * 112)),
        Claim(tuple(struct.pack("<36x") for _ in range(MAX_KEYS))),
    ]
    assert decode([b"".join(frame.encode() for frame in frames)]) == frames
    assert max(len(frame.encode()) for frame in frames) <= MAX_FRAME_BYTES


def test_only_what_is_accepted_now():
    with pytest.raises(ProtocolError, match="unexpected frame: RECORDS"):
        decode([Records(0, b"").encode()], codec.FROM_REPLAY)
    with pytest.raises(ProtocolError, match="unexpected frame: type 77"):
        decode([HEADER.pack(MAGIC, 77, 0, 0)])
    with pytest.raises(ProtocolError, match="unexpected frame: CLAIM"):
        decode([Claim((bytes(36),)).encode()], codec.FIRST_FROM_REPLAY)


def test_hello_of_a_later_version_still_says_its_version():
    later = HEADER.pack(MAGIC, Type.HELLO, 0, 32 + 5)
    later += struct.pack("<4sHH24s", b"PYCP", 9, 4, b"7.1.0") + b"hello"
    (hello,) = decode([later])
    assert (hello.protocol, hello.abi, hello.version) == (9, 4, "7.1.0")


def test_a_range_with_bits_beyond_its_prefix_is_refused():
    wrong = Hello(1, (Range(ipaddress.ip_address("fd00::1").packed, 64),)).encode()
    with pytest.raises(ProtocolError, match="not a prefix"):
        decode([wrong])


def test_text_of_a_peer_cannot_steer_a_terminal():
    (refuse,) = decode([Refuse("no\x1b[2J\nreally").encode()])
    assert refuse.text == "no?[2J?really"


def test_a_record_travels_as_it_is():
    assert codec.SEGMENT_BYTES == SEGMENT.size == 112
    record = bytes(range(112))
    (progress,) = decode([Records(1, record).encode()])
    assert progress.records == record
