"""intercept.c: which responses are swallowed, which recorded, and what is let through."""

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment

from pycopy.kernel.abi import PASS, SWALLOW, InterceptCount
from pycopy.wire.segment import KIND_TARGET
from tests.bpf.frames import HEADERS, LINKS, SYN_OPTIONS, TIMESTAMPS, big_tcp, padded, patched, tcp
from tests.bpf.harness import SWALLOW as SWALLOWED
from tests.bpf.harness import Intercept, check_record, mapped, runnable

CAPTURED, PASSED, FRAGMENT = (
    InterceptCount.CAPTURED,
    InterceptCount.PASSED,
    InterceptCount.FRAGMENT,
)
TARGET, TARGET6, CLIENT, CLIENT6 = "10.1.0.1", "fd01::1", "10.88.1.2", "fd88::2"
CHANNEL = 36524


def response(dst=CLIENT, sport=80, dport=4321, flags="PA", **more):
    """A frame from the target."""
    if "ip" not in more:
        more["ip"] = IPv6(src=TARGET6, dst=dst) if ":" in dst else IP(src=TARGET, dst=dst)
    return tcp(sport, dport, flags, **more)


def later_fragment(dst, proto=6):
    if ":" in dst:
        ip = IPv6(src=TARGET6, dst=dst) / IPv6ExtHdrFragment(offset=20, nh=proto)
    else:
        ip = IP(src=TARGET, dst=dst, frag=20, proto=proto)
    return tcp(80, 4321, ip=ip, payload=b"x" * 40)


def first_fragment(dst, sport=80, **more):
    if ":" in dst:
        ip = IPv6(src=TARGET6, dst=dst) / IPv6ExtHdrFragment(m=1)
    else:
        ip = IP(src=TARGET, dst=dst, flags="MF")
    return tcp(sport, 4321, ip=ip, payload=b"x" * 40, **more)


@pytest.fixture(scope="module")
def loaded(hook):
    """With a filter as a user would give it."""
    program = Intercept(hook, expression="src port 80 or src port 36524", channel=CHANNEL)
    yield program
    program.close()


@pytest.fixture
def intercept(loaded):
    """As after start: nothing is claimed."""
    yield loaded
    loaded.unclaim()


@pytest.fixture
def swallowing(intercept):
    intercept.set_default(SWALLOW)
    return intercept


@pytest.fixture(scope="module")
def all_swallowing(hook):
    """No filter either: libpcap's ports are not found behind IPv6 extension headers."""
    program = Intercept(hook)
    program.set_default(SWALLOW)
    yield program
    program.close()


def swallowed(program, frame):
    """The record of a frame that must be swallowed for it."""
    gone, kind, records = program.run(frame)
    assert (gone, kind, len(records)) == (True, CAPTURED, 1)
    return records[0]


PAST = (False, PASSED, [])
UNSEEN = (False, None, [])


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("ip", HEADERS)
def test_headers(all_swallowing, ip, link):
    for payload in (b"", b"x", b"y" * 1448):
        frame = tcp(80, 4321, payload=payload, ip=ip, link=link, options=TIMESTAMPS)
        check_record(swallowed(all_swallowing, frame), frame, kind=KIND_TARGET)


@pytest.mark.parametrize("flags", ["SA", "A", "PA", "FA", "FPA", "R", "RA", "S", ""])
def test_every_kind_of_segment(swallowing, flags):
    """Pure ACKs as well: they acknowledge."""
    for dst in (CLIENT, CLIENT6):
        options = SYN_OPTIONS if "S" in flags else TIMESTAMPS
        frame = padded(response(dst, flags=flags, options=options, seq=2**32 - 1))
        check_record(swallowed(swallowing, frame), frame, kind=KIND_TARGET)


def test_sack(swallowing):
    options = [*TIMESTAMPS, ("NOP", 0), ("NOP", 0), ("SAck", (1, 2, 3, 4, 0xFFFFFFFF, 6))]
    frame = response(flags="A", options=options)
    segment, _ = record = swallowed(swallowing, frame)
    assert segment.sack_blocks == 3
    check_record(record, frame, kind=KIND_TARGET)


def test_super_segment_is_one_record(swallowing):
    """No payload is kept, so nothing is cut."""
    for length in (3000, 20000, 65000):
        frame = response(payload=bytes(length))
        if runnable(swallowing.hook, frame):
            segment, payload = swallowed(swallowing, frame)
            assert (segment.seg_len, segment.payload_bytes, payload) == (length, 0, b"")
    frame = big_tcp(response()) + bytes(66000)
    if runnable(swallowing.hook, frame):
        assert swallowed(swallowing, frame)[0].seg_len == 66000


def test_nothing_claimed(intercept):
    """As after start: every response goes to its real client."""
    for dst in (CLIENT, CLIENT6):
        assert intercept.run(response(dst)) == PAST
        assert intercept.run(response(dst, flags="R")) == PAST


def test_claims_by_range(intercept):
    intercept.claim(mapped("10.88.0.0"), 96 + 16, SWALLOW)
    intercept.claim(mapped("fd88::"), 64, SWALLOW)
    for dst in ("10.88.0.0", "10.88.255.255", "fd88::", "fd88::ffff:ffff:ffff:ffff"):
        check = response(dst)
        check_record(swallowed(intercept, check), check, kind=KIND_TARGET)
    for dst in ("10.87.255.255", "10.89.0.0", "fd88:0:0:1::", "fd87::"):
        assert intercept.run(response(dst)) == PAST


def test_the_longest_claim_wins(swallowing):
    """--pass inside a range, and the host's own addresses inside everything."""
    swallowing.claim(mapped("10.88.1.0"), 96 + 24, PASS)
    swallowing.claim(mapped("10.88.1.7"), 128, SWALLOW)
    swallowing.claim(mapped("fd88::1"), 128, PASS)
    assert swallowing.run(response("10.88.1.2")) == PAST
    assert swallowing.run(response("fd88::1")) == PAST
    swallowed(swallowing, response("10.88.1.7"))
    swallowed(swallowing, response("10.88.2.2"))
    swallowed(swallowing, response("fd88::2"))


def test_an_ipv4_claim_says_nothing_of_ipv6(intercept):
    intercept.claim(mapped("0.0.0.0"), 96, SWALLOW)
    swallowed(intercept, response(CLIENT))
    assert intercept.run(response(CLIENT6)) == PAST


def test_filter(swallowing):
    """What -F does not select is not even counted."""
    assert swallowing.run(response(sport=81)) == UNSEEN
    assert swallowing.run(response(sport=4321, dport=80)) == UNSEEN
    udp = bytes(LINKS["untagged"] / IP(src=TARGET, dst=CLIENT) / UDP(sport=80) / bytes(40))
    assert swallowing.run(udp) == UNSEEN
    swallowed(swallowing, response(link="802.1ad and 802.1Q"))


def test_no_filter(all_swallowing):
    for sport in (1, 80, 65535):
        swallowed(all_swallowing, response(sport=sport))
    # No guard without a channel port.
    swallowed(all_swallowing, response(sport=CHANNEL))


def test_the_channel_is_never_swallowed(hook):
    """A filter too wide must not cut the intercept off from its replay."""
    program = Intercept(hook, channel=CHANNEL)
    program.set_default(SWALLOW)
    for dst in (CLIENT, CLIENT6):
        assert program.run(response(dst, sport=CHANNEL)) == PAST
        # A client's own port may have that number.
        swallowed(program, response(dst, dport=CHANNEL))
    program.close()


def test_fragments(intercept):
    """Never recorded; swallowed by address: a claim's, or of a selected first one, the default."""
    intercept.claim(mapped("10.88.0.0"), 96 + 16, SWALLOW)
    intercept.claim(mapped("fd88::"), 64, SWALLOW)
    gone, left = (True, FRAGMENT, []), (False, FRAGMENT, [])
    for dst in (CLIENT, CLIENT6):
        assert intercept.run(first_fragment(dst)) == gone
        assert intercept.run(later_fragment(dst)) == gone
        assert intercept.run(later_fragment(dst, proto=17)) == UNSEEN
    assert intercept.run(first_fragment("10.99.0.1")) == left
    assert intercept.run(first_fragment("10.99.0.1", sport=81)) == UNSEEN
    assert intercept.run(later_fragment("10.99.0.1")) == UNSEEN
    intercept.set_default(SWALLOW)
    assert intercept.run(first_fragment("10.99.0.1")) == gone
    # Without its head it is nothing to a client, but may be of any other connection.
    assert intercept.run(later_fragment("10.99.0.1")) == UNSEEN
    assert intercept.run(first_fragment("10.99.0.1", sport=81)) == UNSEEN


def test_fragments_that_the_filter_selects(hook):
    """By address alone an expression selects all fragments."""
    program = Intercept(hook, expression=f"src host {TARGET}")
    program.set_default(SWALLOW)
    program.claim(mapped("10.99.0.0"), 96 + 16, PASS)
    assert program.run(later_fragment(CLIENT)) == (True, FRAGMENT, [])
    assert program.run(later_fragment("10.99.0.1")) == (False, FRAGMENT, [])
    program.close()


@pytest.mark.parametrize("ip", ["IPv4", "IPv4 with options", "IPv6", "IPv6 all of them"])
def test_cut_at_every_length(all_swallowing, ip):
    """A replay's, once the ports are there: swallowed, though it makes no record."""
    frame = tcp(80, 4321, "SA", ip=ip, payload=b"012345", options=SYN_OPTIONS)
    tcp_at = len(frame) - 6 - 40
    for length in range(len(frame)):
        if runnable(all_swallowing.hook, frame[:length]):
            got = all_swallowing.run(frame[:length])
            known = (True, InterceptCount.TRUNCATED, [])
            assert got == (known if length >= tcp_at + 4 else UNSEEN), length
    swallowed(all_swallowing, frame)


def test_malformed(swallowing):
    """A host would answer such a thing, so it is swallowed as well."""
    frame = response(payload=b"\xff" * 8)
    gone = (True, InterceptCount.MALFORMED, [])
    assert swallowing.run(patched(frame, 46, [0x40])) == gone
    assert swallowing.run(patched(frame, 46, [0xF0])) == gone
    assert swallowing.run(patched(frame, 46, [0x60])) == gone
    assert swallowing.run(patched(frame, 16, (30).to_bytes(2, "big"))) == gone
    swallowing.claim(mapped(CLIENT), 128, PASS)
    assert swallowing.run(patched(frame, 46, [0x40])) == PAST


def test_ring_full(hook):
    """Swallowed all the same, and counted."""
    program = Intercept(hook, ring_bytes=4096)
    program.set_default(SWALLOW)
    frame = response(payload=b"x")
    fits = 4096 // 120
    outcomes = []
    for _ in range(fits + 5):
        verdict = program.call(frame)
        outcomes.append(set(program.changed) - {InterceptCount.MATCHED})
        assert verdict == SWALLOWED[hook]
    assert outcomes[-1] == {InterceptCount.RING_FULL}
    counts = program.counts()
    assert counts[CAPTURED] + counts[InterceptCount.RING_FULL] == fits + 5
    assert len(program.records()) == counts[CAPTURED]
    swallowed(program, frame)
    program.close()


@pytest.fixture(scope="module")
def own():
    """Self placement, at TC only: answers of two targets to our reserved ports."""
    targets = [(mapped(TARGET), 80), (mapped(TARGET6), 8080)]
    program = Intercept("tc", targets=targets, ports=(40000, 40999))
    assert "claims" not in program.maps
    for dport in (40000, 40500, 40999):
        program.own(mapped(CLIENT), mapped(TARGET), dport, 80)
        program.own(mapped(CLIENT6), mapped(TARGET6), dport, 8080)
    yield program
    program.close()


def test_self(own):
    for dport in (40000, 40500, 40999):
        for frame in (
            response(dport=dport, flags="SA", options=SYN_OPTIONS),
            response(CLIENT6, sport=8080, dport=dport, link="802.1Q"),
            response(dport=dport, flags="R"),
            response(dport=dport, payload=b"x" * 1000),
        ):
            check_record(swallowed(own, frame), frame, kind=KIND_TARGET)


def test_self_leaves_everything_else(own):
    elsewhere = IP(src="10.1.0.2", dst=CLIENT)
    for frame in (
        response(dport=39999),
        response(dport=41000),
        response(sport=81, dport=40500),
        response(sport=8080, dport=40500),
        response(CLIENT6, sport=80, dport=40500),
        response(dport=40500, ip=elsewhere),
        response(sport=40500, dport=80),
        later_fragment(CLIENT),
    ):
        assert own.run(frame) == UNSEEN


def test_self_leaves_connections_of_others_on_such_ports(own):
    """This host's own, and those of hosts behind it, to the very same target."""
    for frame in (
        response(dport=40501),
        response("10.9.9.9", dport=40500),
        response(CLIENT6, sport=8080, dport=40501),
    ):
        assert own.run(frame) == PAST


def test_self_fragments(own):
    """The first, which has the ports; without it the others are nothing."""
    ip = IP(src=TARGET, dst=CLIENT, flags="MF")
    assert own.run(response(dport=40500, ip=ip, payload=b"x" * 40)) == (True, FRAGMENT, [])
    assert own.run(response(dport=39999, ip=ip, payload=b"x" * 40)) == UNSEEN


def test_self_malformed(own):
    frame = patched(response(dport=40500), 46, [0x40])
    assert own.run(frame) == (True, InterceptCount.MALFORMED, [])
