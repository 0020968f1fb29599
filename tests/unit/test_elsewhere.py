"""When the kernel may keep sessions whose responses come from other hosts."""

import ipaddress

import pytest

from pycopy.command.config import ReplayConfig
from pycopy.kernel.abi import POOL_NETWORKS
from pycopy.process.loop import Loop
from pycopy.responses.elsewhere import ChannelAnswers
from pycopy.wire.address import map_address

TARGET = {4: "10.0.0.2", 6: "fd00::2"}


def answers(*targets, intercepts=("10.0.0.3",), pool=(), lonely=False):
    config = ReplayConfig(
        intercepts=[(host, 36524) for host in intercepts],
        client_pool=[ipaddress.ip_network(text) for text in pool],
        lonely=lonely,
    )
    return ChannelAnswers(
        config, Loop(), [(map_address(ipaddress.ip_address(text)), 80) for text in targets],
        on_records=list, on_ring=print, on_change=list, on_bye=list,
    )  # fmt: skip


def test_as_a_rule():
    assert answers("10.0.0.2").may_stay_in_kernel() == ""
    assert answers("fd00::2", intercepts=("fd00::3",)).may_stay_in_kernel() == ""


@pytest.mark.parametrize("number", [POOL_NETWORKS, POOL_NETWORKS + 1])
def test_a_pool_of_too_many_networks(number):
    pool = [f"62.135.{n}.0/24" for n in range(number)] + ["fd99::/64"]
    why = answers("10.0.0.2", pool=pool).may_stay_in_kernel()
    assert why == ("" if number == POOL_NETWORKS else "-c has more than 16 networks of IPv4")


def test_a_target_in_the_pool():
    """Never chosen for a copy, which user space knows to avoid."""
    why = answers("10.0.0.2", pool=["10.0.0.0/24"]).may_stay_in_kernel()
    assert why == "the target 10.0.0.2 is itself one of -c"


def test_only_targets_of_the_family_of_all_intercepts():
    """A datagram is written over a response, and has its family."""
    both = answers("10.0.0.2", "fd00::2")
    assert both.may_stay_in_kernel() == "" and both._families() == {4}
    two = answers("10.0.0.2", "fd00::2", intercepts=("10.0.0.3", "fd00::3"))
    assert two._families() == frozenset()
    assert "different IP versions" in two.may_stay_in_kernel()


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
    mine = answers("10.0.0.2", lonely=lonely)
    mine._clients = [GivenUp(mine)]
    mine._look()
    mine.catch_up()
    assert mine.cut_off is lonely
