"""One copied connection: a TCP client whose bytes come from the capture.

In: ``on_client_segment``, ``on_target_segment``, ``on_timer`` (all with the time as an
argument). Out: :class:`Emission` tuples on the host's outbox, and ``deadline_ns``, when to
call ``on_timer``. What the target sends is handled in arrival.py, what we send in
departure.py, the loss of the connection in losing.py; each rule stands in the module named
after it, this file only puts them in order. A session that loses its connection early does
not open another: the host does (``reopen``), since a connection is what a session is.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from pycopy.session import arrival, departure, losing, pathmtu, receiving, release, stream
from pycopy.session.fates import Fate, ResponseFate, Tallies
from pycopy.session.keeper import Owner
from pycopy.session.rules import MS, Rules
from pycopy.session.states import TRANSITIONS, Event, Outcome, State
from pycopy.session.stream import Offer
from pycopy.session.views import AT_ONCE, NEVER, NO_POSITION, Chunk, Online, Target, unwrap
from pycopy.wire.segment import ACK, FIN, RST, SYN, Segment
from pycopy.wire.seq import MASK


class Emission(NamedTuple):
    """A segment to send, in the target's numbers; its headers are rewrite.py's business."""

    session: "Session"
    flags: int
    seq: int
    ack: int
    tsval: int
    data: bytes


class Host(Protocol):
    """What a session needs of the table it lives in."""

    rules: Rules
    ledger: Tallies
    outbox: list[Emission]
    owner: Owner
    refusing: Fate | None

    def schedule(self, session: "Session") -> None:
        """Call ``on_timer`` at the session's deadline."""

    def reopen(self, session: "Session", online: Online, now_ns: int) -> None:
        """Send ``online``, what is left of the client's stream, over a new connection."""

    def detach(self, session: "Session") -> None:
        """The client's segments are no longer this session's."""

    def ended(self, session: "Session", outcome: Outcome) -> None:
        """The session has its outcome; the target may still have something to say."""

    def linger(self, session: "Session", until_ns: int) -> None:
        """Hand it the target's segments until then, and call ``expire``."""

    def forget(self, session: "Session") -> None:
        """There is nothing more to be done for it."""


class Session:
    """See the module. ``key`` is the connection online, ``target_key`` the one to the target."""

    __slots__ = (
        "ack_at", "attempts", "deadline_ns", "family", "flow", "gap_at", "hop", "host", "key",
        "last_client_ns", "lost_to", "online", "outcome", "progress_ns", "quiet_at", "reset_for",
        "rto_at", "scheduled_ns", "service", "state", "target", "target_key",
    )  # fmt: skip

    def __init__(
        self, host: Host, key: bytes, target_key: bytes, family: int, service: int,
        online: Online, target: Target, now_ns: int,
    ) -> None:  # fmt: skip
        self.host = host
        self.key = key
        self.target_key = target_key
        self.family = family
        self.service = service
        self.online = online
        self.target = target
        self.state = State.CLOSED
        #: How it ended; None while it lives.
        self.outcome: Outcome | None = None
        #: Why the connection is gone while the client's goes on.
        self.lost_to = Outcome.TARGET_RESET
        #: What a RST at the end of the queue will have ended.
        self.reset_for = Outcome.CLIENT_RESET
        #: Deadlines of the timers, NEVER when not running.
        self.rto_at = self.ack_at = self.quiet_at = self.gap_at = NEVER
        self.deadline_ns = NEVER
        #: The deadline the host has in its queue for us.
        self.scheduled_ns = NEVER
        self.last_client_ns = now_ns
        #: When the target last acknowledged or sent something new. Not when it was last
        #: heard: one that answers every window probe and never reads must not live for ever.
        self.progress_ns = now_ns
        #: Consecutive timeouts without any progress.
        self.attempts = 0
        #: The sender's own: constant header parts and next hop. It makes them when missing.
        self.flow: Any = None
        self.hop: Any = None

    # -- in ---------------------------------------------------------------------------

    def open(self, now_ns: int) -> None:
        """Send the SYN, one position before the first byte of the queue."""
        syn = Chunk(self.target.snd_una, b"", SYN, 0, now_ns)
        syn.end += 1
        self.move(Event.OPEN)
        departure.transmit(self, syn, now_ns)
        self._settle(now_ns)

    def change_port(self, target_key: bytes, now_ns: int) -> None:
        """Send the SYN anew, as of another connection; what it costs is one attempt."""
        target, attempts = self.target, self.attempts
        self.target_key = target_key
        self.flow = self.hop = None
        target.rto_ns = self.host.rules.rto_initial_ns
        target.recovery_end = NO_POSITION
        syn = target.flight.pop()
        syn.resent = False
        departure.transmit(self, syn, now_ns)
        self.attempts = attempts + 1
        self._settle(now_ns)

    def on_client_segment(self, seg: Segment, payload: bytes, now_ns: int) -> None:
        """Take in a captured segment of the client; any but the SYN that opened the session."""
        self.last_client_ns = now_ns
        online = self.online
        flags, acked = seg.tcp_flags, online.rcv_nxt
        if flags & ACK:
            if online.irs is None:
                online.irs = (seg.ack - 1) & MASK
                if not payload:
                    online.rtt_ns = seg.time_ns - online.asked_ns
            acked = unwrap(acked, online.irs, seg.ack)
            if acked > online.rcv_nxt:
                online.rcv_nxt = acked
            elif acked < 1 and not flags & RST:
                acked = release.count_from(online, self.target, acked)
        if payload or flags & (FIN | RST):
            # Its own ack: a later segment with a higher one may have been captured first.
            pos = unwrap(online.snd_nxt, online.iss, seg.seq)
            self._take(Chunk(pos, payload, flags, acked - 1, seg.time_ns), now_ns)
        else:
            self.host.ledger.fates[Fate.STEERED] += 1
        self._turn(now_ns)

    def on_target_segment(self, seg: Segment, now_ns: int) -> ResponseFate:
        """Take in a response of the target, or what the intercept left of it."""
        state = self.state
        if state is State.CLOSED:
            return arrival.in_closed(self, seg, now_ns)
        if state is State.SYN_SENT:
            fate = arrival.in_syn_sent(self, seg, now_ns)
        else:
            fate = arrival.in_synchronized(self, seg, now_ns)
        self._turn(now_ns)
        return fate

    def on_too_big(self, seg: Segment, now_ns: int) -> ResponseFate:
        """Take in what a router says of a segment of ours (``KIND_TOO_BIG``)."""
        fate = pathmtu.on_too_big(self, seg, now_ns)
        self._turn(now_ns)
        return fate

    def lower_mtu(self, mtu: int, now_ns: int) -> None:
        """This host itself cannot send larger packets than ``mtu`` on this way."""
        pathmtu.lower(self, mtu, now_ns)
        self._turn(now_ns)

    def on_timer(self, now_ns: int) -> None:
        """Do what is due; call it at ``deadline_ns`` or later."""
        if now_ns >= self.gap_at:
            self._on_gap(now_ns)
        if now_ns >= self.rto_at:
            departure.on_timeout(self, now_ns)
        self._turn(now_ns)

    def on_sweep(self, now_ns: int) -> None:
        """Check the long limits (-t, -k); called every few seconds."""
        rules, target = self.host.rules, self.target
        waiting = target.flight or self.online.queue
        if waiting:
            silent_ns = now_ns - max(self.progress_ns, waiting[0].time_ns)
            if silent_ns >= rules.response_idle_ns:
                self.end(Outcome.TARGET_SILENT, Fate.DROPPED_TARGET_SILENT, now_ns)
            elif silent_ns >= rules.keepalive_ns and not target.flight:
                # Is the target still thinking, or did its response and its RST get lost?
                self.emit(0, target.snd_una - 1, b"", now_ns)
            return
        last_ns = self.last_client_ns
        if self.state is not State.FIN_WAIT_2:
            last_ns = max(last_ns, self.progress_ns)
        # In FIN_WAIT_2 the client has said all it had to say, and the target has it: one
        # that goes on sending for ever is not waited for.
        if now_ns - last_ns >= rules.idle_ns:
            self.end(Outcome.IDLE, Fate.DROPPED_IDLE, now_ns)
        elif now_ns - last_ns >= rules.keepalive_ns:
            self.flow = self.hop = None  # a fifth of what an idle session costs

    # -- the client's side ----------------------------------------------------------------

    def _take(self, chunk: Chunk, now_ns: int) -> None:
        """Put a captured segment into the stream and give it its first fate."""
        online, host = self.online, self.host
        fates = host.ledger.fates
        before = online.snd_nxt
        if chunk.flags & RST:
            offer = stream.offer_reset(online, chunk)
            if offer is Offer.IN_ORDER:
                self.drop_early(Fate.DROPPED_CLIENT_RESET)
        else:
            offer = stream.offer(online, chunk)
        if offer is Offer.DUPLICATE or offer is Offer.OUTSIDE:
            fates[Fate.DUPLICATE if offer is Offer.DUPLICATE else Fate.OUTSIDE_WINDOW] += 1
            return
        fates[Fate.HELD] += 1
        if online.early:
            self.ripen()
            if self.gap_at == NEVER or online.snd_nxt != before:
                self.gap_at = now_ns + host.rules.gap_ns
        if not online.early:
            self.gap_at = NEVER
        rules = host.rules
        bytes_allowed = rules.queue_bytes
        if host.refusing is Fate.REFUSED_MEMORY_LIMIT:
            bytes_allowed //= rules.short_of_memory
        held = len(online.queue) + len(online.early)
        if held > rules.queue_segments or online.held_bytes > bytes_allowed:
            self.end(Outcome.QUEUE_FULL, Fate.DROPPED_QUEUE_FULL, now_ns)

    def ripen(self) -> None:
        """Move what is no longer early to the queue."""
        fates = self.host.ledger.fates
        repeats = stream.ripen(self.online)
        fates[Fate.HELD] -= repeats
        fates[Fate.DUPLICATE] += repeats

    def drop_early(self, fate: Fate) -> None:
        """What is beyond a gap will never be sent."""
        online = self.online
        self._drop(online.early, fate)
        online.early = ()

    def drop_queue(self, number: int, fate: Fate) -> None:
        """The first ``number`` chunks in order will never be sent."""
        queue = self.online.queue
        self._drop(queue[:number], fate)
        del queue[:number]

    def _drop(self, chunks: Sequence[Chunk], fate: Fate) -> None:
        drop(chunks, fate, self.host.ledger)
        self.online.held_bytes -= sum(len(chunk.data) for chunk in chunks)

    def withdraw_reset(self) -> None:
        """The client repeats its SYN: a RST that is still held was not meant for this connection.

        A server in TIME_WAIT answers a SYN for the connection before; the client resets that
        (RFC 9293 3.10.7.3), and asks again.
        """
        queue = self.online.queue
        if queue and queue[-1].flags & RST and self.reset_for is Outcome.CLIENT_RESET:
            self._drop([queue.pop()], Fate.DROPPED_CLIENT_RESET)

    def _on_gap(self, now_ns: int) -> None:
        """Bytes of the client were not captured. Deliver what is whole, and go on behind them."""
        online, early = self.online, self.online.early
        lost = stream.next_request(early)
        online.early = early[:lost]
        successor = stream.resume(online, early[lost:])
        self.cut_off(Outcome.GAP, Fate.DROPPED_GAP, now_ns)
        self.host.reopen(self, successor, now_ns)

    def cut_off(self, why: Outcome, fate: Fate, now_ns: int) -> None:
        """The client's stream ends here, unfinished: what is in order still goes out, then RST."""
        self.host.detach(self)
        online = self.online
        self.drop_early(fate)
        reset = Chunk(online.snd_nxt, b"", RST, max(online.queue_need, 0), now_ns)
        reset.records = 0
        online.queue.append(reset)
        self.reset_for = why
        self.gap_at = NEVER
        self._turn(now_ns)

    # -- the end --------------------------------------------------------------------------

    def end(self, outcome: Outcome, fate: Fate, now_ns: int) -> None:
        """Close for good: what is held gets ``fate``, an open connection to the target RST."""
        self.drop_early(fate)
        self.drop_queue(len(self.online.queue), fate)
        state = self.state
        if state is not State.CLOSED:
            if state is not State.SYN_SENT and state is not State.TIME_WAIT:
                self.emit(RST, self.target.snd_nxt, b"", now_ns)
            self.move(Event.ABORT)
        self._finish(outcome)
        # The RST may be lost, or the SYN be answered only now: see arrival.in_closed.
        self.wait(now_ns)

    def wait(self, now_ns: int) -> None:
        """TIME_WAIT, or the like of it after a reset: stay to answer what the target repeats."""
        self.host.linger(self, now_ns + self.host.rules.time_wait_ns)

    def closed(self, now_ns: int) -> None:
        """Both sides have closed, and the target may not be aware of it yet."""
        self._finish(Outcome.CLOSED)
        self.wait(now_ns)

    def expire(self) -> None:
        """The wait is over."""
        if self.state is State.TIME_WAIT:
            self.move(Event.EXPIRED)
            self._finish(Outcome.CLOSED)
        self.host.forget(self)

    def _finish(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.deadline_ns = self.rto_at = NEVER
        self.target.flight = []
        self.host.ended(self, outcome)

    # -- clock, state, output -------------------------------------------------------------

    def move(self, event: Event) -> None:
        """Go to the state that TRANSITIONS has for ``event``; KeyError if it has none."""
        self.state = TRANSITIONS[self.state, event]

    def _turn(self, now_ns: int) -> None:
        """Send whatever may be sent now, then set the clock."""
        if self.outcome is None:
            if self.state is State.CLOSED:
                losing.go_on(self, now_ns)
            else:
                departure.send(self, now_ns)
        if self.outcome is None:
            self._settle(now_ns)

    def _settle(self, now_ns: int) -> None:
        """Send an ACK that is due and tell the host when to come back."""
        if self.ack_at <= now_ns:
            receiving.acknowledge(self.target, self.ack_at != AT_ONCE)
            self.emit(0, self.target.snd_nxt, b"", now_ns)
        deadline_ns = min(self.rto_at, self.ack_at, self.quiet_at, self.gap_at)
        self.deadline_ns = deadline_ns
        if deadline_ns < self.scheduled_ns:
            self.host.schedule(self)

    def emit(self, flags: int, pos: int, data: bytes, now_ns: int) -> None:
        """Send with the current acknowledgement, which every segment but a SYN carries."""
        target = self.target
        if flags & SYN:
            ack = 0
        else:
            flags |= ACK
            ack = (target.irs + target.rcv_nxt) & MASK
            target.rcv_acked = target.rcv_nxt
            self.ack_at = NEVER
        self.emit_raw(flags, (target.iss + pos) & MASK, ack, data, now_ns)

    def emit_raw(self, flags: int, seq: int, ack: int, data: bytes, now_ns: int) -> None:
        """Put a segment with exactly these 32-bit numbers on the host's outbox."""
        tsval = (now_ns // MS + self.host.rules.timestamp_origin) & MASK
        self.host.outbox.append(tuple.__new__(Emission, (self, flags, seq, ack, tsval, data)))


def drop(chunks: Sequence[Chunk], fate: Fate, ledger: Tallies) -> None:
    """What was held will not be sent. A FIN or RST without data has had its effect already."""
    for chunk in chunks:
        ledger.fates[Fate.HELD] -= chunk.records
        ledger.fates[fate if chunk.data else Fate.STEERED] += chunk.records
