"""capture.c on frames that end early, are fragments, or contradict themselves.

Each has its counter, none makes a record, and all of them pass unchanged (Program.run
checks that on every frame of every test).
"""

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrRouting
from scapy.layers.l2 import ARP, Dot1Q, Ether

from pycopy.kernel.abi import CaptureCount
from tests.bpf.frames import (
    CLIENT,
    CLIENT6,
    HEADERS,
    LINKS,
    SERVER,
    SERVER6,
    SYN_OPTIONS,
    TIMESTAMPS,
    patched,
    tcp,
)
from tests.bpf.harness import Capture, expected_fate, mapped, runnable
from tests.bpf.oracle import look

FRAGMENT, TRUNCATED, MALFORMED = (
    CaptureCount.FRAGMENT,
    CaptureCount.TRUNCATED,
    CaptureCount.MALFORMED,
)
CAPTURED = CaptureCount.CAPTURED

ETH, IP4, IP6 = 14, 20, 40

#: With addresses, or scapy asks the network for them.
ETHER = LINKS["untagged"]


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("ip", HEADERS)
def test_cut_at_every_length(capture, port, ip, link):
    """Unknown until the ports are there, truncated until all is there."""
    frame = tcp(port, flags="S", payload=b"0123456789", ip=ip, link=link, options=SYN_OPTIONS)
    tcp_at = len(frame) - 10 - 40
    ran = 0
    for length in range(len(frame) + 1):
        if not runnable(capture.hook, frame[:length]):
            continue
        ran += 1
        expected = TRUNCATED if length >= tcp_at + 4 else None
        assert capture.fate(frame[:length]) is (CAPTURED if frame[:length] == frame else expected)
    assert ran > 50


def test_first_fragment(capture, port):
    for ip in (
        IP(src=CLIENT, dst=SERVER, flags="MF"),
        IPv6(src=CLIENT6, dst=SERVER6) / IPv6ExtHdrFragment(m=1),
        IPv6(src=CLIENT6, dst=SERVER6) / IPv6ExtHdrFragment(m=1) / IPv6ExtHdrDestOpt(),
    ):
        assert capture.fate(tcp(port, payload=b"x" * 64, ip=ip)) is FRAGMENT


def test_later_fragments(capture, port):
    """What stands where the ports would be is not read as ports."""
    for ip in (
        IP(src=CLIENT, dst=SERVER, frag=1, proto=6),
        IP(src=CLIENT, dst=SERVER, frag=8191, flags="MF", proto=6),
        IPv6(src=CLIENT6, dst=SERVER6) / IPv6ExtHdrFragment(offset=1, m=0, nh=6),
        IPv6(src=CLIENT6, dst=SERVER6) / IPv6ExtHdrFragment(offset=8191, m=1, nh=6),
    ):
        # To the port of no service: it is counted all the same, being TCP.
        assert capture.fate(tcp(port, 9999, payload=b"x", ip=ip)) is FRAGMENT
        assert capture.fate(tcp(port, payload=b"x", ip=ip)[:70]) is FRAGMENT


def test_fragments_of_others(capture):
    frames = [
        ETHER / IP(src=CLIENT, dst=SERVER, flags="MF") / UDP(dport=80) / bytes(32),
        ETHER / IP(src=CLIENT, dst=SERVER, frag=5, proto=17) / bytes(32),
        ETHER / IPv6(src=CLIENT6, dst=SERVER6) / IPv6ExtHdrFragment(m=1) / UDP() / bytes(32),
        ETHER / IPv6(src=CLIENT6, dst=SERVER6) / IPv6ExtHdrFragment(offset=5, nh=17) / bytes(32),
    ]
    assert [capture.fate(bytes(frame)) for frame in frames] == [None] * 4


def test_fragments_that_have_no_ports(capture, port):
    """RFC 1858's tiny first fragment: 8 bytes, or less than the ports."""
    for size in (8, 4, 3, 0):
        frame = tcp(port, ip=IP(src=CLIENT, dst=SERVER, flags="MF", len=IP4 + size))
        assert capture.fate(frame[: ETH + IP4 + size]) is FRAGMENT


def test_dont_fragment_is_no_fragment(capture, port):
    frame = tcp(port, payload=b"x", ip=IP(src=CLIENT, dst=SERVER, flags="DF"))
    assert capture.fate(frame) is CAPTURED
    frame = tcp(port, payload=b"x", ip=IP(src=CLIENT, dst=SERVER, flags="evil"))
    assert capture.fate(frame) is CAPTURED


def test_not_tcp_not_ip(capture):
    frames = [
        ETHER / ARP() / bytes(60),
        ETHER / IP(src=CLIENT, dst=SERVER) / UDP(dport=80) / bytes(40),
        ETHER / IPv6(src=CLIENT6, dst=SERVER6) / UDP(dport=80) / bytes(40),
        ETHER / IPv6(src=CLIENT6, dst=SERVER6, nh=59) / bytes(40),
        Ether(bytes(12) + b"\x88\xcc") / bytes(60),
        Ether(bytes(12) + b"\x00\x01") / bytes(60),
        ETHER / Dot1Q() / Dot1Q() / Dot1Q() / IP(src=CLIENT, dst=SERVER) / TCP(dport=80),
        # A TCP header under other protocols is theirs.
        ETHER / IP(src=CLIENT, dst=SERVER, proto=47) / TCP(dport=80),
        ETHER / IPv6(src=CLIENT6, dst=SERVER6, nh=50) / TCP(dport=80),
    ]
    assert [capture.fate(bytes(frame)) for frame in frames] == [None] * len(frames)


def test_bad_ip_version_and_header_length(capture, port):
    """Not IP as anybody would accept it: its ports are not looked at."""
    four, six = tcp(port, payload=b"x" * 20), tcp(port, payload=b"x" * 20, ip="IPv6")
    for first in (0x05, 0x44, 0x40, 0x65, 0x35, 0xF5):
        assert capture.fate(patched(four, ETH, [first])) is None
    for first in (0x40, 0x45, 0x00, 0x70):
        assert capture.fate(patched(six, ETH, [first])) is None
    # Each ihl: a longer header than there is moves the ports to where others stand.
    for ihl in range(5, 16):
        frame = patched(four, ETH, [0x40 | ihl])
        assert_like_oracle(capture, frame)


def assert_like_oracle(capture, frame):
    assert capture.fate(frame) is expected_fate(look(frame), (80, 8081))


def test_total_length(capture, port):
    """IPv4: shorter than the headers is malformed, longer than the frame truncated."""
    frame = tcp(port, payload=b"x" * 16, options=TIMESTAMPS)
    full = len(frame) - ETH
    for total in [*range(1, full + 20), 1500, 0xFFFF]:
        got = capture.fate(patched(frame, ETH + 2, total.to_bytes(2, "big")))
        if total < IP4 + 4:
            assert got is None
        elif total < IP4 + 32:
            assert got is MALFORMED
        elif total == IP4 + 32:
            # Only now is it an ACK, the rest being padding: data in it, none.
            assert got is CaptureCount.PURE_ACK
        else:
            assert got is (CAPTURED if total <= full else TRUNCATED)


def test_payload_length(capture, port):
    """The same for IPv6."""
    frame = tcp(port, payload=b"x" * 16, ip="IPv6", options=TIMESTAMPS)
    full = len(frame) - ETH - IP6
    for total in [*range(1, full + 20), 1500, 0xFFFF]:
        got = capture.fate(patched(frame, ETH + 4, total.to_bytes(2, "big")))
        if total < 4:
            assert got is None
        elif total < 32:
            assert got is MALFORMED
        elif total == 32:
            assert got is CaptureCount.PURE_ACK
        else:
            assert got is (CAPTURED if total <= full else TRUNCATED)


@pytest.mark.parametrize("ip", ["IPv4", "IPv6"])
def test_data_offset(capture, port, ip):
    frame = tcp(port, payload=b"\x01" * 30, ip=ip)
    tcp_at = len(frame) - 50
    for words in range(16):
        got = capture.fate(patched(frame, tcp_at + 12, [words << 4]))
        assert got is (CAPTURED if 5 <= words <= 12 else MALFORMED), words


OPTIONS_THAT_LEAD_NOWHERE = [
    b"\x08\x0d" + bytes(10),  # one byte more than there is
    b"\x02\xff\x05\xb4",
    b"\x01\x01\x01\x02",  # a kind, and no length
    b"\x02\x00\x05\xb4",
    b"\xfe\x01\x01\x01",
    b"\x05\x0a" + bytes(6),  # a SACK block cut
    b"\x01\x01\x08\x0a" + bytes(4),
    b"\x01" * 39 + b"\x08",
    b"\x01" * 38 + b"\x08\x0a",
    b"\x08\x0a" + bytes(8) + b"\x08\x03",
]


@pytest.mark.parametrize("flags", ["S", "PA"])
@pytest.mark.parametrize("raw", OPTIONS_THAT_LEAD_NOWHERE, ids=bytes.hex)
def test_options_that_lead_nowhere(capture, port, raw, flags):
    frame = with_raw_options(port, raw, flags)
    assert look(frame).fate == "malformed"
    assert capture.fate(frame) is MALFORMED


def with_raw_options(port, raw, flags="PA", payload=b"payload"):
    raw += bytes(-len(raw) % 4)
    ip = IP(src=CLIENT, dst=SERVER, len=IP4 + 20 + len(raw) + len(payload))
    frame = tcp(port, flags=flags, payload=raw + payload, ip=ip)
    return patched(frame, ETH + IP4 + 12, [(20 + len(raw)) // 4 << 4])


def test_extension_headers_without_end(capture, port):
    base = IPv6(src=CLIENT6, dst=SERVER6)
    chain = base
    for count in range(1, 12):
        chain = chain / IPv6ExtHdrDestOpt()
        got = capture.fate(tcp(port, payload=b"x", ip=chain))
        assert got is (CAPTURED if count <= 8 else None), count


def test_extension_header_longer_than_the_packet(capture, port):
    frame = tcp(port, payload=b"x" * 40, ip="IPv6 destination options")
    for units in range(256):
        assert_like_oracle(capture, patched(frame, ETH + IP6 + 1, [units]))
    frame = tcp(port, payload=b"x" * 2100, ip="IPv6 destination options")
    for units in range(256):
        assert_like_oracle(capture, patched(frame, ETH + IP6 + 1, [units]))


def test_still_on_its_way(capture, port):
    """A routing header with segments left: this host only forwards it."""
    ip = IPv6(src=CLIENT6, dst=SERVER6) / IPv6ExtHdrRouting(addresses=["fd00::2"], segleft=1)
    assert capture.fate(tcp(port, payload=b"x", ip=ip)) is None


def test_extension_header_cut_by_the_payload_length(capture, port):
    frame = tcp(port, payload=b"x" * 40, ip="IPv6 destination options")
    for total in range(1, 40):
        assert_like_oracle(capture, patched(frame, ETH + 4, total.to_bytes(2, "big")))


def test_fragment_header_in_the_padding(capture, port):
    """Behind the end of the datagram nothing is a header, whatever it looks like."""
    later = IPv6(src=CLIENT6, dst=SERVER6) / IPv6ExtHdrFragment(offset=1, nh=6)
    frame = tcp(port, payload=b"x" * 40, ip=later)
    assert capture.fate(frame) is FRAGMENT
    for total in range(1, 8):
        assert capture.fate(patched(frame, ETH + 4, total.to_bytes(2, "big"))) is None
    assert capture.fate(patched(frame, ETH + 4, b"\0\x08")) is FRAGMENT


@pytest.mark.parametrize("ip, length_at, counted", [("IPv4", 2, IP4), ("IPv6", 4, 0)])
def test_datagram_shorter_than_a_tcp_header(capture, port, ip, length_at, counted):
    """All there, and too short: malformed, not truncated."""
    frame = tcp(port, flags="F", ip=ip)
    tcp_at = len(frame) - 20
    for size in range(21):
        total = (counted + size).to_bytes(2, "big")
        got = capture.fate(patched(frame, ETH + length_at, total)[: tcp_at + size])
        assert got is (CAPTURED if size == 20 else MALFORMED if size >= 4 else None), size


@pytest.mark.parametrize("ip", ["IPv4", "IPv6"])
def test_a_service_without_address_is_this_hosts_own(hook, ip):
    """What is merely routed through, from containers or as a gateway, is somebody else's."""
    program = Capture(hook, services=[(None, 80)], forwarded=False)
    frame = tcp(80, flags="S", ip=HEADERS[ip])
    assert program.run(frame) == []
    assert program.changed == {}
    for address in (SERVER, SERVER6):
        program.maps["local_addresses"].update(mapped(address), b"\1")
    assert len(program.run(frame)) == 1
    program.close()
