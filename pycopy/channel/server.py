"""The intercept's end of the channel: takes in replays and hands each its own records.

Nothing a peer does may hold up another: all sockets are non-blocking, every queue and table
is bounded, and who says nothing, nonsense or too little is shown out. What a claim means for
the kernel is the owner's business (``on_hello``).

Tests: tests/unit/test_channel.py
"""

import socket
import time
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Any

from pycopy import __version__
from pycopy.channel import codec
from pycopy.channel.codec import (
    MAX_RECORDS,
    PROTOCOL,
    Bye,
    Claim,
    Frame,
    Hello,
    Placement,
    ProtocolError,
    Records,
    Refuse,
    Relay,
    Relaying,
    Release,
    Taken,
    Welcome,
)
from pycopy.channel.listen import listen
from pycopy.channel.routes import Routes
from pycopy.channel.stream import FrameStream
from pycopy.kernel.abi import ABI_VERSION
from pycopy.process.loop import NEVER_NS, READ, Loop
from pycopy.wire.segment import SEGMENT_BYTES

MAX_REPLAYS = 64
#: Connections that have not said HELLO yet; the oldest makes room for a newcomer.
MAX_STRANGERS = 64
#: Unsent bytes a replay may have; what comes on top is dropped and counted.
MAX_UNSENT_BYTES = 8 * 1024 * 1024

#: Where ``pycopy_key`` and its client address lie in a record.
_KEY_AT = SEGMENT_BYTES - 32 - 36
_ADDR_END = _KEY_AT + 16
_KEY_END = _KEY_AT + 36

_ACCEPTS_A_TURN = 16
_COMPLAINT_GAP_NS = 1_000_000_000


class Fate(IntEnum):
    """What became of a response record, exactly one each."""

    TO_RANGE = 0
    TO_CLAIM = 1
    TO_ALL = 2
    NO_REPLAY = 3
    REPLAY_SLOW = 4


class Visit(IntEnum):
    """Connections: those ACCEPTED are there now or have ended in one of the ways from LEFT on."""

    ACCEPTED = 0
    WELCOMED = 1
    LEFT = 2
    LOST = 3
    REPLACED = 4
    GARBAGE = 5
    OTHER_VERSION = 6
    REFUSED = 7
    NO_HELLO = 8


class Refusal(Exception):
    """Raised by ``on_hello``: this replay cannot be served, and why."""


class Peer(FrameStream):
    """A connection, and what the intercept keeps about the replay behind it."""

    __slots__ = ("batch", "dropped", "instance", "name", "ranged", "room")

    def __init__(
        self, sock: socket.socket, loop: Loop, handler: "ChannelServer", name: str
    ) -> None:
        super().__init__(sock, loop, handler, codec.FIRST_FROM_REPLAY)
        self.name = name
        self.instance = 0
        self.ranged = False
        self.batch: list[bytes] = []
        self.room = MAX_UNSENT_BYTES
        self.dropped = 0

    def tell_relaying(self, relaying: Relaying) -> None:
        """Whether its responses come as datagrams has changed."""
        self.send(Relay(relaying).encode())
        self.flush()


class ChannelServer:
    """Listens at once, serves while the loop runs; ``deadline_ns``/``on_timer`` for its timers."""

    def __init__(
        self,
        loop: Loop,
        bind: str,
        port: int,
        *,
        placement: Placement,
        instance: int,
        on_hello: Callable[[Hello, str], None],
        log: Callable[[str], None],
        on_welcome: Callable[["Peer", Hello], Relaying] = lambda replay, hello: Relaying.OFF,
        on_relay: Callable[["Peer", Relaying], None] = lambda replay, wanted: None,
        on_leave: Callable[["Peer"], None] = lambda replay: None,
    ) -> None:
        """``on_welcome`` says whether the replay's responses are relayed, ``on_relay`` hears
        whether it wants that; a change is for :meth:`Peer.tell_relaying`."""
        self._loop = loop
        self._placement = placement
        self._instance = instance
        self._on_hello = on_hello
        self._log = log
        self._on_welcome = on_welcome
        self._on_relay = on_relay
        self._on_leave = on_leave
        self._complained_ns = 0
        self._complaints_unsaid = 0
        self._closing = False
        self._strangers: dict[Peer, None] = {}
        self._replays: dict[Peer, None] = {}
        self.routes: Routes[Peer] = Routes()
        self.fates = [0] * len(Fate)
        self.visits = [0] * len(Visit)
        #: Copies for replays that have gone: made, sent, dropped because slow, lost unsent.
        self._gone_made = self._gone_sent = self._gone_dropped = self._gone_unsent = 0
        self._listener = listen(bind, port)
        self.port: int = self._listener.getsockname()[1]
        loop.add(self._listener.fileno(), READ, self._on_accept)

    # --- records ---

    def forward(self, records: Iterable[bytes]) -> None:
        """Route one drain of the ring (each record ``SEGMENT_BYTES`` long) and send it."""
        routes, fates = self.routes, self.fates
        by_addr, claims = routes.by_addr, routes.claims
        per_session, has_ranges = routes.per_session, routes.has_ranges
        for replay in self._replays:
            replay.room = MAX_UNSENT_BYTES - replay.unsent_bytes
        for record in records:
            replays: tuple[Peer, ...] | None = None
            fate = Fate.TO_RANGE
            if has_ranges:
                addr = record[_KEY_AT:_ADDR_END]
                replays = by_addr.get(addr)
                if replays is None:
                    replays = routes.owners_by_range(addr)
            if not replays:
                owner = claims.get(record[_KEY_AT:_KEY_END])
                if owner is not None:
                    replays = (owner,)
                    fate = Fate.TO_CLAIM
                elif per_session:
                    # Not claimed yet, or not any more: who knows the session will know it.
                    replays = per_session
                    fate = Fate.TO_ALL
                else:
                    fates[Fate.NO_REPLAY] += 1
                    continue
            taken = False
            for replay in replays:
                replay.total += 1
                if replay.room > 0:
                    replay.room -= SEGMENT_BYTES
                    replay.batch.append(record)
                    taken = True
                else:
                    replay.dropped += 1
            fates[fate if taken else Fate.REPLAY_SLOW] += 1
        # A failed send removes the replay from the table.
        for replay in list(self._replays):
            if replay.batch:
                self._send_batch(replay)

    def _send_batch(self, replay: Peer) -> None:
        batch = replay.batch
        for at in range(0, len(batch), MAX_RECORDS):
            piece = batch[at : at + MAX_RECORDS]
            # What was dropped in this turn is told by the first frame already.
            to_come = len(batch) - at - len(piece)
            frame = Records(replay.total - to_come, b"".join(piece))
            replay.send(frame.encode(), len(piece))
        batch.clear()
        replay.flush()

    # --- connections ---

    def _on_accept(self, _events: int) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            try:
                sock, address = self._listener.accept()
            except OSError:
                return
            self._take_in(sock, address)

    def _take_in(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        self.visits[Visit.ACCEPTED] += 1
        if len(self._strangers) >= MAX_STRANGERS:
            self._show_out(next(iter(self._strangers)), Visit.NO_HELLO, "")
        host = address[0].removeprefix("::ffff:")
        name = f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
        self._strangers[Peer(sock, self._loop, self, name)] = None

    def on_frame(self, stream: FrameStream, frame: Frame) -> None:
        """Take in a frame of a peer; raises ProtocolError for what it may not say."""
        assert isinstance(stream, Peer)
        if self._closing and not isinstance(frame, Bye):
            return
        if isinstance(frame, Claim | Release):
            if stream.ranged:
                raise ProtocolError("a replay that named its ranges claims sessions")
            if isinstance(frame, Claim):
                taken = self.routes.claim(stream, frame.keys)
                if taken and stream.unsent_bytes < MAX_UNSENT_BYTES:
                    stream.send(Taken(tuple(taken)).encode())
                    stream.flush()
            else:
                self.routes.release(stream, frame.keys)
        elif isinstance(frame, Hello):
            self._welcome(stream, frame)
        elif isinstance(frame, Relay):
            self._on_relay(stream, frame.relaying)
        elif isinstance(frame, Bye):
            self._show_out(stream, Visit.LEFT, "")
            self._log(f"replay {stream.name} has left")

    def on_lost(self, stream: FrameStream, reason: str) -> None:
        """A peer's connection is gone (``reason`` is for the log)."""
        assert isinstance(stream, Peer)
        if stream in self._strangers:
            self._show_out(stream, Visit.NO_HELLO, "")
            self._complain(f"{stream.name} connected but said no HELLO: {reason}")
        elif self._closing:
            self._show_out(stream, Visit.LEFT, "")
        else:
            self._show_out(stream, Visit.LOST, "")
            self._log(f"replay {stream.name} is lost: {reason}")

    def on_garbage(self, stream: FrameStream, error: ProtocolError) -> None:
        """A peer is no pycopy replay: tell it, and close."""
        assert isinstance(stream, Peer)
        self._show_out(stream, Visit.GARBAGE, f"this is a pycopy intercept; {error}")
        self._complain(f"{stream.name} does not speak the pycopy channel, closed: {error}")

    def _welcome(self, replay: Peer, hello: Hello) -> None:
        if (hello.protocol, hello.abi) != (PROTOCOL, ABI_VERSION):
            text = version_mismatch("replay", hello, "intercept")
            self._show_out(replay, Visit.OTHER_VERSION, text)
            self._complain(f"{replay.name} refused: {text}")
            return
        for other in [other for other in self._replays if other.instance == hello.instance]:
            # The same process connected anew before we noticed that its old connection is dead.
            self._show_out(other, Visit.REPLACED, "")
        try:
            if len(self._replays) >= MAX_REPLAYS:
                raise Refusal(f"{MAX_REPLAYS} replays are connected already")
            self._on_hello(hello, replay.name)
        except Refusal as refusal:
            self._show_out(replay, Visit.REFUSED, str(refusal))
            self._complain(f"{replay.name} refused: {refusal}")
            return
        self.visits[Visit.WELCOMED] += 1
        del self._strangers[replay]
        self._replays[replay] = None
        replay.instance = hello.instance
        replay.ranged = bool(hello.ranges)
        self.routes.add(replay, hello.ranges)
        replay.greeting_over(codec.FROM_REPLAY)
        relaying = self._on_welcome(replay, hello)
        replay.send(Welcome(self._instance, self._placement, relaying).encode())
        replay.flush()

    def _show_out(self, replay: Peer, visit: Visit, refusal: str) -> None:
        self.visits[visit] += 1
        self._strangers.pop(replay, None)
        if replay in self._replays:
            del self._replays[replay]
            self.routes.remove(replay)
            self._on_leave(replay)
        replay.close(Refuse(refusal).encode() if refusal else b"")
        self._gone_made += replay.total
        self._gone_sent += replay.records_sent
        self._gone_dropped += replay.dropped
        self._gone_unsent += replay.unsent_records + len(replay.batch)

    def _complain(self, text: str) -> None:
        """One line about a stranger; in a flood of them, one line a second."""
        now_ns = time.monotonic_ns()
        if now_ns - self._complained_ns < _COMPLAINT_GAP_NS:
            self._complaints_unsaid += 1
            return
        more = f" (and {self._complaints_unsaid} more before)" if self._complaints_unsaid else ""
        self._complained_ns, self._complaints_unsaid = now_ns, 0
        self._log(text + more)

    # --- timers, end, report ---

    @property
    def deadline_ns(self) -> int:
        """When :meth:`on_timer` has something to do (CLOCK_MONOTONIC)."""
        peers = (*self._strangers, *self._replays)
        return min((peer.deadline_ns for peer in peers), default=NEVER_NS)

    def on_timer(self, now_ns: int) -> None:
        """Ping peers and give up silent ones, as far as it is due at ``now_ns``."""
        for replay in (*self._strangers, *self._replays):
            if not replay.closed:
                replay.on_timer(now_ns)

    def close(self, patience_s: float = 1.0) -> None:
        """Stop listening, say BYE behind what is queued, and run the loop until every replay
        has left: what they still cause is for nobody, and has to be swallowed."""
        if self._listener.fileno() < 0:
            return
        self._closing = True
        self._loop.remove(self._listener.fileno())
        self._listener.close()
        for replay in list(self._strangers):
            self._show_out(replay, Visit.NO_HELLO, "")
        for replay in list(self._replays):
            self.routes.remove(replay)
            replay.send(Bye(replay.total).encode())
            replay.flush()
        until_ns = time.monotonic_ns() + int(patience_s * 1e9)
        while self._replays and time.monotonic_ns() < until_ns:
            self._loop.wait(until_ns)
        for replay in list(self._replays):
            self._show_out(replay, Visit.LEFT, "")

    def snapshot(self) -> dict[str, dict[str, int]]:
        """Copies of records (one response may go to several replays), connections, claims."""
        replays = list(self._replays)
        copies = {
            "made": self._gone_made + sum(replay.total for replay in replays),
            "sent": self._gone_sent + sum(replay.records_sent for replay in replays),
            "queued": sum(replay.unsent_records for replay in replays),
            "dropped_slow": self._gone_dropped + sum(replay.dropped for replay in replays),
            "lost_with_replay": self._gone_unsent,
        }
        connections = {
            "replays": len(replays),
            "strangers": len(self._strangers),
            **{visit.name.lower(): self.visits[visit] for visit in Visit},
        }
        claims = {
            "sessions": len(self.routes.claims),
            "refused": self.routes.refused,
            "evicted": self.routes.evicted,
        }
        return {"copies": copies, "connections": connections, "claims": claims}

    def balance(self) -> list[str]:
        """What does not add up, in words; empty is balanced. Between loop turns only."""
        shot = self.snapshot()
        wrong = []
        made, *ends = shot["copies"].values()
        if made != sum(ends):
            wrong.append(f"{made} copies were made, but what became of them sums to {sum(ends)}")
        here = len(self._replays) + len(self._strangers)
        accepted, ended = self.visits[Visit.ACCEPTED], sum(self.visits[Visit.LEFT :])
        if accepted != here + ended:
            wrong.append(f"{accepted} connections, but {here} are there and {ended} have ended")
        return wrong


def version_mismatch(peer_role: str, peer: Hello | Welcome, own_role: str) -> str:
    """Both versions, and which side is the older one."""
    older = peer_role if (peer.protocol, peer.abi) < (PROTOCOL, ABI_VERSION) else own_role
    return (
        f"this {own_role} is pycopy {__version__} (channel {PROTOCOL}, records {ABI_VERSION}), "
        f"the {peer_role} is pycopy {peer.version} (channel {peer.protocol}, records {peer.abi}): "
        f"upgrade pycopy on the {older}'s host"
    )
