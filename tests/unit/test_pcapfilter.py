"""Filter expressions: libpcap's verdict, and the errors a user gets to read."""

import ipaddress
import struct

import pytest

from pycopy.errors import UsageError
from pycopy.pcapfilter import compile_filter, matches


def datagram(dst="10.0.0.1", dport=80):
    tcp = struct.pack("!HHIIBBHHH", 1234, dport, 1, 0, 0x50, 2, 100, 0, 0)
    src, to = (ipaddress.ip_address(each).packed for each in ("10.0.0.2", dst))
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 0, 0, 64, 6, 0, src, to) + tcp


def frame(tags=b"", **fields):
    return b"\2" * 12 + tags + b"\x08\0" + datagram(**fields)


@pytest.mark.parametrize("tags", [b"", b"\x81\0\0\x64", b"\x88\xa8\0\1\x81\0\0\2"])
def test_matches_frames_whatever_their_tags(tags):
    assert matches("tcp dst port 80", frame(tags), 14)
    assert not matches("tcp dst port 81", frame(tags), 14)
    assert matches("dst net 10.0.0.0/24 and tcp[tcpflags] == tcp-syn", frame(tags), 14)


def test_matches_datagrams_of_devices_without_link_header():
    assert matches("tcp dst port 80 and dst host 10.0.0.1", datagram(), 0)
    assert not matches("dst host 10.0.0.1", datagram(dst="10.0.0.9"), 0)


@pytest.mark.parametrize("expression", ["", "  "])
def test_no_expression_wants_everything(expression):
    assert matches(expression, b"", 14)
    assert "return 1;" in compile_filter(expression, 14)


@pytest.mark.parametrize(
    ("expression", "l2_bytes", "words"),
    [
        ("tcp and bogus 12", 14, "error"),
        ("tcp dst port", 14, "syntax error"),
        ("tcp dst port 99999", 14, "illegal port"),
        ("ether broadcast", 0, "not a broadcast link"),
        ("vlan 100 and tcp", 14, "without their VLAN tags"),
        ("tcp and(vlan)", 14, "without their VLAN tags"),
        ("inbound and tcp", 14, "cannot be had in the kernel"),
        ("ifindex 3", 14, "cannot be had in the kernel"),
        ("ip protochain 6", 14, "cannot be had in the kernel"),
    ],
)
def test_what_is_wrong_is_said(expression, l2_bytes, words):
    with pytest.raises(UsageError) as caught:
        compile_filter(expression, l2_bytes)
    assert words in caught.value.cause
    assert expression in caught.value.cause
    assert caught.value.cure


def test_a_host_named_like_a_keyword_is_no_keyword():
    with pytest.raises(UsageError, match="unknown host"):
        compile_filter("host vlan.invalid", 14)


def test_only_what_is_needed_is_generated():
    text = compile_filter("tcp dst port 80", 14)
    assert text.startswith("/* tcp dst port 80 */\nstatic inline int pycopy_filter(PYCOPY_CTX *ctx")
    assert "M0" not in text
    assert "ethertype" not in compile_filter("tcp dst port 80", 0)
