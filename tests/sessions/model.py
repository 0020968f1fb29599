"""A target to test against: a TCP receiver with a server on it, and a network that is unkind.

Written from the RFCs, not from the engine: 32-bit numbers, its own buffers and timers, and
its own idea of what is acceptable. The server reads requests, whose limits it knows by their
position in the client's stream, thinks, and answers; it may read slowly and close early.
"""

import heapq
import struct
from dataclasses import dataclass, field

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
MASK = 0xFFFFFFFF
MS = 1_000_000


def ahead(a, b):
    """How far ``a`` is ahead of ``b``, negative if behind."""
    return ((a - b + (1 << 31)) & MASK) - (1 << 31)


@dataclass
class Answer:
    """What the model says: header fields of one segment."""

    flags: int
    seq: int
    ack: int
    wnd: int
    seg_len: int = 0
    sack: list = field(default_factory=list)
    options: int = 0
    mss: int = 0
    tsval: int = 0
    tsecr: int = 0


@dataclass
class Manners:
    """How the target behaves; chosen by hypothesis."""

    buffer_bytes: int = 65535
    read_bytes: int = 1 << 20  # in one go
    read_every_ns: int = 0  # 0: at once
    ack_delay_ns: int = 0
    mss: int = 1460
    options: int = 0  # what it grants
    think_ns: int = 0
    answers_per_connection: int = 0  # then it closes; 0: never early
    close_with_reset: bool = False


class Clock:
    """Simulated time: what happens next."""

    def __init__(self):
        self.now_ns = 0
        self._events = []
        self._number = 0

    def at(self, when_ns, call, *args):
        self._number += 1
        heapq.heappush(self._events, (when_ns, self._number, call, args))

    def next_ns(self):
        return self._events[0][0] if self._events else 1 << 62

    def step(self):
        self.now_ns, _, call, args = heapq.heappop(self._events)
        call(*args)


class Server:
    """One connection at the target."""

    RTO_NS = 300 * MS

    def __init__(self, clock, manners, ends, first, send, iss):
        """``ends[i]``: (position after request i, its answer's size); ``first``: first request."""
        self.clock, self.manners, self.send_segment = clock, manners, send
        self.requests, self.next_request = ends, first
        self.iss = self.snd_una = self.snd_nxt = iss
        self.irs = self.rcv_nxt = None
        self.options = 0
        self.ts_recent = 0
        self.pieces = {}  # beyond a gap: seq -> bytes
        self.unread = bytearray()
        self.stream = bytearray()  # what the application has read
        self.served = []  # requests read completely, in order
        self.to_send = 0  # response bytes of the application beyond snd_nxt
        self.fin_seq = None  # of our FIN, once sent
        self.client_fin = False  # received in order
        self.closing = self.closed = self.dead = False
        self.repeats, self.repeated_una = 0, None
        self.read_planned = self.ack_planned = self.timer_on = self.done_thinking = False

    # -- receiving --------------------------------------------------------------------------

    def window(self):
        return min(self.manners.buffer_bytes - len(self.unread), 65535)

    def on_segment(self, flags, seq, ack, data, mss, options, tsval):
        if self.dead:
            return
        if self.rcv_nxt is None:
            if flags & SYN:
                self.irs, self.rcv_nxt = seq, (seq + 1) & MASK
                self.options, self.ts_recent = self.manners.options & options, tsval
                self.snd_nxt = (self.iss + 1) & MASK
                self.answer_syn()
                self.arm()
            return
        if flags & SYN:
            if seq == self.irs and self.snd_una == self.iss:
                self.answer_syn()
            else:
                self.acknowledge()  # RFC 5961 4, in TIME_WAIT as well
            return
        if flags & RST:
            if seq == self.rcv_nxt:
                self.dead = True
            elif 0 < ahead(seq, self.rcv_nxt) < 65536:
                self.acknowledge()  # RFC 5961 3.2: a challenge
            return
        if ahead(seq, self.rcv_nxt) <= 0 < ahead(tsval, self.ts_recent):
            self.ts_recent = tsval
        if ahead(ack, self.snd_nxt) > 0:  # of an earlier connection, delayed
            if self.snd_una == self.iss:
                self.send_segment(self.nobody(ack))
            else:
                self.acknowledge()
            return
        if ahead(ack, self.snd_una) > 0:
            self.snd_una = ack
            if self.fin_seq is not None and ahead(ack, self.fin_seq) > 0 and self.client_fin:
                self.dead = True
                return
        self.take(flags, seq, data)

    def take(self, flags, seq, data):
        end = seq + len(data) + bool(flags & FIN)
        if ahead(seq, self.rcv_nxt) < 0 and ahead(end, self.rcv_nxt) <= 0:
            self.acknowledge()  # old, or a probe
            return
        if not data and not flags & FIN:
            return
        room = self.window() - ahead(seq, self.rcv_nxt)
        if room < len(data):  # RFC 9293 3.10.7.4: only what is in the window
            data, flags = data[: max(room, 0)], flags & ~FIN
        if self.closed and data:
            self.reset(RST, self.snd_nxt, 0)  # nobody will read it
            return
        in_order = ahead(seq, self.rcv_nxt) <= 0
        if data or flags & FIN:
            known = self.pieces.get(seq, (b"", 0))
            if len(data) >= len(known[0]):
                self.pieces[seq] = (data, flags & FIN)
        self.assemble()
        if not in_order or self.pieces or not self.manners.ack_delay_ns:
            self.acknowledge()
        elif not self.ack_planned:
            self.ack_planned = True
            self.clock.at(self.clock.now_ns + self.manners.ack_delay_ns, self.delayed_ack)
        self.plan_reading()

    def assemble(self):
        progress = True
        while progress:
            progress = False
            for seq, (data, fin) in sorted(self.pieces.items()):
                skip = -ahead(seq, self.rcv_nxt)
                if skip >= 0:
                    del self.pieces[seq]
                    if skip < len(data) or (fin and skip == len(data) and not self.client_fin):
                        fresh = data[skip:]
                        self.unread += fresh
                        self.rcv_nxt = (self.rcv_nxt + len(fresh) + fin) & MASK
                        self.client_fin = self.client_fin or bool(fin)
                        progress = True

    def delayed_ack(self):
        if self.ack_planned:
            self.acknowledge()

    def blocks(self):
        """Ranges beyond the gap, unmerged is as good (RFC 2018 3 allows any subset)."""
        spans = []
        for seq, (data, _) in sorted(
            self.pieces.items(), key=lambda each: ahead(each[0], self.irs)
        ):
            if data:
                spans.append((seq, (seq + len(data)) & MASK))
        return spans[:3]

    # -- the application --------------------------------------------------------------------

    def plan_reading(self):
        if not self.read_planned:
            self.read_planned = True
            self.clock.at(self.clock.now_ns + self.manners.read_every_ns, self.read)

    def read(self):
        self.read_planned = False
        if self.dead or self.closed:
            return
        was_small = self.window() < min(self.manners.mss, self.manners.buffer_bytes)
        fresh = self.unread[: self.manners.read_bytes]
        del self.unread[: len(fresh)]
        self.stream += fresh
        if fresh and was_small:
            self.acknowledge()  # a window update; it may be lost
        if self.unread:
            self.plan_reading()
        read_to = (self.irs + 1 + len(self.stream)) & MASK
        while self.next_request < len(self.requests):
            end, size = self.requests[self.next_request]
            if ahead(read_to, end) < 0:
                break
            self.served.append(self.next_request)
            self.next_request += 1
            self.clock.at(self.clock.now_ns + self.manners.think_ns, self.respond, size)
            if len(self.served) == self.manners.answers_per_connection:
                self.closing = True
                return
        if self.client_fin and not self.unread and not self.closing:
            self.closing = True
            self.clock.at(self.clock.now_ns + self.manners.think_ns, self.respond, 0)

    def respond(self, size):
        if self.dead or self.closed:
            return
        self.to_send += size
        self.transmit()
        last = len(self.served) == self.manners.answers_per_connection or self.client_fin
        if self.closing and last:
            self.close()

    def close(self):
        """Close both ways: what arrives from now on is answered with RST."""
        if self.closed:
            return
        self.closed = True
        if self.unread or (self.manners.close_with_reset and not self.client_fin):
            self.reset(RST | ACK, self.snd_nxt, self.rcv_nxt)
            return
        self.fin_seq = self.snd_nxt
        self.snd_nxt = (self.snd_nxt + 1) & MASK
        self.put(FIN, self.fin_seq, 0)
        self.arm()

    # -- sending ----------------------------------------------------------------------------

    def transmit(self):
        while self.to_send:
            size = min(self.to_send, self.manners.mss)
            self.to_send -= size
            self.put(PSH, self.snd_nxt, size)
            self.snd_nxt = (self.snd_nxt + size) & MASK
        self.arm()

    def arm(self):
        if not self.timer_on and self.snd_una != self.snd_nxt:
            self.timer_on = True
            self.clock.at(self.clock.now_ns + self.RTO_NS, self.on_timer)

    def on_timer(self):
        """Go back to the first unacknowledged number and send all of it again."""
        self.timer_on = False
        if self.dead or self.snd_una == self.snd_nxt:
            return
        self.repeats = self.repeats + 1 if self.repeated_una == self.snd_una else 0
        self.repeated_una = self.snd_una
        if self.repeats > 30:
            self.dead = True  # RFC 9293 3.8.3: nobody is there any more
            return
        if self.snd_una == self.iss:
            self.answer_syn()
        else:
            seq = self.snd_una
            end = self.snd_nxt if self.fin_seq is None else self.fin_seq
            while ahead(end, seq) > 0:
                size = min(ahead(end, seq), self.manners.mss)
                self.put(PSH, seq, size)
                seq = (seq + size) & MASK
            if self.fin_seq is not None:
                self.put(FIN, self.fin_seq, 0)
        self.arm()

    def answer_syn(self):
        answer = Answer(SYN | ACK, self.iss, self.rcv_nxt, self.window(), options=self.options | 1)
        answer.mss, answer.tsval, answer.tsecr = self.manners.mss, self.clock_ms(), self.ts_recent
        self.send_segment(answer)

    def acknowledge(self):
        self.put(0, self.snd_nxt, 0)

    def put(self, flags, seq, size):
        self.ack_planned = False
        blocks = self.blocks() if self.options & 4 else []
        answer = Answer(flags | ACK, seq, self.rcv_nxt, self.window(), size, blocks)
        answer.options, answer.tsval, answer.tsecr = (
            self.options & 8,
            self.clock_ms(),
            self.ts_recent,
        )
        self.send_segment(answer)

    def reset(self, flags, seq, ack):
        self.dead = True
        self.send_segment(Answer(flags, seq, ack, 0))

    @staticmethod
    def nobody(ack):
        """What a host says for a connection that it does not have (RFC 9293 3.10.7.1)."""
        return Answer(RST, ack, 0, 0)

    def clock_ms(self):
        return (self.clock.now_ns // MS + 0xFFFFFF00) & MASK


def pack_sack(blocks):
    edges = [edge for block in blocks for edge in block]
    return struct.pack("<8I", *edges, *[0] * (8 - len(edges)))
