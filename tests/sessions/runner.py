"""Runs packetdrill-like scripts against the session table, with a fake clock.

The notation is in README.md beside this file: each line is a segment that is captured
(``client <``), a response (``target <``), what must be sent just then (``target >``), a router's
word (``icmp <``), or a word of the script (``* ...``: the method of :class:`Script` named
``star_`` and that word). Whoever adds a word lists it there; a test holds the list complete.
"""

import re
import struct
from collections import deque

from pycopy.report.ledger import Ledger
from pycopy.session import rewrite
from pycopy.session.addresses import KeptAddresses
from pycopy.session.fates import Count, Fate, ResponseFate
from pycopy.session.rules import Rules
from pycopy.session.states import Outcome
from pycopy.session.table import Table
from pycopy.wire.segment import (
    ACK,
    KEY,
    KIND_CLIENT,
    KIND_TARGET,
    KIND_TOO_BIG,
    OPT_MSS,
    OPT_SACK_PERM,
    OPT_TIMESTAMPS,
    OPT_WSCALE,
    SYN,
    Segment,
)
from pycopy.wire.seq import MASK, diff

ONLINE_IRS, TARGET_IRS = 0xFFFFFF00, 0xABCDEF00  # one of them wraps in any script
FLAGS = "FSRP.UEW"
PATTERN = bytes(i % 251 for i in range(1 << 17))
#: Of the options that have one length (RFC 9293 3.2, RFC 2018 2, RFC 7323 2.2 and 3.2).
OPTION_BYTES = {2: 4, 3: 3, 4: 2, 8: 10}
ADDRESSES = {
    4: [bytes(10) + b"\xff\xff" + bytes([10, 0, 0, n]) for n in range(3)],
    6: [b"\xfc\x00" + bytes(13) + bytes([n]) for n in range(3)],
}
LINE = re.compile(
    r"\+(?P<after>[\d.]+)\s+(?:\*\s+(?P<star>.*)|(?P<who>client|target)(?:/(?P<number>\d+))?"
    r"(?:@(?P<service>\d+))?\s+(?P<way>[<>])\s+(?P<flags>[FSRP.UEW]+)"
    r"\s+(?P<seq>\d+):(?P<end>\d+)\((?P<size>\d+)\)(?:\s+ack\s+(?P<ack>\d+))?"
    r"(?:\s+win\s+(?P<win>\d+))?(?:\s+<(?P<options>.*)>)?)$"
)
ICMP = re.compile(
    r"\+(?P<after>[\d.]+)\s+icmp(?:/(?P<number>\d+))? < mss (?P<mss>\d+) seq (?P<seq>\d+)$"
)


class Failed(AssertionError):
    pass


def flags_of(text):
    return sum(1 << FLAGS.index(flag) for flag in text)


def flags_text(flags):
    return "".join(name for name in "SFRPUEW." if flags & flags_of(name))


def pattern(start, size):
    """Payload at stream position ``start``."""
    return PATTERN[start % 251 :][:size]


def options_text(options, irs):
    """TCP options as a script writes them."""
    words, i = [], 0
    while i < len(options):
        kind, size = options[i], options[i + 1] if options[i] > 1 else 1
        body, i = options[i + 2 : i + size], i + size
        if size != OPTION_BYTES.get(kind, size):
            words.append(f"option {kind} with {size} bytes")
        elif kind == 2:
            words.append(f"mss {int.from_bytes(body, 'big')}")
        elif kind == 3:
            words.append(f"wscale {body[0]}")
        elif kind == 4:
            words.append("sackOK")
        elif kind == 8:
            words.append("TS val {} ecr {}".format(*struct.unpack("!II", body)))
        elif kind == 5:
            edges = struct.unpack(f"!{len(body) // 4}I", body)
            blocks = zip(edges[::2], edges[1::2], strict=True)
            pairs = [f"{(a - irs) & MASK}:{(b - irs) & MASK}" for a, b in blocks]
            words.append("sack " + " ".join(pairs))
    return ",".join(words)


class Connection:
    """A connection to the target as the script counts them."""

    def __init__(self, session, key, iss):
        self.session, self.key = session, key
        self.iss, self.irs = iss, TARGET_IRS


class Script:
    """One run of one script; what executes it is the table, here."""

    def __init__(self, text, family=4, addresses=None, start_ns=0, keeper=None):
        self.lines = [line.strip() for line in text.splitlines()]
        self.family = family
        self.now_ns = start_ns
        self.rules = Rules()
        self.ledger = Ledger()
        self.iss = {}  # connection key -> the client's initial sequence numbers, latest last
        self.connections = []  # in order of their first segment
        self.sent = deque()  # (time, text with options, text without)
        self.transcript = []
        self.client_addr, self.server, self.target_addr = addresses or ADDRESSES[family]
        services = [(self.target_addr, 80), (self.target_addr, 81)]
        self.table = Table(
            self.rules, self.ledger, KeptAddresses(), services, lambda addr: 1460, self.now_ns,
            keeper=keeper,
        )  # fmt: skip

    def run(self):
        for number, line in enumerate(self.lines, 1):
            if line and not line.startswith("#"):
                try:
                    self.step(line)
                except Failed as failure:
                    raise Failed(self.explain(number, line, failure)) from None
        self.expect_nothing()
        self.check_ledger()
        self.star_end()
        self.check_ledger()
        if self.ledger.fates[Fate.HELD] or self.table.by_target or self.table.by_online:
            raise Failed("something is left when the run is over")

    def explain(self, number, line, failure):
        before = "\n".join(f"    {each}" for each in self.transcript[-12:])
        return f"line {number}: {failure}\n{before}\n  > {line}"

    def step(self, line):
        match = LINE.match(line) or ICMP.match(line)
        if not match:
            raise Failed("this is not a line of a script")
        self.advance(self.now_ns + round(float(match["after"]) * 1e9))
        if match.re is ICMP:
            self.expect_nothing()
            self.too_big(match)
            self.collect()
        elif match["way"] == ">":
            self.expect(match)
        else:
            self.expect_nothing()
            if match["star"]:
                name, *words = match["star"].split()
                getattr(self, "star_" + name)(*words)
            else:
                self.arrive(match)
            self.collect()
        self.transcript.append(f"{self.now_ns / 1e9:9.4f} {line.split(None, 1)[1]}")

    # -- time and output --------------------------------------------------------------------

    def advance(self, until_ns):
        while (due_ns := self.table.deadline_ns()) <= until_ns:
            self.now_ns = max(self.now_ns, due_ns)
            self.table.on_time(self.now_ns)
            self.collect()
        self.now_ns = until_ns

    def collect(self):
        """Take the outbox away, as the sender does, and write it as a script does."""
        for session, flags, seq, ack, tsval, data in self.table.outbox:
            connection = self.connection_of(session, seq)
            options = rewrite.options_of(session, flags, tsval)
            self.write(connection, flags, seq, ack, options, data)
        self.table.outbox.clear()

    def write(self, connection, flags, seq, ack, options, data):
        """Something was sent: remember it as a script writes it."""
        number = self.connections.index(connection) + 1
        start = diff(seq, connection.iss)
        who = f"target/{number}" if number > 1 else "target"
        text = f"{who} > {flags_text(flags)} {start}:{start + len(data)}({len(data)})"
        if flags & ACK:
            text += f" ack {(ack - connection.irs) & MASK}"
        elif ack != 0:
            text += f" with {ack} where an ack would be"
        full = f"{text} <{options_text(options, connection.irs)}>"
        if data != pattern(start, len(data)):
            full = text = text + " with other bytes than captured"
        self.sent.append((self.now_ns, full, text))

    def connection_of(self, session, seq):
        for connection in self.connections:
            if connection.session is session:
                return connection
        return self.connect(session, session.key, session.target_key, seq)

    def connect(self, session, online_key, target_key, seq):
        """Another connection to the target has sent its first segment."""
        iss = min(self.iss[online_key], key=lambda each: (seq - each) & MASK)
        self.connections.append(Connection(session, target_key, iss))
        return self.connections[-1]

    def expect(self, match):
        text = " ".join(match[0].split(None, 1)[1].split())
        if not self.sent:
            raise Failed("nothing was sent")
        at_ns, full, short = self.sent.popleft()
        if (full if match["options"] is not None else short) != text:
            raise Failed(f"sent instead, at {at_ns / 1e9:.4f}: {full}")
        if abs(at_ns - self.now_ns) > 1e6:
            raise Failed(f"sent too early, at {at_ns / 1e9:.4f}")

    def expect_nothing(self):
        if self.sent:
            at_ns, full, _ = self.sent.popleft()
            raise Failed(f"not expected, at {at_ns / 1e9:.4f}: {full}")

    # -- input ------------------------------------------------------------------------------

    def arrive(self, match):
        options = self.parse_options(match["options"] or "")
        flags, size = flags_of(match["flags"]), int(match["size"])
        seq, ack = int(match["seq"]), int(match["ack"] or 0)
        number, service = int(match["number"] or 1), int(match["service"] or 0)
        if int(match["end"]) != seq + size:
            raise Failed("end is not start + size")
        edges = options.pop("edges", ())
        fields = {"tcp_flags": flags, "wnd": int(match["win"] or 65535), "seg_len": size, **options}
        if match["who"] == "client":
            key = self.online_key(number, service)
            iss = self.iss.setdefault(key, [1_000_000 * number])[-1]
            seg = self.segment(
                KIND_CLIENT, key, iss + seq, ONLINE_IRS + ack, service=service,
                payload_bytes=size, **self.sack(ONLINE_IRS, edges), **fields,
            )  # fmt: skip
            self.on_client(seg, pattern(seq + bool(flags & SYN), size))
            return
        connection = self.connection(number)
        seg = self.segment(
            KIND_TARGET, connection.key, connection.irs + seq, connection.iss + ack,
            **self.sack(connection.iss, edges), **fields,
        )  # fmt: skip
        self.on_target(seg)

    def on_client(self, seg, payload):
        self.table.on_client(seg, payload, self.now_ns)

    def on_target(self, seg):
        self.table.on_target(seg, self.now_ns)

    def connection(self, number):
        if number > len(self.connections):
            raise Failed(f"there is no connection {number} to the target")
        return self.connections[number - 1]

    def too_big(self, match):
        connection = self.connection(int(match["number"] or 1))
        seq, mtu = connection.iss + int(match["seq"]), self.mtu(match["mss"])
        self.on_target(self.segment(KIND_TOO_BIG, connection.key, seq, 0, mss=mtu))

    def mtu(self, mss):
        return int(mss) + (40 if self.family == 4 else 60)

    def online_key(self, number, service):
        return KEY.pack(self.client_addr, self.server, 40000 + number, 8080 + service)

    @staticmethod
    def sack(base, edges):
        numbers = [(base + edge) & MASK for edge in edges] + [0] * (8 - len(edges))
        return {"sack": struct.pack("<8I", *numbers), "sack_blocks": len(edges) // 2}

    def segment(self, kind, key, seq, ack, **fields):
        zero = Segment(0, *[0] * 15, b"", bytes(32))
        return zero._replace(
            time_ns=self.now_ns, kind=kind, key=key, seq=seq & MASK, ack=ack & MASK,
            family=self.family, **fields,
        )  # fmt: skip

    def parse_options(self, text):
        fields, present = {}, 0
        for word in filter(None, text.split(",")):
            name, *values = word.split()
            if name == "mss":
                present, fields["mss"] = present | OPT_MSS, int(values[0])
            elif name == "wscale":
                present, fields["wscale"] = present | OPT_WSCALE, int(values[0])
            elif name == "sackOK":
                present |= OPT_SACK_PERM
            elif name == "TS":
                present |= OPT_TIMESTAMPS
                fields["tsval"], fields["tsecr"] = int(values[1]), int(values[3])
            elif name == "sack":
                fields["edges"] = [int(edge) for pair in values for edge in pair.split(":")]
            else:
                raise Failed(f"unknown option {name}")
        return {**fields, "options": present}

    # -- lines with a star ------------------------------------------------------------------

    def star_open(self, *words):
        """A handshake that is not the point of the script: ``open [win n] [sack] [ts]``.

        The round trip to the target is 10 ms. Without window scaling, so that ``win`` is bytes.
        """
        win = words[words.index("win") + 1] if "win" in words else "65535"
        sack = ",sackOK" if "sack" in words else ""
        client_ts, target_ts = (
            (",TS val 1 ecr 0", ",TS val 500 ecr 0") if "ts" in words else ("", "")
        )
        self.step(f"+0 client < S 0:0(0) <mss 1460{sack}{client_ts}>")
        self.step("+0 target > S 0:0(0)")
        self.step(f"+.01 target < S. 0:0(0) ack 1 win {win} <mss 1460{sack}{target_ts}>")
        self.step("+0 target > . 1:1(0) ack 1")
        self.step("+0 client < . 1:1(0) ack 1")

    def star_rule(self, name, value):
        """Change a field of Rules, before the traffic that it matters to."""
        times = re.fullmatch(r"([\d.]+)(ms|s)", value)
        known = {"yes": True, "no": False}
        if times:
            known[value] = round(float(times[1]) * (1e6 if times[2] == "ms" else 1e9))
        if not hasattr(self.rules, name):
            raise Failed(f"there is no rule {name}")
        setattr(self.rules, name, known.get(value) if value in known else int(value))

    def star_iss(self, number, value):
        """Give a client another initial sequence number."""
        for service in range(2):
            key = self.online_key(int(number), service)
            self.iss.setdefault(key, []).append(int(value, 0))

    def star_closed_for(self, fate):
        self.table.refuse(None if fate == "nothing" else Fate[fate.upper()])

    def star_end(self):
        self.table.end_all(self.now_ns)

    def star_state(self, state, number="1"):
        """Where a connection stands; GONE: the table has forgotten it."""
        connection = self.connections[int(number) - 1]
        is_in = connection.session.state.name
        if self.table.by_target.get(connection.key) is not connection.session:
            is_in = "GONE" if is_in == "CLOSED" else f"forgotten in {is_in}"
        self.compare("state", is_in, state)

    def star_fate(self, name, number):
        self.compare(name, self.ledger.fates[Fate[name.upper()]], int(number))

    def star_response(self, name, number):
        self.compare(name, self.ledger.responses[ResponseFate[name.upper()]], int(number))

    def star_count(self, name, number):
        self.compare(name, self.ledger.counts[Count[name.upper()]], int(number))

    def star_outcome(self, name, number="1"):
        self.compare(name, self.ledger.outcomes[Outcome(name)], int(number))

    def star_busy(self, number):
        self.compare("busy", self.table.busy(), int(number))

    def star_mss(self, size, number="1"):
        """Payload of the largest segment, options not counted."""
        self.compare("mss", self.connection(int(number)).session.target.mss, int(size))

    def star_overlapping(self, answer):
        """Whether the client is taken for one that does not wait for answers."""
        online = self.connections[0].session.online
        self.compare("overlapping", online.overlapping, answer == "yes")

    def star_lower_mss(self, mss):
        """The sender found the way out of this host to be smaller."""
        self.connections[0].session.lower_mtu(self.mtu(mss), self.now_ns)

    def star_port(self, number, port):
        """Our port of a connection to the target."""
        self.compare("port", KEY.unpack(self.connections[int(number) - 1].key)[2], int(port))

    def compare(self, what, value, expected):
        if value != expected:
            raise Failed(f"{what} is {value}")

    def check_ledger(self):
        captured, ended = self.ledger.counts[Count.CAPTURED], sum(self.ledger.fates)
        held = self.held()
        if captured != ended or held != self.ledger.fates[Fate.HELD]:
            raise Failed(f"captured {captured}, fates sum to {ended}, held in fact {held}")
        if sum(self.ledger.responses) != self.ledger.counts[Count.RESPONSES]:
            raise Failed("not every response has a fate")

    def held(self):
        """Segments that wait, counted one by one."""
        return sum(
            sum(chunk.records for chunk in session.online.queue) + len(session.online.early)
            for session in self.table.by_target.values()
        )
