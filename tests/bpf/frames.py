"""Frames for the tests, built by scapy; hand-made bytes where scapy would mend them."""

from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether

CLIENT, SERVER = "192.0.2.7", "10.0.0.1"
CLIENT6, SERVER6 = "2001:db8::7", "fd00::1"

TIMESTAMPS = [("NOP", 0), ("NOP", 0), ("Timestamp", (0x11223344, 0x55667788))]
SYN_OPTIONS = [
    ("MSS", 1460),
    ("SAckOK", b""),
    ("Timestamp", (0xFFFFFFFF, 0)),
    ("NOP", 0),
    ("WScale", 7),
]

#: Each way an IP header may look in front of the same TCP segment.
HEADERS = {
    "IPv4": IP(src=CLIENT, dst=SERVER),
    "IPv4 with options": IP(src=CLIENT, dst=SERVER, options=[b"\x94\x04\x00\x00", b"\x01" * 36]),
    "IPv6": IPv6(src=CLIENT6, dst=SERVER6),
    "IPv6 hop-by-hop": IPv6(src=CLIENT6, dst=SERVER6) / IPv6ExtHdrHopByHop(),
    "IPv6 routing, done": IPv6(src=CLIENT6, dst=SERVER6)
    / IPv6ExtHdrRouting(addresses=["fd00::2"], segleft=0),
    "IPv6 destination options": IPv6(src=CLIENT6, dst=SERVER6) / IPv6ExtHdrDestOpt(),
    "IPv6 atomic fragment": IPv6(src=CLIENT6, dst=SERVER6) / IPv6ExtHdrFragment(offset=0, m=0),
    "IPv6 all of them": IPv6(src=CLIENT6, dst=SERVER6)
    / IPv6ExtHdrHopByHop()
    / IPv6ExtHdrDestOpt()
    / IPv6ExtHdrRouting(addresses=["fd00::2", "fd00::3"], segleft=0)
    / IPv6ExtHdrFragment(offset=0, m=0)
    / IPv6ExtHdrDestOpt(),
}

_ETHER = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")

LINKS = {
    "untagged": _ETHER,
    "802.1Q": _ETHER / Dot1Q(vlan=7),
    "802.1ad and 802.1Q": _ETHER / Dot1AD(vlan=9) / Dot1Q(vlan=7),
    "802.1Q twice": _ETHER / Dot1Q(vlan=9) / Dot1Q(vlan=7),
}


def tcp(
    sport=1234,
    dport=80,
    flags="PA",
    payload=b"",
    *,
    ip="IPv4",
    link="untagged",
    seq=1000,
    ack=2000,
    options=(),
    **more,
):
    """One frame with a TCP segment; `ip` and `link` name the headers, or are them."""
    ip = HEADERS[ip] if isinstance(ip, str) else ip
    segment = TCP(
        sport=sport, dport=dport, flags=flags, seq=seq, ack=ack, options=list(options), **more
    )
    return bytes(LINKS[link] / ip / segment / payload)


def patched(frame, at, value):
    """The frame with the bytes at `at` replaced."""
    return frame[:at] + bytes(value) + frame[at + len(value) :]


def big_tcp(frame, l3_at=14):
    """A frame of more than 64 KB as the kernel's BIG TCP makes it: its length field is 0."""
    at = l3_at + (2 if frame[l3_at] >> 4 == 4 else 4)
    return patched(frame, at, bytes(2))


def padded(frame, to_bytes=60, filler=b"\xee"):
    """As Ethernet pads it to its minimum, not with zeroes so that a wrong read shows."""
    return frame + filler * (to_bytes - len(frame))
