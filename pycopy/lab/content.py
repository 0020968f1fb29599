"""What the lab's servers say and its load expects: one endless, repeatable byte pattern.

An answer of n bytes is the first n bytes of the pattern, so that any receiver can check
every byte without being told anything but n. Request lines are made here as well, because
the same text is looked for in the servers' logs. Nothing here opens a file or a socket.

Tests: tests/unit/test_lab.py
"""

import hashlib

#: One period; its length is prime, so that no power-of-two buffer ever lines up with it.
_PERIOD = hashlib.shake_128(b"pycopy lab").digest(65_521)

MAX_CONTENT_BYTES = 64 * 1024 * 1024


def content(size_bytes: int) -> bytes:
    """The first ``size_bytes`` bytes of the pattern; ValueError beyond MAX_CONTENT_BYTES."""
    if not 0 <= size_bytes <= MAX_CONTENT_BYTES:
        raise ValueError(f"content of {size_bytes} bytes: 0 to {MAX_CONTENT_BYTES} is possible")
    whole, rest = divmod(size_bytes, len(_PERIOD))
    return _PERIOD * whole + _PERIOD[:rest]


def http_request(
    request_id: str, answer_bytes: int, upload_bytes: int = 0, *, close: bool = False
) -> bytes:
    """One HTTP/1.1 request for ``answer_bytes`` of content, body included."""
    method = "POST" if upload_bytes else "GET"
    lines = [f"{method} /b/{answer_bytes}?id={request_id} HTTP/1.1", "Host: lab.example"]
    if upload_bytes:
        lines.append(f"Content-Length: {upload_bytes}")
    if close:
        lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + content(upload_bytes)


def line_request(
    request_id: str, answer_bytes: int, upload_bytes: int = 0, *, close: bool = False
) -> bytes:
    """One request of the line protocol: ``GET n id``, ``PUT n id`` and its bytes, or ``QUIT``."""
    if close:
        return b"QUIT\r\n"
    if upload_bytes:
        return f"PUT {upload_bytes} {request_id}\r\n".encode() + content(upload_bytes)
    return f"GET {answer_bytes} {request_id}\r\n".encode()
