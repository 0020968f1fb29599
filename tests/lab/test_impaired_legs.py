"""Loss, duplicates and reordering on every leg: everything arrives, every session ends.

Each run carries keep-alive connections, short ones and uploads at the same time. The
servers log a digest of every request and of every connection's stream, so equal logs mean
that the target was sent exactly what the online server was sent, whatever was dropped.
"""

import pytest

from pycopy.lab.copying import Placement
from tests.lab.impair import LEGS, PER_MILLION, impair_channel, impair_leg
from tests.lab.runs import run_impaired

#: 5 % is slow, not wrong: a segment may be lost four times running.
RATES = {"0.1 %": 1_000, "1 %": 10_000, "5 %": 50_000}

intercepted = pytest.mark.parametrize(
    "placement", [Placement.TARGET, Placement.ASSISTANT], ids=lambda one: one.value
)


@pytest.fixture(scope="module", autouse=True)
def _no_offloads(lab):
    lab.set_offloads(False)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("leg", LEGS)
def test_loss(scenario, lab, request, leg, rate):
    done = run_impaired(
        scenario, Placement.SELF, request, f"loss {rate} {leg}",
        lambda: [impair_leg(lab, Placement.SELF, leg, drop_ppm=RATES[rate])],
    )  # fmt: skip
    expected = done["matched"] * RATES[rate] / PER_MILLION
    # Six standard deviations: an impairment that does nothing, or too much, is noticed.
    assert abs(done["dropped"] - expected) <= 6 * expected**0.5 + 1


@pytest.mark.parametrize("leg", LEGS)
@intercepted
def test_loss_of_1_percent(scenario, lab, request, placement, leg):
    run_impaired(
        scenario, placement, request, f"loss 1 % {leg} ({placement.value})",
        lambda: [impair_leg(lab, placement, leg, drop_ppm=10_000)],
    )  # fmt: skip


@pytest.mark.parametrize("leg", LEGS)
def test_duplicates_and_reordering(scenario, lab, request, leg):
    out_of_order = _tcp_counter(lab, "target", "TCPOFOQueue")
    done = run_impaired(
        scenario, Placement.SELF, request, f"duplicates 1 %, reordering 5 % {leg}",
        lambda: [impair_leg(lab, Placement.SELF, leg, duplicate_ppm=10_000, hold_ppm=50_000)],
    )  # fmt: skip
    assert done["duplicated"] and done["held"]
    if leg == "replay to target":
        assert _tcp_counter(lab, "target", "TCPOFOQueue") > out_of_order


@pytest.mark.parametrize("leg", LEGS)
def test_everything_at_once_over_ipv6(scenario, lab, request, leg):
    run_impaired(
        scenario, Placement.SELF, request, f"all three, IPv6, {leg}",
        lambda: [impair_leg(
            lab, Placement.SELF, leg, drop_ppm=10_000, duplicate_ppm=10_000, hold_ppm=10_000,
        )],
        family=6,
    )  # fmt: skip


def test_loss_on_every_leg_at_once(scenario, lab, request):
    run_impaired(
        scenario, Placement.SELF, request, "loss 1 % on every leg",
        lambda: [impair_leg(lab, Placement.SELF, leg, drop_ppm=10_000) for leg in LEGS],
    )  # fmt: skip


@intercepted
def test_the_channel_loses_1_percent(scenario, lab, request, placement):
    run_impaired(
        scenario, placement, request, f"loss 1 % on the channel ({placement.value})",
        lambda: impair_channel(lab, placement, drop_ppm=10_000),
    )  # fmt: skip


def _tcp_counter(lab, role, name):
    text = lab.run(role, ["cat", "/proc/net/netstat"]).stdout
    names, values = (line.split() for line in text.splitlines() if line.startswith("TcpExt:"))
    return int(values[names.index(name)])
