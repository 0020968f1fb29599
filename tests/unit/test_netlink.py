"""Requests to rtnetlink: framing, answers of one and of many messages, refusals."""

import socket
import struct

import pytest

from pycopy.host.netlink import DUMP, attribute, attributes, request

GET_LINK, IFLA_IFNAME = 18, 3
IFINFOMSG = struct.Struct("=BxHiII")


def links(flags=0, index=0):
    answers = request(GET_LINK, flags, IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, 0, 0))
    return {
        IFINFOMSG.unpack_from(answer)[2]: attributes(answer[IFINFOMSG.size :])[IFLA_IFNAME]
        for answer in answers
    }


def test_one_answer():
    index = socket.if_nametoindex("lo")
    assert links(index=index) == {index: b"lo\0"}


def test_many_answers():
    assert links(DUMP) == {index: name.encode() + b"\0" for index, name in socket.if_nameindex()}


def test_a_refusal_is_an_oserror():
    with pytest.raises(OSError, match="No such device"):
        links(index=0x7FFFFFF0)


def test_attributes_are_padded_and_read_back():
    data = attribute(1, b"abc") + attribute(0x8002, b"") + attribute(3, bytes(4))
    assert len(data) == 8 + 4 + 8
    assert attributes(data) == {1: b"abc", 2: b"", 3: bytes(4)}


def test_damaged_attributes_end_the_list():
    assert attributes(attribute(1, b"abcd") + bytes(4) + attribute(2, b"")) == {1: b"abcd"}
