"""One copied connection: a TCP client whose bytes come from the capture.

In: ``on_client_segment``, ``on_target_segment``, ``on_timer`` (all with the time as an
argument). Out: :class:`Emission` tuples on the host's outbox, and ``deadline_ns``, when to
call ``on_timer``. What the target sends is handled in arrival.py, what we send in
departure.py, the loss of the connection in losing.py; each rule stands in the module named
after it, this file only puts them in order. A session that loses its connection early does
not open another: the host does (``reopen``), since a connection is what a session is.
"""

from typing import Protocol

from pycopy.session import (
    arrival,
    connection,
    departure,
    losing,
    pathmtu,
    receiving,
    release,
    stream,
)
from pycopy.session.connection import Connection
from pycopy.session.fates import Fate, ResponseFate
from pycopy.session.states import Event, Outcome, State
from pycopy.session.stream import Offer
from pycopy.session.views import AT_ONCE, NEVER, NO_POSITION, Chunk, unwrap
from pycopy.wire.segment import ACK, FIN, RST, SYN, Segment
from pycopy.wire.seq import MASK


class Host(connection.Host, Protocol):
    """What a whole session needs of its host: connection.Host, and a clock."""

    def schedule(self, session: "Session") -> None:
        """Call ``on_timer`` at the session's deadline."""


class Session(Connection):
    """See the module."""

    __slots__ = ()

    host: Host

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
        self.truncate(Outcome.GAP, Fate.DROPPED_GAP, now_ns)
        self.host.reopen(self, successor, now_ns)

    def truncate(self, why: Outcome, fate: Fate, now_ns: int) -> None:
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

    # -- clock, state, output -------------------------------------------------------------

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
