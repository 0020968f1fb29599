"""Filter expressions: libpcap's verdict, and the errors a user gets to read."""

import ipaddress
import struct

import pytest

from pycopy.errors import UsageError
from pycopy.kernel import pcapfilter
from pycopy.kernel.bpfasm import INSTRUCTION
from pycopy.kernel.pcapfilter import filter_code, matches


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
    assert filter_code(expression, 14, False) == b""


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
        filter_code(expression, l2_bytes, False)
    assert words in caught.value.cause
    assert expression in caught.value.cause
    assert caught.value.cure


def test_a_host_named_like_a_keyword_is_no_keyword():
    with pytest.raises(UsageError, match="unknown host"):
        filter_code("host vlan.invalid", 14, False)


def instructions(expression, l2_bytes=14, hook_xdp=False):
    """(opcode, target, source, offset, constant) each."""
    code = filter_code(expression, l2_bytes, hook_xdp)
    return [
        (opcode, registers & 15, registers >> 4, offset, constant)
        for opcode, registers, offset, constant in INSTRUCTION.iter_unpack(code)
    ]


def stack_bytes(expression):
    """By its stores, and by the buffers it gives to the helper (R3 = R10 + constant)."""
    found = instructions(expression)
    stores = [offset for opcode, target, _, offset, _ in found if opcode & 6 == 2 and target == 10]
    buffers = [constant for opcode, target, *_, constant in found if (opcode, target) == (0x07, 3)]
    return -min(stores + buffers)


@pytest.mark.parametrize(("hook_xdp", "helper"), [(False, 26), (True, 189)])
def test_it_calls_only_the_hooks_own_helper(hook_xdp, helper):
    found = instructions("tcp[tcp[12] & 15] / ip[8] > 3", hook_xdp=hook_xdp)
    assert {(each[2], each[4]) for each in found if each[0] == 0x85} == {(0, helper)}
    # Of the classes none that came after Linux 4.14, which is 6; no load of constants, which is 0.
    assert {each[0] & 7 for each in found} <= {1, 2, 3, 4, 5, 7}
    assert found[-1][0] == 0x95


def test_the_stack_is_for_the_length_a_buffer_and_what_is_kept():
    assert stack_bytes("tcp dst port 80") == 8
    assert stack_bytes("tcp port 80 and (ip[2:2] - ((ip[0] & 0xf) << 2)) != 0") == 8 + 4


def test_only_frames_have_tags():
    assert 0x8100 in {each[4] for each in instructions("tcp dst port 80")}
    assert 0x8100 not in {each[4] for each in instructions("tcp dst port 80", l2_bytes=0)}


def classic(*instructions):
    return [pcapfilter._Instruction(*each) for each in instructions]


def test_too_long_is_said(monkeypatch):
    """From the first comparison to the verdict: farther than a jump goes."""
    load, accept, refuse = (0x28, 0, 0, 12), (6, 0, 0, 1), (6, 0, 0, 0)
    compare = (0x15, 0, 1, 0x800)
    program = classic(load, *[compare, accept] * 30_000, refuse)
    monkeypatch.setattr(pcapfilter, "_instructions", lambda *_: program)
    with pytest.raises(UsageError, match="too long") as caught:
        filter_code("many hosts", 14, False)
    assert "net" in caught.value.cure


def test_what_nothing_leads_to_is_left_out(monkeypatch):
    """The verifier would refuse it: here what stands behind a load that no packet satisfies."""
    program = classic((0x30, 0, 0, 70_000), (0x15, 0, 1, 77), (6, 0, 0, 1), (6, 0, 0, 0))
    monkeypatch.setattr(pcapfilter, "_instructions", lambda *_: program)
    assert 77 not in {each[4] for each in instructions("ip[70000] = 77")}
