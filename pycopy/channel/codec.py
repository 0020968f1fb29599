"""Frames of the channel between intercept and replay: bytes to frames and back, sans-IO.

A frame is a header of 8 bytes (magic, type, zero, payload length) and a payload. Integers
are little-endian, as in the records (``abi.SEGMENT``) that make up nearly all the traffic.
The header and the first 32 bytes of HELLO and WELCOME (``_GREETING``) are the same in every
version, so that two peers of different versions can still tell each other so.

Strategy: the length is checked against the type's own limit as soon as the header is there,
so what a peer can make us buffer is bounded; every complaint is a :class:`ProtocolError`.
Nothing here knows sockets, time, or what a frame leads to.
"""

import struct
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import NamedTuple

from pycopy import __version__
from pycopy.kernel.abi import ABI_VERSION, CLAIM_KEY
from pycopy.wire.segment import KEY, SEGMENT_BYTES

PROTOCOL = 3

#: No text protocol begins with this byte, so a stray HTTP request is known by its first one.
MAGIC = b"\xabP"
HEADER = struct.Struct("<2sBBI")

#: "PYCP", channel protocol, ABI version, pycopy version (NUL padded).
_GREETING = struct.Struct("<4sHH24s")
_GREETING_MAGIC = b"PYCP"
#: Instance, cookie, UDP port.
_HELLO_REST = struct.Struct("<QQH")
_WELCOME_REST = struct.Struct("<QBB")
_RELAYING = struct.Struct("<B")
_TOTAL = struct.Struct("<Q")

MAX_RANGES = 1024
MAX_KEYS = 1820
#: About 64 KB a frame: what one send and one receive move comfortably.
MAX_RECORDS = 585
MAX_TEXT_BYTES = 1000


class ProtocolError(Exception):
    """The peer sent something that no version of this channel says."""


class Type(IntEnum):
    """What a frame is, as the second field of its header says it."""

    HELLO = 1
    WELCOME = 2
    REFUSE = 3
    RECORDS = 4
    CLAIM = 5
    RELEASE = 6
    PING = 7
    PONG = 8
    BYE = 9
    RELAY = 10
    TAKEN = 11


class Placement(IntEnum):
    """Where the intercept sits (design: "three placements"; ``self`` has no channel)."""

    ASSISTANT = 1
    TARGET = 2


class Relaying(IntEnum):
    """Whether a replay's responses come as datagrams (``struct pycopy_datagram``)."""

    OFF = 0  #: they cannot
    PROBING = 1  #: they could: probes are sent, and a replay that gets them says ON
    ON = 2  #: they do; over the channel come those that cannot


class Range(NamedTuple):
    """A block of client addresses: 16 bytes (IPv4-mapped for IPv4), prefix bits 0..128 of them."""

    addr: bytes
    prefix_bits: int


class Hello(NamedTuple):
    """A replay introduces itself; no ranges means that it claims session by session.

    ``relay_port``: where it takes in datagrams that bear ``cookie`` (``struct
    pycopy_datagram``), 0: nowhere.
    """

    instance: int
    ranges: tuple[Range, ...] = ()
    relay_port: int = 0
    cookie: int = 0
    protocol: int = PROTOCOL
    abi: int = ABI_VERSION
    version: str = __version__

    def encode(self) -> bytes:
        """The whole frame: greeting, instance, cookie, UDP port, then 20 bytes for each range."""
        ranges = b"".join(CLAIM_KEY.pack(bits, addr) for addr, bits in self.ranges)
        return _frame(
            Type.HELLO,
            _greeting(self.protocol, self.abi, self.version)
            + _HELLO_REST.pack(self.instance, self.cookie, self.relay_port)
            + ranges,
        )


class Welcome(NamedTuple):
    """The intercept accepts a replay: what it claims is swallowed from now on."""

    instance: int
    placement: Placement
    relaying: Relaying = Relaying.OFF
    protocol: int = PROTOCOL
    abi: int = ABI_VERSION
    version: str = __version__

    def encode(self) -> bytes:
        """The whole frame: greeting, instance, placement, relaying."""
        return _frame(
            Type.WELCOME,
            _greeting(self.protocol, self.abi, self.version)
            + _WELCOME_REST.pack(self.instance, self.placement, self.relaying),
        )


class Refuse(NamedTuple):
    """The intercept does not take this replay: ``text`` is the reason, for its user."""

    text: str

    def encode(self) -> bytes:
        """The whole frame: the text in UTF-8, MAX_TEXT_BYTES of it at most."""
        # Cut by bytes: a character cut in two is replaced by the reader.
        return _frame(Type.REFUSE, self.text.encode()[:MAX_TEXT_BYTES])


class Records(NamedTuple):
    """Records for this replay. ``total`` counts every record that ever was for it on this
    connection, up to and including these: what ``total`` says beyond what has arrived was
    dropped by the intercept because the replay was too slow."""

    total: int
    records: bytes

    def encode(self) -> bytes:
        """The whole frame: ``total``, then the records, SEGMENT_BYTES each, MAX_RECORDS at most."""
        return _frame(Type.RECORDS, _TOTAL.pack(self.total) + self.records)


class Claim(NamedTuple):
    """A replay: these sessions are its own; target keys of 36 bytes (``wire.segment.KEY``)."""

    keys: tuple[bytes, ...]

    def encode(self) -> bytes:
        """The whole frame: the keys, 1 to MAX_KEYS of them."""
        return _frame(Type.CLAIM, b"".join(self.keys))


class Release(NamedTuple):
    """A replay: these sessions (keys as in :class:`Claim`) are over."""

    keys: tuple[bytes, ...]

    def encode(self) -> bytes:
        """The whole frame: the keys, 1 to MAX_KEYS of them."""
        return _frame(Type.RELEASE, b"".join(self.keys))


class Taken(NamedTuple):
    """The intercept: of the sessions just claimed, those that are another replay's already.

    The target has one connection for both, and its responses remain the other's.
    """

    keys: tuple[bytes, ...]

    def encode(self) -> bytes:
        """The whole frame: the keys, 1 to MAX_KEYS of them."""
        return _frame(Type.TAKEN, b"".join(self.keys))


class Ping(NamedTuple):
    """``total`` as in :class:`Records` (0 from a replay), so that a quiet channel is exact too."""

    total: int

    def encode(self) -> bytes:
        """The whole frame: ``total``."""
        return _frame(Type.PING, _TOTAL.pack(self.total))


class Pong(NamedTuple):
    """The answer to :class:`Ping`; ``total`` is the sender's own, as there."""

    total: int

    def encode(self) -> bytes:
        """The whole frame: ``total``."""
        return _frame(Type.PONG, _TOTAL.pack(self.total))


class Bye(NamedTuple):
    """The sender leaves, and this is the last frame; ``total`` as in :class:`Ping`."""

    total: int

    def encode(self) -> bytes:
        """The whole frame: ``total``."""
        return _frame(Type.BYE, _TOTAL.pack(self.total))


class Relay(NamedTuple):
    """The intercept: what WELCOME said of it has changed. A replay: what it wants, ON or OFF."""

    relaying: Relaying

    def encode(self) -> bytes:
        """The whole frame: one byte."""
        return _frame(Type.RELAY, _RELAYING.pack(self.relaying))


Frame = Hello | Welcome | Refuse | Records | Claim | Release | Taken | Ping | Pong | Bye | Relay

#: Per type: fixed bytes, bytes of one repeated unit (0: none), fewest and most units.
_SHAPE: dict[Type, tuple[int, int, int, int]] = {
    # By single bytes, because a later version may lay out differently what follows the greeting.
    Type.HELLO: (_GREETING.size, 1, 0, _HELLO_REST.size + MAX_RANGES * CLAIM_KEY.size),
    Type.WELCOME: (_GREETING.size, 1, 0, 256),
    Type.REFUSE: (0, 1, 0, MAX_TEXT_BYTES),
    Type.RECORDS: (_TOTAL.size, SEGMENT_BYTES, 0, MAX_RECORDS),
    Type.CLAIM: (0, KEY.size, 1, MAX_KEYS),
    Type.RELEASE: (0, KEY.size, 1, MAX_KEYS),
    Type.TAKEN: (0, KEY.size, 1, MAX_KEYS),
    Type.PING: (_TOTAL.size, 0, 0, 0),
    Type.PONG: (_TOTAL.size, 0, 0, 0),
    Type.BYE: (_TOTAL.size, 0, 0, 0),
    Type.RELAY: (_RELAYING.size, 0, 0, 0),
}

FROM_REPLAY = frozenset({Type.CLAIM, Type.RELEASE, Type.PING, Type.PONG, Type.BYE, Type.RELAY})
FROM_INTERCEPT = frozenset({Type.RECORDS, Type.TAKEN, Type.PING, Type.PONG, Type.BYE, Type.RELAY})
FIRST_FROM_REPLAY = frozenset({Type.HELLO})
FIRST_FROM_INTERCEPT = frozenset({Type.WELCOME, Type.REFUSE})


class Decoder:
    """Frames out of a byte stream that arrives in pieces of any size.

    ``accepts`` is what the peer may say now; the owner changes it when the greeting is over.
    After a :class:`ProtocolError` the decoder is dead: there is no way to find the next frame.
    """

    __slots__ = ("_buffer", "_error", "accepts")

    def __init__(self, accepts: frozenset[Type]) -> None:
        self.accepts = accepts
        self._buffer = bytearray()
        self._error = ""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that ``data`` completes; iterate to the end before feeding again.

        Raises ProtocolError at the first byte that cannot be right, after the frames before it.
        """
        if self._error:
            raise ProtocolError(self._error)
        buffer = self._buffer
        buffer += data
        at = 0
        try:
            while (kind_bytes := self._header(at)) is not None:
                kind, payload_bytes = kind_bytes
                end = at + HEADER.size + payload_bytes
                if len(buffer) < end:
                    break
                with memoryview(buffer) as view:
                    payload = bytes(view[at + HEADER.size : end])
                at = end
                yield _DECODE[kind](payload)
        except ProtocolError as error:
            self._error = str(error)
            at = len(buffer)
            raise
        finally:
            del buffer[:at]

    def _header(self, at: int) -> tuple[Type, int] | None:
        buffer = self._buffer
        start = bytes(buffer[at : at + HEADER.size])
        if start[:2] != MAGIC[: len(start)]:
            raise ProtocolError(f"not the pycopy channel: it begins with {start[:8]!r}")
        if len(start) < HEADER.size:
            return None
        _, number, zero, payload_bytes = HEADER.unpack(start)
        if number not in self.accepts or zero:
            raise ProtocolError(f"unexpected frame: {_name(number)} at this point")
        kind = Type(number)
        fixed, unit, fewest, most = _SHAPE[kind]
        units, rest = divmod(payload_bytes - fixed, unit) if unit else (0, payload_bytes - fixed)
        if rest or not fewest <= units <= most:
            raise ProtocolError(f"frame {kind.name} cannot have {payload_bytes} bytes")
        return kind, payload_bytes


def printable(text: str) -> str:
    """Text of a peer, made safe for a terminal and for one line of a log."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _name(number: int) -> str:
    try:
        return Type(number).name
    except ValueError:
        return f"type {number}"


def _frame(kind: Type, payload: bytes) -> bytes:
    return HEADER.pack(MAGIC, kind, 0, len(payload)) + payload


def _greeting(protocol: int, abi: int, version: str) -> bytes:
    return _GREETING.pack(_GREETING_MAGIC, protocol, abi, version.encode())


def _split_greeting(payload: bytes) -> tuple[int, int, str, bytes]:
    magic, protocol, abi, version = _GREETING.unpack_from(payload)
    if magic != _GREETING_MAGIC:
        raise ProtocolError(f"greeting begins with {magic!r}")
    text = version.rstrip(b"\0").decode(errors="replace")
    return protocol, abi, printable(text), payload[_GREETING.size :]


def _decode_hello(payload: bytes) -> Hello:
    protocol, abi, version, rest = _split_greeting(payload)
    if protocol != PROTOCOL:
        return Hello(0, protocol=protocol, abi=abi, version=version)
    if (len(rest) - _HELLO_REST.size) % CLAIM_KEY.size or len(rest) < _HELLO_REST.size:
        raise ProtocolError(f"frame HELLO cannot have {len(payload)} bytes")
    instance, cookie, relay_port = _HELLO_REST.unpack_from(rest)
    ranges = []
    for bits, addr in CLAIM_KEY.iter_unpack(rest[_HELLO_REST.size :]):
        if bits > 128 or int.from_bytes(addr, "big") & ((1 << (128 - bits)) - 1):
            raise ProtocolError(f"range {addr.hex()}/{bits} is not a prefix")
        ranges.append(Range(addr, bits))
    return Hello(instance, tuple(ranges), relay_port, cookie, protocol, abi, version)


def _decode_welcome(payload: bytes) -> Welcome:
    protocol, abi, version, rest = _split_greeting(payload)
    if protocol != PROTOCOL:
        return Welcome(0, Placement.ASSISTANT, Relaying.OFF, protocol, abi, version)
    if len(rest) != _WELCOME_REST.size:
        raise ProtocolError(f"frame WELCOME cannot have {len(payload)} bytes")
    instance, placement, relaying = _WELCOME_REST.unpack(rest)
    if placement not in set(Placement):
        raise ProtocolError(f"unknown placement {placement}")
    return Welcome(instance, Placement(placement), _relaying(relaying), protocol, abi, version)


def _relaying(number: int) -> Relaying:
    if number not in set(Relaying):
        raise ProtocolError(f"unknown way of relaying {number}")
    return Relaying(number)


def _keys(payload: bytes) -> tuple[bytes, ...]:
    size = KEY.size
    return tuple(payload[at : at + size] for at in range(0, len(payload), size))


_DECODE: dict[Type, Callable[[bytes], Frame]] = {
    Type.HELLO: _decode_hello,
    Type.WELCOME: _decode_welcome,
    Type.REFUSE: lambda payload: Refuse(printable(payload.decode(errors="replace"))),
    Type.RECORDS: lambda payload: Records(_TOTAL.unpack_from(payload)[0], payload[_TOTAL.size :]),
    Type.CLAIM: lambda payload: Claim(_keys(payload)),
    Type.RELEASE: lambda payload: Release(_keys(payload)),
    Type.TAKEN: lambda payload: Taken(_keys(payload)),
    Type.PING: lambda payload: Ping(*_TOTAL.unpack(payload)),
    Type.PONG: lambda payload: Pong(*_TOTAL.unpack(payload)),
    Type.BYE: lambda payload: Bye(*_TOTAL.unpack(payload)),
    Type.RELAY: lambda payload: Relay(_relaying(payload[0])),
}
