"""Responses from other hosts: when the kernel may keep their sessions, when all are there."""

import ipaddress

import pytest

from pycopy.command.config import ReplayConfig
from pycopy.kernel.abi import POOL_NETWORKS
from pycopy.process.loop import Loop
from pycopy.responses.elsewhere import ResponsesElsewhere, relayed_families, why_not_in_kernel
from pycopy.tap import Transport
from pycopy.wire.address import map_address

TARGET = {4: "10.0.0.2", 6: "fd00::2"}


def config(intercepts=("10.0.0.3",), pool=(), lonely=False):
    return ReplayConfig(
        intercepts=[(host, 36524) for host in intercepts],
        client_pool=[ipaddress.ip_network(text) for text in pool],
        lonely=lonely,
    )


def targets(*addresses):
    return [(map_address(ipaddress.ip_address(text)), 80) for text in addresses]


def why(*addresses, **options):
    return why_not_in_kernel(config(**options), targets(*addresses))


def test_as_a_rule():
    assert why("10.0.0.2") == ""
    assert why("fd00::2", intercepts=("fd00::3",)) == ""


@pytest.mark.parametrize("number", [POOL_NETWORKS, POOL_NETWORKS + 1])
def test_a_pool_of_too_many_networks(number):
    pool = [f"62.135.{n}.0/24" for n in range(number)] + ["fd99::/64"]
    said = "" if number == POOL_NETWORKS else "-c has more than 16 networks of IPv4"
    assert why("10.0.0.2", pool=pool) == said


def test_a_target_in_the_pool():
    """Never chosen for a copy, which user space knows to avoid."""
    assert why("10.0.0.2", pool=["10.0.0.0/24"]) == "the target 10.0.0.2 is itself one of -c"


def test_only_targets_of_the_family_of_all_intercepts():
    """A datagram is written over a response, and has its family."""
    both = targets("10.0.0.2", "fd00::2")
    assert why("10.0.0.2", "fd00::2") == ""
    assert relayed_families(config(), both) == {4}
    two = ("10.0.0.3", "fd00::3")
    assert relayed_families(config(two), both) == frozenset()
    assert "different IP versions" in why("10.0.0.2", "fd00::2", intercepts=two)


class Listener:
    """Need not hear anything here."""

    def __getattr__(self, _name):
        return print


class GivenUp:
    """The connection to an intercept that has closed it; it takes the next one."""

    connected = False
    deadline_ns = 0

    def __init__(self, owner):
        self._owner = owner

    def on_timer(self, _now_ns):
        self.connected = True
        self._owner._look()


@pytest.mark.parametrize("lonely", [False, True])
def test_ready_is_said_when_connected(lonely):
    """Loading may take longer than an intercept waits. --lonely: whenever that will be."""
    mine = ResponsesElsewhere(
        config(lonely=lonely), Listener(), Loop(), targets("10.0.0.2"), Transport(4096, False, {}),
        None,
    )  # fmt: skip
    mine._clients = [GivenUp(mine)]
    mine._look()
    mine.catch_up()
    assert mine.silenced is lonely
