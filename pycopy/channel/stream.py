"""A connected socket that carries frames: non-blocking, bounded, and never silent for long.

Both ends of the channel are made of this. It knows bytes, the send queue and the heart-beat;
what a frame means is its handler's business.
"""

import socket
import time
from collections import deque
from itertools import islice
from typing import Any, Protocol

from pycopy.channel.codec import Decoder, Frame, Ping, Pong, ProtocolError, Type
from pycopy.process.loop import READ, WRITE, Loop

#: Greeting to be over within this; silence after which a peer counts as dead.
GREETING_NS = 5_000_000_000
DEAD_NS = 5_000_000_000
#: Silence after which the peer is asked for a sign of life.
PING_NS = 1_000_000_000

_RECV_BYTES = 256 * 1024
#: Chunks handed to one sendmsg (IOV_MAX is 1024).
_SEND_CHUNKS = 64


class Handler(Protocol):
    """Who owns the stream. After ``on_lost`` or ``on_garbage`` the owner closes it."""

    def on_frame(self, stream: "FrameStream", frame: Frame) -> None:
        """A whole frame has arrived; a ProtocolError raised here comes back by ``on_garbage``."""

    def on_lost(self, stream: "FrameStream", reason: str) -> None:
        """The connection is of no use any more; ``reason`` is a phrase for a message."""

    def on_garbage(self, stream: "FrameStream", error: ProtocolError) -> None:
        """The peer said what this channel does not say."""


class FrameStream:
    """One connection; ``handler`` hears of every frame, PING and PONG included."""

    __slots__ = (
        "_decoder", "_handler", "_last_heard_ns", "_loop", "_opened_ns", "_pinged", "_queue",
        "_sock", "_want_write", "greeted", "records_sent", "total", "unsent_bytes",
        "unsent_records",
    )  # fmt: skip

    def __init__(
        self, sock: socket.socket, loop: Loop, handler: Handler, accepts: frozenset[Type]
    ) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._loop = loop
        self._handler = handler
        self._decoder = Decoder(accepts)
        #: Chunks not yet sent, each with the records it completes.
        self._queue: deque[tuple[bytes | memoryview, int]] = deque()
        self._want_write = False
        self._opened_ns = self._last_heard_ns = time.monotonic_ns()
        self._pinged = False
        self.greeted = False
        #: What PING, PONG and BYE carry; the intercept counts here what is meant for this peer.
        self.total = 0
        self.unsent_bytes = 0
        self.unsent_records = 0
        self.records_sent = 0
        loop.add(sock.fileno(), READ, self._on_event)

    @property
    def closed(self) -> bool:
        """True once :meth:`close` was called."""
        return self._sock.fileno() < 0

    def ends(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Our address and the peer's, as the socket has them (host, port, ...); raises OSError."""
        return self._sock.getsockname(), self._sock.getpeername()

    def greeting_over(self, accepts: frozenset[Type]) -> None:
        """From now on the peer may say ``accepts``, and is expected to stay audible."""
        self.greeted = True
        self._decoder.accepts = accepts

    @property
    def deadline_ns(self) -> int:
        """When :meth:`on_timer` has something to do (CLOCK_MONOTONIC)."""
        if not self.greeted:
            return self._opened_ns + GREETING_NS
        return self._last_heard_ns + (DEAD_NS if self._pinged else PING_NS)

    def on_timer(self, now_ns: int) -> None:
        """Ping a silent peer; tell the handler of one that was silent for too long."""
        if now_ns < self.deadline_ns:
            return
        # If it is us who were asleep, its signs of life are waiting in the socket.
        self.receive()
        if self.closed or now_ns < self.deadline_ns:
            return
        if not self.greeted:
            self._handler.on_lost(self, f"no greeting within {GREETING_NS // 10**9} s")
        elif self._pinged:
            self._handler.on_lost(self, f"silent for {DEAD_NS // 10**9} s")
        else:
            self._pinged = True
            self.send(Ping(self.total).encode())
            self.flush()

    def send(self, chunk: bytes, records: int = 0) -> None:
        """Queue one frame; :meth:`flush` sends. The bound is the owner's to keep."""
        self._queue.append((chunk, records))
        self.unsent_bytes += len(chunk)
        self.unsent_records += records

    def flush(self) -> None:
        """Send what the socket takes; the rest goes when it is writable."""
        queue = self._queue
        try:
            while queue:
                sent = self._sock.sendmsg([chunk for chunk, _ in islice(queue, _SEND_CHUNKS)])
                self._forget(sent)
        except BlockingIOError:
            pass
        except OSError as error:
            self._handler.on_lost(self, error.strerror or str(error))
            return
        if bool(queue) != self._want_write:
            self._want_write = bool(queue)
            self._loop.change(self._sock.fileno(), READ | WRITE if queue else READ)

    def close(self, last: bytes = b"") -> None:
        """Forget the connection; ``last`` goes out first if nothing is in its way."""
        if self.closed:
            return
        self._loop.remove(self._sock.fileno())
        try:
            # Not after half a frame, and never waiting for the peer.
            if last:
                self._send_rest()
                self._sock.send(last)
            self._sock.shutdown(socket.SHUT_WR)
            # With unread bytes the kernel would send RST, which can overtake ``last``.
            self._sock.recv(_RECV_BYTES)
        except OSError:
            pass
        self._sock.close()

    def _send_rest(self) -> None:
        while self._queue:
            self._forget(self._sock.send(self._queue[0][0]))

    def _forget(self, sent_bytes: int) -> None:
        self.unsent_bytes -= sent_bytes
        queue = self._queue
        while sent_bytes:
            chunk, records = queue[0]
            if sent_bytes < len(chunk):
                queue[0] = (memoryview(chunk)[sent_bytes:], records)
                return
            sent_bytes -= len(chunk)
            self.records_sent += records
            self.unsent_records -= records
            queue.popleft()

    def _on_event(self, events: int) -> None:
        if events & ~WRITE:
            self.receive()
        if events & WRITE and not self.closed:
            self.flush()

    def receive(self) -> None:
        """Read once and hand what is whole to the handler, which hears of errors as well."""
        # One read a turn: a peer that never stops talking must not hold up the others.
        try:
            data = self._sock.recv(_RECV_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._handler.on_lost(self, error.strerror or str(error))
            return
        if not data:
            self._handler.on_lost(self, "closed by the other side")
            return
        self._last_heard_ns = time.monotonic_ns()
        self._pinged = False
        try:
            for frame in self._decoder.feed(data):
                # A queue is a sign of life by itself, and a peer that sends PING but never
                # reads must not make it grow.
                if type(frame) is Ping and not self._queue:
                    self.send(Pong(self.total).encode())
                    self.flush()
                if not self.closed:
                    self._handler.on_frame(self, frame)
                if self.closed:
                    return
        except ProtocolError as error:
            self._handler.on_garbage(self, error)
