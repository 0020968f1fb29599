"""Next hops without a network of one's own: the loopback interface, and what it costs."""

import contextlib
import errno
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from pycopy.errors import PycopyError
from pycopy.host import nexthop, rtnetlink

ROOT = Path(__file__).parents[2]
MAPPED = bytes(10) + b"\xff\xff"
LOCAL4 = MAPPED + b"\x7f\x00\x00\x01"


@pytest.fixture
def hops():
    changed = []
    hops = nexthop.NextHops(changed.append)
    hops.changed = changed
    yield hops
    hops.close()


def test_loopback_has_the_link_header_the_kernel_would_write(hops):
    hop = hops.resolve(LOCAL4)
    assert (hop.ifname, hop.l2, hop.usable) == ("lo", bytes(12) + b"\x08\x00", True)
    assert (hop.source, hop.mtu > 1500) == (LOCAL4, True)
    assert hops.changed == [hop]
    assert hops.resolve(LOCAL4) is hop
    hops.wait_usable(0)


def test_nothing_to_do_without_a_hop(hops):
    assert hops.deadline_ns == nexthop.NEVER_NS
    hops.on_readable()
    hops.wait_usable(0)


def test_multicast_is_refused_with_the_reason(hops):
    hop = hops.resolve(MAPPED + b"\xe0\x00\x00\x01")
    assert not hop.usable
    with pytest.raises(PycopyError, match=r"no route to 224\.0\.0\.1: it is a multicast address"):
        hops.wait_usable(0)


def test_multicast_is_refused_with_the_reason_where_there_is_no_route_at_all(root):
    for options in (["-n"], ["-n", "-m"]):
        code = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "from pycopy.host import nexthop\n"
            "hops = nexthop.NextHops()\n"
            "for address in (b'\\xe0\\0\\0\\1', b'\\xef\\1\\2\\3'):\n"
            "    print(hops.resolve(bytes(10) + b'\\xff\\xff' + address).trouble)\n"
            "print(hops.resolve(b'\\xff\\2' + bytes(13) + b'\\1').trouble)\n"
        )
        words = ["unshare", *options, sys.executable, "-I", "-c", code, ROOT]
        said = subprocess.check_output(words, text=True, timeout=30)
        assert said.splitlines() == ["it is a multicast address"] * 3


def test_an_unchanged_look_is_not_a_change_and_keeps_the_link_header_object(hops):
    hop = hops.resolve(LOCAL4)
    before = hop.l2
    hops.look_at_all()
    assert hop.l2 is before
    assert hops.changed == [hop]
    assert hops.deadline_ns > 1


def test_on_change_may_resolve_another_destination():
    with contextlib.closing(nexthop.NextHops(lambda _: hops.resolve(bytes(15) + b"\x01"))) as hops:
        hop = hops.resolve(LOCAL4)
        del hops._hops[bytes(15) + b"\x01"]
        hop.mtu = 0
        hops.look_at_all()
        assert len(hops._hops) == 2


def neighbour_event(ifindex, raw):
    """RTM_NEWNEIGH as the kernel sends it."""
    family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
    body = struct.pack("=BxxxiHBB", family, ifindex, 2, 0, 0)
    body += struct.pack("=HH", 4 + len(raw), 1) + raw
    return struct.pack("=IHHII", 16 + len(body), rtnetlink.RTM_NEWNEIGH, 0, 0, 0) + body


def behind(hops, destination, ifindex, raw):
    """A Hop that is given a neighbour."""
    hop = hops._hops[destination] = nexthop.Hop(destination)
    address = MAPPED + raw if len(raw) == 4 else raw
    hops._put_behind(hop, rtnetlink.Neighbour(ifindex, address))
    return hop


def test_only_who_is_behind_a_neighbour_is_looked_at_again(hops):
    gateway, other = b"\x0a\x00\x00\x01", b"\xfd" + bytes(14) + b"\x01"
    ours = [behind(hops, MAPPED + bytes([10, 1, 0, n]), 7, gateway) for n in range(5)]
    its = behind(hops, other, 7, other)
    for ifindex, raw, due in (
        (7, gateway, ours), (7, other, [its]), (8, gateway, []), (7, b"\x0a\x00\x00\x02", []),
    ):  # fmt: skip
        hops._due.clear()
        message = neighbour_event(ifindex, raw)
        assert not hops._note(rtnetlink.RTM_NEWNEIGH, message)
        assert not hops._note(rtnetlink.RTM_DELNEIGH, message)
        assert set(hops._due) == set(due)
    assert hops.changes == 0
    assert hops._note(16, b"") and hops.changes == 1
    for hop in ours:
        hops._put_behind(hop, None)
    assert list(hops._behind) == [rtnetlink.Neighbour(7, other)]
    for cut in range(len(message)):
        hops._note(rtnetlink.RTM_NEWNEIGH, message[:cut])


class Asked(rtnetlink.Requests):
    """How often the kernel was asked for what."""

    def __init__(self):
        super().__init__()
        self.kinds = []

    def _ask(self, kind, flags, body):
        self.kinds.append(kind)
        return super()._ask(kind, flags, body)


def many(number):
    return [MAPPED + bytes([127, 1, n >> 8, n & 255]) for n in range(1, number + 1)]


def test_thousands_of_targets_cost_one_request_each(hops):
    hops._requests.close()
    hops._requests = asked = Asked()
    found = hops.resolve_all(many(2000) * 2)
    assert len(found) == 2000 and hops.changed == found
    assert all(hop.usable and hop.ifname == "lo" for hop in found)
    assert asked.kinds.count(rtnetlink.RTM_GETROUTE) == 2000
    assert len(asked.kinds) == 2001  # and the device, once
    hops.wait_usable(0)
    asked.kinds.clear()
    assert hops.resolve(many(2000)[7]) is found[7] and not asked.kinds


def test_traffic_gets_its_turn_between_slices(hops, monkeypatch):
    """All are looked at, the longest due first, whatever comes in between."""
    found = hops.resolve_all(many(50))
    looked = []
    monkeypatch.setattr(hops, "_look", looked.append)
    monkeypatch.setattr(nexthop, "_SLICE_NS", 1)  # one
    now_ns = hops.deadline_ns
    hops.tick(now_ns)
    assert looked == found[:1]
    assert hops.deadline_ns == hops._rested_at
    hops._due.update(dict.fromkeys(found))
    while hops._due:
        hops.tick(now_ns)
    assert looked == [*found, found[0]]
    assert hops.deadline_ns == now_ns + nexthop._REFRESH_NS


def test_only_those_in_trouble_are_tried_again(hops, monkeypatch):
    hops.resolve_all(many(50))
    bad = hops.resolve(MAPPED + b"\xe0\x00\x00\x01")
    looked = []
    monkeypatch.setattr(hops, "_look", looked.append)
    hops.tick(hops.deadline_ns)
    assert looked == [bad]


def test_a_full_neighbour_table_is_named_with_its_size(hops, monkeypatch):
    destination = MAPPED + b"\x0a\x00\x00\x09"

    class Full(rtnetlink.Requests):
        def route(self, _):
            return rtnetlink.Route(1, 7, b"", b"", 0)

        def link(self, _):
            return rtnetlink.Link("eth7", 1, 0x10001, 1500, bytes(6))

        def neighbour(self, _):
            return None

        def use(self, _):
            raise OSError(errno.ENOBUFS, "full")

    hops._requests.close()
    hops._requests = Full()
    assert not hops.resolve(destination).usable
    with pytest.raises(PycopyError) as caught:
        hops.wait_usable(0)
    assert caught.value.cause == "target 10.0.0.9: the kernel's neighbour table is full"
    assert "net.ipv4.neigh.default.gc_thresh3" in caught.value.cure


def test_datagrams_cut_short_end_quietly():
    assert list(rtnetlink.messages(b"")) == []
    assert list(rtnetlink.messages(b"\x10\x00\x00\x00")) == []
    whole = rtnetlink._NLMSGHDR.pack(20, 3, 0, 1, 2) + bytes(4)
    assert list(rtnetlink.messages(whole * 2)) == [(3, 0, 20), (3, 20, 20)]
    assert list(rtnetlink.messages(whole + whole[:-1])) == [(3, 0, 20)]
    assert list(rtnetlink.messages(rtnetlink._NLMSGHDR.pack(3, 3, 0, 1, 2))) == []


def run(code, *options):
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


RSS = """
def rss():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])
"""


def test_it_costs_little_memory():
    code = (
        RSS
        + """
before = rss()
from pycopy.host import nexthop
nexthop.NextHops().resolve(bytes(10) + bytes([255, 255, 127, 0, 0, 1]))
print(rss() - before)
"""
    )
    assert int(run(code)[0]) < 7_000


def test_it_does_without_pyroute2():
    """Which would be 26 MB and 100 ms: half of what this process may weigh."""
    code = """
import sys
from pycopy.host import nexthop
nexthop.NextHops().resolve(bytes(10) + bytes([255, 255, 127, 0, 0, 1]))
assert "pyroute2" not in sys.modules
print("well")
"""
    assert run(code) == ["well"]
