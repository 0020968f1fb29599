"""Next hops without a network of one's own: the loopback interface, and what it costs."""

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyroute2")

from pycopy import nexthop, rtnetlink
from pycopy.errors import HostUnfit, PycopyError

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


def test_an_unchanged_look_is_not_a_change_and_keeps_the_link_header_object(hops):
    hop = hops.resolve(LOCAL4)
    before = hop.l2
    hops.tick(1)
    assert hop.l2 is before
    assert hops.changed == [hop]
    assert hops.deadline_ns > 1


def test_on_change_may_resolve_another_destination():
    with contextlib.closing(nexthop.NextHops(lambda _: hops.resolve(bytes(15) + b"\x01"))) as hops:
        hop = hops.resolve(LOCAL4)
        del hops._hops[bytes(15) + b"\x01"]
        hop.mtu = 0
        hops.tick(1)
        assert len(hops._hops) == 2


def test_only_neighbours_of_ours_are_of_concern(hops):
    hops._neighbours[LOCAL4] = nexthop._Neighbour(7, socket.AF_INET, MAPPED + b"\x0a\x00\x00\x01")

    def event(ifindex, address):
        message = rtnetlink.codecs().ndmsg()
        message["family"] = socket.AF_INET
        message["ifindex"] = ifindex
        message["attrs"] = [("NDA_DST", address)]
        message["header"]["type"] = rtnetlink.RTM_NEWNEIGH
        message.encode()
        return bytes(message.data)

    assert hops._concerns(rtnetlink.RTM_NEWNEIGH, event(7, "10.0.0.1"))
    assert not hops._concerns(rtnetlink.RTM_NEWNEIGH, event(7, "10.0.0.2"))
    assert not hops._concerns(rtnetlink.RTM_DELNEIGH, event(8, "10.0.0.1"))
    assert hops._concerns(16, b"")


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
    # All of pyroute2 would be 26 MB of the 40 MB the whole replay may take.
    code = (
        RSS
        + """
before = rss()
from pycopy import nexthop
nexthop.NextHops().resolve(bytes(10) + bytes([255, 255, 127, 0, 0, 1]))
print(rss() - before)
"""
    )
    assert int(run(code)[0]) < 12_000


def test_it_leaves_no_half_imported_pyroute2_behind():
    code = """
import sys
from pycopy import nexthop
local4 = bytes(10) + b"\\xff\\xff\\x7f\\0\\0\\1"
first = nexthop.NextHops().resolve(local4).ifname
assert not [name for name in sys.modules if name.startswith("pyroute2")]
import pyroute2
pyroute2.IPRoute().close()
assert nexthop.NextHops().resolve(local4).ifname == first
print("well")
"""
    assert run(code) == ["well"]


def test_it_uses_a_pyroute2_that_is_already_there():
    code = """
import pyroute2
from pycopy import nexthop
nexthop.NextHops().close()
pyroute2.IPRoute().close()
print("well")
"""
    assert run(code) == ["well"]


def test_a_missing_pyroute2_is_named():
    code = """
from pycopy import nexthop
from pycopy.errors import HostUnfit
try:
    nexthop.NextHops()
except HostUnfit as unfit:
    print(unfit.cure)
"""
    assert run(code, "-E", "-S") == ["apt", "install", "python3-pyroute2"]
    assert issubclass(HostUnfit, PycopyError)
