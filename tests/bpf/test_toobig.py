"""ICMP "packet too big" about a copy: recorded by intercept.c, and never touched."""

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror, TCPerror
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6PacketTooBig,
    IPerror6,
    IPv6,
    IPv6ExtHdrHopByHop,
)

from pycopy.kernel.abi import PASS, SWALLOW, InterceptCount
from pycopy.wire.segment import KEY, KIND_TOO_BIG
from tests.bpf.frames import LINKS
from tests.bpf.harness import Intercept, mapped, runnable

ROUTER, TARGET, CLIENT = "10.7.0.1", "10.1.0.1", "10.88.1.2"
ROUTER6, TARGET6, CLIENT6 = "fd07::1", "fd01::1", "fd88::2"
PORT, SEQ = 40500, 0xFFFFFFF0

UNSEEN = (False, None, [])


def too_big(mtu=1300, *, client=CLIENT, sport=PORT, link="untagged", icmp=None, inner=None):
    """As a router sends it; of TCP there are the 8 bytes that every one returns."""
    tcp = bytes(TCPerror(sport=sport, dport=80, seq=SEQ))[:8]
    if ":" in client:
        outer = IPv6(src=ROUTER6, dst=client) / (icmp or ICMPv6PacketTooBig(mtu=mtu))
        inner = inner or IPerror6(src=client, dst=TARGET6, nh=6, plen=1400)
    else:
        outer = IP(src=ROUTER, dst=client) / (icmp or ICMP(type=3, code=4, nexthopmtu=mtu))
        inner = inner or IPerror(src=client, dst=TARGET, proto=6, flags="DF", len=1500)
    return bytes(LINKS[link] / outer / inner / tcp)


def check(program, frame, mtu=1300, client=CLIENT, sport=PORT):
    """It passes, and its record says what was too big for what."""
    swallowed, kind, records = program.run(frame)
    assert (swallowed, kind, len(records)) == (False, InterceptCount.TOO_BIG, 1)
    segment, payload = records[0]
    target, family = (TARGET6, 6) if ":" in client else (TARGET, 4)
    assert segment.time_ns and payload == b""
    assert segment._replace(time_ns=0) == (
        0, KIND_TOO_BIG, *[0] * 5, SEQ, *[0] * 5, mtu, family, 0,
        KEY.pack(mapped(client), mapped(target), sport, 80), bytes(32),
    )  # fmt: skip


@pytest.fixture(scope="module")
def own():
    """Self placement: at TC only."""
    targets = [(mapped(TARGET), 80), (mapped(TARGET6), 80)]
    program = Intercept("tc", targets=targets, ports=(40000, 40999))
    program.own(mapped(CLIENT), mapped(TARGET), PORT, 80)
    program.own(mapped(CLIENT6), mapped(TARGET6), PORT, 80)
    yield program
    program.close()


@pytest.mark.parametrize("client", [CLIENT, CLIENT6])
@pytest.mark.parametrize("link", LINKS)
def test_about_a_copy(own, client, link):
    for mtu in (0, 552, 1300, 65535):
        check(own, too_big(mtu, client=client, link=link), mtu, client)


def test_a_mtu_of_more_than_16_bits(own):
    check(own, too_big(1 << 20, client=CLIENT6), 65535, CLIENT6)


@pytest.mark.parametrize("client", [CLIENT, CLIENT6])
def test_about_somebody_else(own, client):
    """This host's own connections, be it to the same target."""
    assert own.run(too_big(client=client, sport=PORT + 1)) == UNSEEN
    elsewhere = "fd88::3" if ":" in client else "10.88.1.3"
    assert own.run(too_big(client=elsewhere)) == UNSEEN


def test_other_icmp(own):
    for frame in (
        too_big(icmp=ICMP(type=3, code=1)),
        too_big(icmp=ICMP(type=11, code=0)),
        too_big(icmp=ICMP(type=8)),
        too_big(client=CLIENT6, icmp=ICMPv6DestUnreach(code=4)),
        too_big(inner=IPerror(src=CLIENT, dst=TARGET, proto=17)),
        too_big(inner=IP(src=CLIENT, dst=TARGET, proto=6, options=b"\x01" * 4)),
        too_big(client=CLIENT6, inner=IPerror6(src=CLIENT6, dst=TARGET6, nh=0)),
        bytes(LINKS["untagged"] / IP(src=ROUTER, dst=CLIENT) / UDP() / bytes(40)),
        bytes(LINKS["untagged"] / IP(src=ROUTER, dst=CLIENT, frag=9, proto=1) / bytes(60)),
        bytes(
            LINKS["untagged"] / IPv6(src=ROUTER6, dst=CLIENT6) / IPv6ExtHdrHopByHop()
            / ICMPv6PacketTooBig(mtu=1300) / IPerror6(src=CLIENT6, dst=TARGET6, nh=6) / TCP()
        ),
    ):  # fmt: skip
        assert own.run(frame) == UNSEEN


@pytest.mark.parametrize("client", [CLIENT, CLIENT6])
def test_cut_at_every_length(own, client):
    frame = too_big(client=client)
    for length in range(len(frame)):
        if runnable(own.hook, frame[:length]):
            assert own.run(frame[:length]) == UNSEEN, length
    check(own, frame, client=client)


def test_ring_full():
    """Let through all the same, and counted."""
    program = Intercept("tc", targets=[(mapped(TARGET), 80)], ports=(40000, 40999), ring_bytes=4096)
    program.own(mapped(CLIENT), mapped(TARGET), PORT, 80)
    for _ in range(4096 // 120 + 5):
        program.call(too_big())
    assert program.changed == {InterceptCount.MATCHED: 1, InterceptCount.RING_FULL: 1}
    program.close()


@pytest.mark.parametrize("client", [CLIENT, CLIENT6])
def test_by_claim(hook, client):
    """On a target or an assistant: about a client whose responses are swallowed."""
    program = Intercept(hook, expression="src port 80")
    frame, bits = too_big(client=client), 128
    assert program.run(frame) == UNSEEN
    program.set_default(SWALLOW)
    check(program, frame, client=client)
    program.claim(mapped(client), bits, PASS)
    assert program.run(frame) == UNSEEN
    program.set_default(PASS)
    program.claim(mapped(client), bits, SWALLOW)
    check(program, frame, client=client)
    program.close()
