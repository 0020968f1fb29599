"""Requests to netlink as bytes: the little that is needed of it, without pyroute2.

pyroute2 would do it as well, but costs 20 MB and 100 ms: half of what this process may
weigh. Knows the framing of messages and attributes, not what they mean.
"""

import os
import socket
import struct

REQUEST, ACK, EXCL, DUMP, CREATE = 0x1, 0x4, 0x200, 0x300, 0x400

_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ERRNO = struct.Struct("=i")

#: An attribute's type without its flags (nested, network byte order).
_TYPE_MASK = 0x3FFF

#: A dump comes in pieces of 32 KB at most, a single answer may be longer.
_ANSWER_BYTES = 1 << 18


def request(
    kind: int, flags: int, body: bytes, protocol: int = socket.NETLINK_ROUTE
) -> list[bytes]:
    """Ask in the current network namespace; bodies of the answers, the kernel's no as OSError."""
    header = _HEADER.pack(_HEADER.size + len(body), kind, REQUEST | ACK | flags, 1, 0)
    answers: list[bytes] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as sock:
        sock.send(header + body)
        while True:
            data = sock.recv(_ANSWER_BYTES)
            while data:
                length, answered, *_ = _HEADER.unpack_from(data)
                content, data = data[_HEADER.size : length], data[_aligned(length) :]
                if answered == _ERROR and (error := -_ERRNO.unpack_from(content)[0]):
                    raise OSError(error, os.strerror(error))
                if answered in (_ERROR, _DONE):
                    return answers
                answers.append(content)


def attribute(kind: int, content: bytes) -> bytes:
    """A netlink attribute (``struct nlattr``): length, kind, content, padded to 4 bytes."""
    length = _ATTRIBUTE.size + len(content)
    return _ATTRIBUTE.pack(length, kind) + content + bytes(_aligned(length) - length)


def attributes(data: bytes) -> dict[int, bytes]:
    """Attributes by type; of a repeated one the last."""
    found = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]
    return found


def _aligned(length: int) -> int:
    return (length + 3) & ~3
