"""bpf/progress.c: datagrams of intercepts in, frames to the target out; nothing else touched."""

import random
from collections import Counter

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether

from pycopy.kernel import abi, syscall
from pycopy.kernel.abi import InterceptCount, Owner
from pycopy.session.states import State
from pycopy.wire.segment import ACK, KIND_CLIENT, KIND_TARGET, KIND_TOO_BIG, SEGMENT, Segment
from tests.bpf.fast import SERVERS, TC_REDIRECT, Bench, check_frame
from tests.bpf.frames import CLIENT, CLIENT6, tcp
from tests.bpf.harness import (
    TC_CONTINUE,
    TC_SHOT,
    Intercept,
    Namespaces,
    Program,
    mapped,
    runnable,
)

COOKIE = 0x8000_0000_0000_0001
INTERCEPT, ONLINE = {4: "10.7.0.1", 6: "fd07::1"}, {4: "10.7.0.2", 6: "fd07::2"}
PORT, OUR_PORT = 36524, 40002
families = pytest.mark.parametrize("family", (4, 6))

#: Frames by scapy, a thousand and more: on a busy machine that takes its time.
pytestmark = pytest.mark.timeout(240)


class Progress(Program):
    def __init__(self, kernel):
        intercepts = [(mapped("10.9.9.9"), 1), *((mapped(INTERCEPT[f]), PORT) for f in (4, 6))]
        super().__init__(
            "progress", "tc", InterceptCount, kernel=kernel, datagram_port=OUR_PORT,
            entries={"intercepts": 3, "probes": 3},
        )  # fmt: skip
        for index, intercept in enumerate(intercepts):
            self.maps["intercepts"].update(
                abi.ENDPOINT.pack(*intercept), index.to_bytes(4, "little")
            )
        self.maps["cookie"].update(bytes(4), COOKIE.to_bytes(8, "little"))

    check_balance = staticmethod(Intercept.check_balance)

    def probed_ns(self, index):
        return int.from_bytes(self.maps["probes"].lookup(index.to_bytes(4, "little")), "little")

    def fate(self, frame):
        """The verdict and what was counted, MATCHED left out."""
        before = self.counts()
        run = syscall.test_run(self.module.program_fd, frame, room_bytes=4096)
        if run.retval == TC_CONTINUE:
            assert run.data == frame, "a packet that passes came back changed"
        after = self.counts()
        self.check_balance(after)
        return run, {kind.name: after[kind] - before[kind] for kind in after
                     if kind and after[kind] != before[kind]}  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    namespaces = Namespaces()
    namespaces.new()
    made = Bench(slots=64)
    made.progress = Progress(made.kernel)
    # What a relay makes of a response: the same record as intercept.c's.
    made.reader = Intercept("tc")
    made.reader.set_default(abi.SWALLOW)
    # By the clients' own addresses, as where responses come from elsewhere.
    made.kernel.use_ports([])
    yield made
    made.progress.close()
    made.reader.close()
    made.close()
    namespaces.close()


@pytest.fixture(autouse=True)
def _clear(bench):
    yield
    bench.progress.records()
    bench.clear()


def datagram(family, payload, *, sport=PORT, dport=OUR_PORT, src=None, dst=None, link_layer=None):
    network = IPv6 if family == 6 else IP
    where = network(src=src or INTERCEPT[family], dst=dst or ONLINE[family])
    return bytes((link_layer or Ether()) / where / UDP(sport=sport, dport=dport) / payload)


def payload_of(segment, *, cookie=COOKIE, kind=abi.RELAYED_SEGMENT, junk=0xABCD):
    """``segment``: a record, or its 112 bytes."""
    packed = segment if isinstance(segment, bytes) else SEGMENT.pack(*segment)
    return abi.DATAGRAM_HEAD.pack(cookie, junk, kind, 0) + packed


def relayed(bench, family, frame):
    """A response of the target as its intercept relays it."""
    assert bench.reader.call(frame) == TC_SHOT
    ((segment, _),) = bench.reader.records()
    return datagram(family, payload_of(segment))


class Kept:
    """A connection whose copy keeps the client's address: its frames through the bench."""

    def __init__(self, bench, family):
        self.bench, self.family = bench, family
        self.connection = bench.connection(family)
        self.connection.copy_port = self.connection.port

    def response(self, flags, payload=b"", **more):
        frame = self.connection.target_frame(flags, payload, **more)
        at, size = (30, 4) if self.family == 4 else (38, 16)
        client = mapped(CLIENT if self.family == 4 else CLIENT6)[-size:]
        return frame[:at] + client + frame[at + size :]

    def check(self, frame):
        return check_frame(frame, self.family, ours=CLIENT if self.family == 4 else CLIENT6)

    def open(self):
        c = self.connection
        (syn,) = self.bench.client(c.client_frame("S", options=c._options))
        assert self.check(syn).sport == c.port
        c.seq, c.online_nxt = c.seq + 1 & 0xFFFFFFFF, c.online_nxt + 1 & 0xFFFFFFFF
        ack = self.feed("SA", options=c._options)
        c.rcv_nxt = c.rcv_nxt + 1 & 0xFFFFFFFF
        self.bench.client(c.client_frame())
        return ack

    def feed(self, flags, payload=b"", **more):
        """A response comes as a datagram: the frame that it turns into, or None."""
        frame = relayed(self.bench, self.family, self.response(flags, payload, **more))
        run, counted = self.bench.progress.fate(frame)
        assert counted == {"KEPT": 1}
        self.connection.rcv_nxt = self.connection.rcv_nxt + len(payload) & 0xFFFFFFFF
        return self.check(run.data) if run.retval == TC_REDIRECT else None


@families
def test_a_session_by_datagrams(bench, family):
    """Handshake, a request that is held and released by the datagram itself, ACKs."""
    kept = Kept(bench, family)
    ack = kept.open()
    assert ack.flags == "A" and ack.ack == kept.connection.rcv_nxt
    c = kept.connection
    (first,) = bench.client(c.client_frame("PA", b"first"))
    assert bytes(kept.check(first).payload) == b"first"
    c.seq = c.seq + 5 & 0xFFFFFFFF
    c.answered_online(1000)
    assert bench.client(c.client_frame("PA", b"second " * 150)) == []
    c.seq = c.seq + 1050 & 0xFFFFFFFF
    released = kept.feed("PA", b"a" * 1000, acked=c.seq - 1050)
    assert bytes(released.payload) == b"second " * 150
    assert released.ack == c.rcv_nxt
    assert bench.progress.records() == []


@families
def test_a_port_used_again_at_once(bench, family):
    """Under the client's own address and port what lingers gives way, slot and all."""
    kept = Kept(bench, family)
    kept.open()
    c = kept.connection
    (fin,) = bench.client(c.client_frame("FA"))
    assert "F" in kept.check(fin).flags
    assert bench.client(c.client_frame("S", back=77, options=c._options)) == []  # not over yet
    bench.clear()

    kept = Kept(bench, family)
    kept.open()
    c = kept.connection
    bench.client(c.client_frame("FA"))
    c.seq = c.seq + 1 & 0xFFFFFFFF
    assert kept.feed("FA", acked=c.seq).flags == "A"
    (old,) = [each for each in bench.sessions() if each.owner == Owner.KERNEL]
    assert old.state == State.TIME_WAIT.value
    free = bench.free_slots()
    c.seq = 0x1000
    (syn,) = bench.client(c.client_frame("S", options=c._options))
    assert (kept.check(syn).sport, kept.check(syn).seq) == (c.port, 0x1000)
    (new,) = [each for each in bench.sessions() if each.owner == Owner.KERNEL]
    assert (new.state, new.target) == (State.SYN_SENT.value, old.target)
    assert bench.free_slots() == free


@families
def test_what_is_not_the_kernels_is_recorded(bench, family):
    kept = Kept(bench, family)
    frame = relayed(bench, family, kept.response("PA", b"x"))
    run, counted = bench.progress.fate(frame)
    assert (run.retval, counted) == (TC_SHOT, {"CAPTURED": 1})
    ((segment, payload),) = bench.progress.records()
    assert (segment.kind, segment.seg_len, payload) == (KIND_TARGET, 1, b"")


@families
def test_a_tag_is_none_of_its_business(bench, family):
    """The kernel takes tags off before TC; one that is still there is somebody else's."""
    frame = datagram(family, payload_of(bytes(112)), link_layer=Ether() / Dot1Q(vlan=7))
    run, counted = bench.progress.fate(frame)
    assert (run.retval, counted) == (TC_CONTINUE, {})


@families
def test_probes(bench, family):
    index = 1 if family == 4 else 2
    before = [bench.progress.probed_ns(each) for each in range(3)]
    frame = datagram(family, payload_of(bytes(112), kind=abi.PROBE))
    run, counted = bench.progress.fate(frame)
    assert (run.retval, counted) == (TC_SHOT, {})
    after = [bench.progress.probed_ns(each) for each in range(3)]
    assert after[index] > before[index]
    assert [each for each in range(3) if after[each] != before[each]] == [index]


@families
def test_who_does_not_know_the_cookie_passes(bench, family):
    """Counted, and left to the stack; a probe as well."""
    whole = payload_of(bytes(112))
    was = [bench.progress.probed_ns(each) for each in range(3)]
    for payload in (
        payload_of(bytes(112), cookie=COOKIE ^ 1),
        payload_of(bytes(112), cookie=0),
        payload_of(bytes(112), cookie=COOKIE ^ 1, kind=abi.PROBE),
        whole[:-1],
        whole + b"x",
        whole[:8],
        b"",
    ):
        run, counted = bench.progress.fate(datagram(family, payload))
        assert (run.retval, counted) == (TC_CONTINUE, {"PASSED": 1})
    assert was == [bench.progress.probed_ns(each) for each in range(3)]
    assert bench.progress.records() == []


@families
def test_everything_else_is_not_even_counted(bench, family):
    whole = payload_of(bytes(112))
    other = "10.7.0.9" if family == 4 else "fd07::9"
    frames = [
        datagram(family, whole, dport=OUR_PORT + 1),
        datagram(family, whole, sport=PORT + 1),
        datagram(family, whole, src=other),
        tcp(PORT, OUR_PORT, payload=whole, ip="IPv4" if family == 4 else "IPv6"),
        tcp(1234, 80, ip=IPv6(dst=SERVERS[6]) if family == 6 else IP(dst=SERVERS[4])),
    ]
    if family == 4:
        # Fragments, and a header with options: nothing that an intercept sends.
        for fields in ({"flags": "MF"}, {"frag": 5}, {"options": [b"\x94\x04\x00\x00"]}):
            where = IP(src=INTERCEPT[4], dst=ONLINE[4], **fields)
            frames.append(bytes(Ether() / where / UDP(sport=PORT, dport=OUR_PORT) / whole))
    for frame in frames:
        run, counted = bench.progress.fate(frame)
        assert (run.retval, counted) == (TC_CONTINUE, {})


@families
def test_what_no_intercept_says_is_swallowed(bench, family):
    """It knows the cookie, so it is ours; but user space never sees such records."""
    segment = Segment(
        0, KIND_TARGET, ACK, 0, 0, 0, 1000, 1, 2, 0, 0, 0, 0, 0, family, 0,
        bytes(36), bytes(32),
    )  # fmt: skip
    for wrong in (
        segment._replace(kind=KIND_CLIENT),
        segment._replace(kind=KIND_TOO_BIG),
        segment._replace(sack_blocks=5),
        segment._replace(payload_bytes=1),
    ):
        run, counted = bench.progress.fate(datagram(family, payload_of(wrong)))
        assert (run.retval, counted) == (TC_SHOT, {"MALFORMED": 1})
    frame = datagram(family, payload_of(segment, kind=3))
    assert bench.progress.fate(frame)[1] == {"MALFORMED": 1}
    assert bench.progress.records() == []


@families
def test_mutations(bench, family):
    """Live sessions, datagrams changed at random: each passes unchanged or has one fate."""
    noise = random.Random(family)
    sessions = [Kept(bench, family) for _ in range(5)]
    for each in sessions:
        each.open()
    fates = Counter()
    for _ in range(1500):
        each = noise.choice(sessions)
        flags = noise.choice(("A", "PA", "FA", "SA", "R", "RA"))
        response = each.response(flags, b"y" * noise.choice((0, 1, 1400)))
        frame = bytearray(relayed(bench, family, response))
        for _ in range(noise.randrange(4)):
            place = noise.randrange(14, len(frame))
            frame[place] ^= 1 << noise.randrange(8)
        if noise.random() < 0.1:
            del frame[noise.randrange(14, len(frame)) :]
        if not runnable("tc", bytes(frame)):
            continue
        run, counted = bench.progress.fate(bytes(frame))
        assert run.retval in (TC_CONTINUE, TC_SHOT, TC_REDIRECT)
        assert sum(counted.values()) <= 1
        fates.update(counted or {"unseen": 1})
        for segment, payload in bench.progress.records():
            assert segment.kind == KIND_TARGET and segment.sack_blocks <= 4 and not payload
    assert len(fates) >= 4, fates
    bench.counts()  # balanced
