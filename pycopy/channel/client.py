"""The replay's end of the channel: one connection to one intercept, kept up for ever.

At start-up it connects synchronously and fails with a clear error; from then on it is driven
by the loop, comes back by itself after a loss, and names all live sessions again. What a
record means is the session engine's business.

Tests: tests/unit/test_channel.py
"""

import errno
import os
import select
import socket
import time
from collections.abc import Callable, Iterable
from enum import Enum, IntEnum
from functools import partial
from typing import Any

from pycopy.channel import codec
from pycopy.channel.codec import (
    MAX_KEYS,
    PROTOCOL,
    Bye,
    Claim,
    Frame,
    Hello,
    Ping,
    Pong,
    ProtocolError,
    Records,
    Refuse,
    Relay,
    Relaying,
    Release,
    Taken,
    Welcome,
)
from pycopy.channel.server import version_mismatch
from pycopy.channel.stream import GREETING_NS, FrameStream
from pycopy.errors import PeerError
from pycopy.kernel.abi import ABI_VERSION
from pycopy.process.loop import WRITE, Loop
from pycopy.wire.segment import KIND_TARGET, KIND_TOO_BIG, SEGMENT, Segment

_FIRST_RETRY_NS = 200_000_000
_LAST_RETRY_NS = 5_000_000_000
#: Claims that an intercept may leave unread before it counts as lost.
_MAX_UNSENT_BYTES = 8 * 1024 * 1024

_new_segment = partial(tuple.__new__, Segment)
#: As many as ``Segment.sack`` has room for; who reads them relies on it.
_MAX_SACK_BLOCKS = 4
_KINDS = frozenset((KIND_TARGET, KIND_TOO_BIG))


class State(Enum):
    """Where the connection to one intercept stands; the values are for messages."""

    WAITING = "waiting to connect again"
    CONNECTING = "connecting"
    GREETING = "greeting"
    READY = "connected"
    CLOSED = "closed"


class Count(IntEnum):
    """What ``InterceptClient.counts`` counts, over all its connections."""

    RECORDS = 0
    #: Records that the intercept had for us and dropped, because we did not read fast enough.
    DROPPED_BY_INTERCEPT = 1
    RECONNECTS = 2
    GARBAGE = 3


class InterceptClient:
    """``on_records`` gets each batch; ``on_state`` one line when the connection comes or goes.

    ``on_connected`` is called at once when :attr:`connected` changes: while it is not, nobody
    swallows responses. ``on_bye``: the intercept is about to leave; until it returns, they are.
    ``on_relaying``: what the intercept says of datagrams, first of all before ``on_connected``.
    ``on_taken``: these of the sessions that were claimed are another replay's.
    """

    def __init__(
        self,
        address: tuple[str, int],
        hello: Hello,
        loop: Loop,
        *,
        on_records: Callable[[list[Segment]], None],
        on_state: Callable[[str], None],
        on_connected: Callable[["InterceptClient"], None] = lambda client: None,
        on_bye: Callable[[], None] = lambda: None,
        on_relaying: Callable[["InterceptClient", Relaying], None] = lambda client, relaying: None,
        on_taken: Callable[[tuple[bytes, ...]], None] = lambda keys: None,
        live_claims: Callable[[], Iterable[bytes]] = tuple,
    ) -> None:
        self.host, self.port = address
        self.name = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        self._hello = hello
        self._loop = loop
        self._on_records = on_records
        self._on_state = on_state
        self._on_connected = on_connected
        self._on_bye = on_bye
        self._on_relaying = on_relaying
        self._on_taken = on_taken
        self._live_claims = live_claims
        #: Resolved once, at start-up: asking a name server would stop the loop.
        self._addresses: list[tuple[socket.AddressFamily, tuple[Any, ...]]] = []
        self._next_address = 0
        self._state = State.CLOSED
        self._retry_ns = _FIRST_RETRY_NS
        self._until_ns = 0
        self._socket: socket.socket | None = None
        self._stream: FrameStream | None = None
        #: Sessions claimed (True) or released (False) since the last flush; the last word wins.
        self._changes: dict[bytes, bool] = {}
        self._received = self._dropped = 0
        self._said = ""
        #: Within connect_blocking(), whose error says it all.
        self._starting = False
        self._refusal = ""
        #: Which process it is, whatever address it was reached at; 0 before the first greeting.
        self.instance = 0
        self.counts = [0] * len(Count)

    @property
    def connected(self) -> bool:
        """True from WELCOME to the connection's end: responses are swallowed there."""
        return self._state is State.READY

    # --- start and end ---

    def connect_blocking(self, timeout_s: float) -> None:
        """For start-up: connected when it returns; :class:`PeerError` says why not."""
        until_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        self._resolve()
        sock = self._connect_first(until_ns)
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        self._starting = True
        self._greet(sock)
        while self._state is State.GREETING:
            rest_s = (until_ns - time.monotonic_ns()) / 1e9
            if rest_s <= 0:
                self.close()
                raise PeerError(
                    f"{self.name} took the connection but does not answer as a pycopy intercept",
                    f"is it `pycopy intercept` that listens on port {self.port} there?",
                )
            if poll.poll(rest_s * 1000) and self._stream is not None:
                self._stream.receive()
        self._starting = False
        if self._state is not State.READY:
            said = self._refusal or self._said
            self.close()
            raise PeerError(
                f"intercept {self.name} did not take this replay: {said}",
                "" if self._refusal else f"is it `pycopy intercept` that listens on {self.name}?",
            )

    def start(self) -> None:
        """Like :meth:`connect_blocking`, but whether the intercept is there yet does not matter."""
        self._resolve()
        self._connect()

    def close(self) -> None:
        """Say BYE if there is somebody to hear it, and stay closed; may be called twice."""
        if self._stream is not None:
            self._stream.close(Bye(0).encode() if self.connected else b"")
        self._drop_socket()
        self._stream = None
        self._state = State.CLOSED

    # --- claims ---

    def claim(self, key: bytes) -> None:
        """This session (36 bytes, ``abi.KEY``) is ours; said at the next :meth:`flush`."""
        if not self._hello.ranges:
            self._changes[key] = True

    def release(self, key: bytes) -> None:
        """This session (36 bytes, ``wire.segment.KEY``) is over; said at the next :meth:`flush`."""
        if not self._hello.ranges:
            self._changes[key] = False

    def flush(self) -> None:
        """Send the claims and releases made since the last time (once per loop turn)."""
        stream = self._stream
        if self._state is not State.READY or stream is None:
            # On connecting, all live claims are sent anyway.
            self._changes.clear()
            return
        if not self._changes:
            return
        claims = [key for key, claimed in self._changes.items() if claimed]
        releases = [key for key, claimed in self._changes.items() if not claimed]
        self._changes.clear()
        for at in range(0, len(releases), MAX_KEYS):
            stream.send(Release(tuple(releases[at : at + MAX_KEYS])).encode())
        for at in range(0, len(claims), MAX_KEYS):
            stream.send(Claim(tuple(claims[at : at + MAX_KEYS])).encode())
        if stream.unsent_bytes > _MAX_UNSENT_BYTES:
            self.on_lost(stream, "it does not read what it is sent")
        else:
            stream.flush()

    def tell_relaying(self, wanted: Relaying) -> None:
        """Say whether our responses are to come as datagrams."""
        if self._stream is not None and self.connected:
            self._stream.send(Relay(wanted).encode())
            self._stream.flush()

    # --- timers ---

    @property
    def deadline_ns(self) -> int:
        """When :meth:`on_timer` has something to do (CLOCK_MONOTONIC)."""
        return self._stream.deadline_ns if self._stream is not None else self._until_ns

    def on_timer(self, now_ns: int) -> None:
        """Ping, give up who is silent, or connect again, as far as it is due at ``now_ns``."""
        if self._state is State.CLOSED:
            return
        if self._stream is not None:
            self._stream.on_timer(now_ns)
        elif now_ns >= self._until_ns:
            if self._state is State.CONNECTING:
                self._lose("no answer (a firewall, or no route)")
            else:
                self._connect()

    # --- what the stream says ---

    def on_frame(self, stream: FrameStream, frame: Frame) -> None:
        """Take in a frame of the intercept; ProtocolError: its records cannot be responses."""
        if isinstance(frame, Records):
            records: list[Segment] = list(map(_new_segment, SEGMENT.iter_unpack(frame.records)))
            for segment in records:
                if segment.kind not in _KINDS or segment.sack_blocks > _MAX_SACK_BLOCKS:
                    raise ProtocolError("a record that is not a target's response")
            self.counts[Count.RECORDS] += len(records)
            self._received += len(records)
            self._note_total(frame.total)
            if records:
                self._on_records(records)
        elif isinstance(frame, Ping | Pong):
            self._note_total(frame.total)
        elif isinstance(frame, Taken):
            self._on_taken(frame.keys)
        elif isinstance(frame, Relay):
            self._on_relaying(self, frame.relaying)
        elif isinstance(frame, Welcome):
            self._welcomed(stream, frame)
        elif isinstance(frame, Refuse):
            self._refusal = frame.text
            self._lose(f"refused: {frame.text}")
        elif isinstance(frame, Bye):
            self._note_total(frame.total)
            self._on_bye()
            self._lose("pycopy intercept has been stopped there")

    def on_lost(self, stream: FrameStream, reason: str) -> None:
        """The connection is gone (``reason`` is for the user): connect again later."""
        self._lose(reason)

    def on_garbage(self, stream: FrameStream, error: ProtocolError) -> None:
        """This is no intercept: ask again, but seldom."""
        self.counts[Count.GARBAGE] += 1
        self._retry_ns = _LAST_RETRY_NS
        self._lose(f"it does not speak the pycopy channel: {error}")

    def _note_total(self, total: int) -> None:
        dropped = total - self._received
        if dropped < self._dropped:
            raise ProtocolError(f"running total went back to {total}")
        self.counts[Count.DROPPED_BY_INTERCEPT] += dropped - self._dropped
        self._dropped = dropped

    def _welcomed(self, stream: FrameStream, welcome: Welcome) -> None:
        if (welcome.protocol, welcome.abi) != (PROTOCOL, ABI_VERSION):
            self._refusal = version_mismatch("intercept", welcome, "replay")
            self._lose(f"refused: {self._refusal}")
            return
        self._state = State.READY
        self._retry_ns = _FIRST_RETRY_NS
        self.instance = welcome.instance
        stream.greeting_over(codec.FROM_INTERCEPT)
        if self._said:
            self.counts[Count.RECONNECTS] += 1
            self._on_state(f"intercept {self.name}: connected again")
            self._said = ""
        self._changes = dict.fromkeys(self._live_claims(), True) if not self._hello.ranges else {}
        self.flush()
        if self.connected:
            self._on_relaying(self, welcome.relaying)
            self._on_connected(self)

    # --- connecting ---

    def _resolve(self) -> None:
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise PeerError(
                f"cannot resolve the intercept's name {self.host!r}: {reason}",
                "check the name after -s, or give its address",
            ) from None
        self._addresses = [(family, address) for family, _, _, _, address in found]

    def _connect_first(self, until_ns: int) -> socket.socket:
        """The first address that answers, as tried in turn."""
        last: OSError = TimeoutError()
        for at, (family, address) in enumerate(self._addresses):
            rest_s = max((until_ns - time.monotonic_ns()) / 1e9, 0.1)
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.settimeout(rest_s / (len(self._addresses) - at))
            try:
                sock.connect(address)
                self._next_address = at
                return sock
            except OSError as error:
                sock.close()
                last = error
        if isinstance(last, ConnectionRefusedError):
            raise PeerError(
                f"{self.name} refused the connection: nothing listens there",
                f"is `pycopy intercept` running on {self.host}? It listens on port {self.port} "
                "only if that is its -p",
            )
        if isinstance(last, TimeoutError) or last.errno == errno.ETIMEDOUT:
            raise PeerError(
                f"no answer from intercept {self.name}",
                f"check the route to {self.host} and that no firewall drops TCP port {self.port}",
            )
        raise PeerError(
            f"cannot connect to intercept {self.name}: {last.strerror}",
            f"check the address after -s and the route to {self.host}",
        )

    def _connect(self) -> None:
        family, address = self._addresses[self._next_address % len(self._addresses)]
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._state = State.CONNECTING
        self._until_ns = time.monotonic_ns() + GREETING_NS
        error = sock.connect_ex(address)
        if error not in (0, errno.EINPROGRESS):
            sock.close()
            self._lose(os.strerror(error))
            return
        self._socket = sock
        self._loop.add(sock.fileno(), WRITE, self._on_connect)

    def _on_connect(self, _events: int) -> None:
        sock = self._socket
        if sock is None:
            return
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self._lose(os.strerror(error))
            return
        self._loop.remove(sock.fileno())
        self._socket = None
        self._greet(sock)

    def _greet(self, sock: socket.socket) -> None:
        self._state = State.GREETING
        self._refusal = ""
        self._received = self._dropped = 0
        stream = FrameStream(sock, self._loop, self, codec.FIRST_FROM_INTERCEPT)
        self._stream = stream
        stream.send(self._hello.encode())
        stream.flush()

    def _lose(self, reason: str) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._drop_socket()
        was_connected = self.connected
        self._state = State.WAITING
        if was_connected:
            self._on_connected(self)
        self._until_ns = time.monotonic_ns() + self._retry_ns
        self._retry_ns = min(self._retry_ns * 2, _LAST_RETRY_NS)
        self._next_address += 1
        if reason != self._said:
            self._said = reason
            if not self._starting:
                self._on_state(f"intercept {self.name}: {reason}; trying again")

    def _drop_socket(self) -> None:
        if self._socket is not None:
            self._loop.remove(self._socket.fileno())
            self._socket.close()
            self._socket = None
