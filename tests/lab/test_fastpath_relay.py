"""The fast path where responses come from another host: from kernel to kernel, as datagrams.

What is held to is what everywhere else is: every request arrives, every ledger balances,
no response strays; and that healthy sessions do not reach user space.
"""

import ipaddress
import socket

import pytest

from pycopy.kernel import abi
from pycopy.lab.copying import Placement, Program
from pycopy.lab.topology import DEVICE
from pycopy.wire.segment import SEGMENT_BYTES
from tests.lab.dial import Client
from tests.lab.impair import (
    CHANNEL_PORT,
    PER_MILLION,
    impair_datagrams,
    impair_leg,
)
from tests.lab.runs import run_impaired, settle
from tests.lab.traffic import port_used_again

placements = pytest.mark.parametrize(
    "placement", [Placement.TARGET, Placement.ASSISTANT], ids=lambda one: one.value
)
families = pytest.mark.parametrize("family", [4, 6])

ON = "fast path on: "
OFF = "fast path off: "


def share(outcome, replay=0):
    """Percent of segments and responses that never came to user space."""
    return outcome.replays[replay]["ledger"]["fastpath"]["kernel_percent"]


def relayed(outcome):
    return outcome.intercepts[0]["ledger"]["kernel"]["relayed"]


def said(run, replay=0):
    return run.copying.replays[replay].messages


@families
@placements
def test_keep_alive_stays_in_the_kernel(scenario, placement, family):
    run = scenario(placement, family).start()
    assert ON in said(run)
    # Not faster than a busy machine copies: what a session holds at a time is limited.
    run.load(5_003, 101, rate=2_000)
    outcome = run.finish()
    assert share(outcome) >= 99.0, outcome
    taken_in = outcome.replays[0]["ledger"]["kernel_intercept"]
    assert relayed(outcome) > 5_003
    assert relayed(outcome) == taken_in["matched"] == taken_in["kept"] + taken_in["captured"]


@families
@placements
def test_short_connections_stay_in_the_kernel(scenario, placement, family):
    run = scenario(placement, family).start()
    run.load(1_009, 1_009, short=1_008, rate=700)
    outcome = run.finish()
    assert share(outcome) >= 95.0, outcome


@placements
def test_clients_of_a_pool(scenario, placement, lab):
    """The kernel chooses the addresses that user space would have chosen."""
    pool = "62.135.200.x,62.135.202.0/31"
    network = "62.135.200.0/22"
    run = scenario(placement, 4, pool=pool, pool_network=network)
    if placement is Placement.TARGET:  # a response must find a next hop before the hook
        lab.route_through_assistant(network)
    try:
        run.start()
        run.load(1_009, 211, short=101, rate=1_000)
        outcome = run.finish()
    finally:
        if placement is Placement.TARGET:
            lab.route_through_assistant(network, on=False)
    assert share(outcome) >= 95.0, outcome


@placements
def test_a_client_port_used_again_at_once(scenario, lab, placement):
    """What lingers of the connection before gives way, in the kernel."""
    run = scenario(placement, 4, servers=((80, "http"),)).start()
    port, times = 0, 23
    for number in range(times):
        each = Client(lab, 4, 80, source_port=port)
        port = each.port
        each.ask(f"first{number}", 1009)
        each.ask(f"second{number}", 1009, close=True)
        each.read_end()
        each.close()
        # The copy is over as well, and lingers.
        assert run.eventually(lambda ended=number + 1: run.copied().connections.total() == ended)
    # Servers in TIME_WAIT may answer a SYN for the old connection: reset, and again.
    outcome = run.finish(resets=True)
    sessions = outcome.replays[0]["ledger"]["sessions"]
    assert sessions["ended_closed"] == times, sessions
    assert share(outcome) >= 50.0, outcome


@placements
def test_a_client_port_used_again_without_a_pause(scenario, lab, placement):
    """The next connection is there before its predecessor's copy is over."""
    run = scenario(placement, 4, servers=((80, "http"),)).start()
    port_used_again(lab, reset=False)
    settle(run, 53)
    run.finish(settle=False, resets=True)


@pytest.fixture
def no_offloads(lab):
    lab.set_offloads(False)
    yield
    lab.set_offloads(True)


@placements
def test_loss_of_responses(scenario, lab, request, placement, no_offloads):
    run_impaired(
        scenario, placement, request, f"loss 1 % before the relay ({placement.value})",
        lambda: [impair_leg(lab, placement, "target to intercept", drop_ppm=10_000)],
    )  # fmt: skip


@families
@placements
def test_loss_of_datagrams(scenario, lab, request, placement, family, no_offloads):
    done = run_impaired(
        scenario, placement, request, f"loss 1 % of datagrams ({placement.value}, IPv{family})",
        lambda: [impair_datagrams(lab, drop_ppm=10_000)], family=family,
    )  # fmt: skip
    assert done["matched"] > 1_000 and done["dropped"]


@placements
def test_duplicate_and_reordered_datagrams(scenario, lab, request, placement, no_offloads):
    done = run_impaired(
        scenario, placement, request, f"datagrams twice and late ({placement.value})",
        lambda: [impair_datagrams(lab, duplicate_ppm=10_000, hold_ppm=50_000)],
    )  # fmt: skip
    assert done["duplicated"] and done["held"]


@families
@placements
def test_a_firewall_from_the_start(scenario, lab, placement, family):
    with impair_datagrams(lab, drop_ppm=PER_MILLION):
        run = scenario(placement, family).start()
        assert run.eventually(lambda: OFF in said(run), 3)
        assert f"on UDP port {CHANNEL_PORT} (a firewall?)" in said(run)
        run.load(1_009, 101, short=31)
        run.settle()
        run.copying.stop()
    run.without_fastpath = True
    outcome = run.finish(settle=False)
    assert relayed(outcome) == 0
    assert outcome.replays[0]["ledger"]["kernel_intercept"]["matched"] == 0
    assert ON not in said(run)


@placements
def test_a_firewall_that_comes_and_goes(scenario, lab, placement):
    run = scenario(placement, 4, servers=((80, "http"),)).start()
    load = run.load(2_003, 23, wait=False, rate=200, id="on")
    assert run.eventually(lambda: run.copied_count() > 101)
    with impair_datagrams(lab, drop_ppm=PER_MILLION):
        assert run.eventually(lambda: OFF in said(run), 6), said(run)
        run.checked(run.load(503, 53, wait=False, short=31, id="off"), 503)
        settle(run, patience_s=13)
    assert run.eventually(lambda: said(run).count(ON) == 2, 3), said(run)
    run.checked(load, 2_003)
    run.load(503, 53, short=31, id="again")
    outcome = run.finish()
    assert 5 < share(outcome) < 100


@families
def test_a_wrong_cookie_is_nobody(scenario, lab, family):
    """It passes to the stack, where the port is ours and nobody reads it."""
    run = scenario(Placement.TARGET, family).start()
    segment = bytes(SEGMENT_BYTES)
    with lab.inside("target"):
        sock = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, socket.SOCK_DGRAM)
    with sock:
        # The intercept's own address and port, as a host on the path could forge them.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((lab.address("target", family), CHANNEL_PORT + 1))
        where = lab.address("online", family), CHANNEL_PORT
        for cookie in (0, 1 << 63):
            sock.sendto(abi.DATAGRAM_HEAD.pack(cookie, 0, abi.PROBE, 0) + segment, where)
    forged = 11
    _forge(lab, family, forged)
    run.load(503, 53)
    outcome = run.finish()
    taken_in = outcome.replays[0]["ledger"]["kernel_intercept"]
    assert taken_in["passed"] == forged
    assert share(outcome) >= 95.0


def _forge(lab, family, count):
    """Send datagrams with the intercept's address and port but without its cookie."""
    from scapy.layers.inet import IP, UDP
    from scapy.layers.inet6 import IPv6
    from scapy.layers.l2 import Ether

    mac = lab.run("online", ["cat", f"/sys/class/net/{DEVICE}/address"]).stdout.strip()
    network = IPv6 if family == 6 else IP
    payload = abi.DATAGRAM_HEAD.pack(7, 0, abi.RELAYED_SEGMENT, 0) + bytes(SEGMENT_BYTES)
    where = network(src=lab.address("target", family), dst=lab.address("online", family))
    ports = UDP(sport=CHANNEL_PORT, dport=CHANNEL_PORT)
    with lab.inside("client"):
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with raw:
        raw.bind((DEVICE, 0))
        for number in range(count):
            cut = payload[: number * 13] if number else payload
            raw.send(bytes(Ether(dst=mac) / where / ports / cut))


@placements
def test_two_replays_that_keep_addresses(scenario, placement):
    """Whose a response is only claims tell then: all go over the channel, until one leaves."""
    run = scenario(placement, 4, online=("online", "online2")).start()
    over = "sends responses over the channel only"
    assert run.eventually(lambda: over in said(run, 0) and over in said(run, 1))
    assert "several replays keep clients' addresses" in run.copying.intercepts[0].messages
    run.load(503, 53, short=31, id="first")
    run.load(503, 53, short=31, role="online2", id="second")
    run.settle()
    run.copying.replays[0].stop()
    assert run.eventually(lambda: ON in said(run, 1).partition(over)[2])
    run.load(1_009, 101, role="online2", id="alone")
    outcome = run.finish()
    assert share(outcome, 0) < 5.0
    assert share(outcome, 1) > 40.0


def test_a_replay_with_a_range_beside_one_without(scenario, lab):
    """Each has a relay of its own."""
    pool = ipaddress.ip_network("62.135.204.0/24")
    lab.route_through_assistant(str(pool))
    try:
        run = scenario(Placement.TARGET, 4, online=("online", "online2"))
        run.copying.replays[1] = Program(
            lab, "online2", [*run.copying.replays[0].arguments, "-c", str(pool)]
        )
        run.start()
        assert ON in said(run, 0) and ON in said(run, 1)
        run.load(1_009, 53, id="first")
        run.load(1_009, 53, role="online2", id="second")
        outcome = run.finish()
    finally:
        lab.route_through_assistant(str(pool), on=False)
    assert share(outcome, 0) >= 95.0 and share(outcome, 1) >= 95.0, outcome


@placements
def test_an_intercept_that_is_killed_and_started_again(scenario, lab, placement):
    """Nothing is sent meanwhile; after it everything goes on, in the kernel again."""
    run = scenario(placement, 4, servers=((80, "http"),)).start()
    run.load(503, 53, id="before")
    run.settle()
    killed = run.copying.intercepts[0]
    killed.kill()
    assert run.eventually(lambda: OFF in said(run))
    again = Program(lab, killed.role, killed.arguments)
    run.copying.intercepts[0] = again
    again.start()
    assert run.eventually(lambda: said(run).count(ON) == 2, 8), said(run)
    run.load(2_003, 101, id="after")
    outcome = run.finish()
    assert share(outcome) >= 90.0, outcome


def test_xdp_at_the_assistant(scenario):
    """By choice, and without relays."""
    run = scenario(Placement.ASSISTANT, 4, intercept_arguments=("--hook", "xdp")).start()
    assert "native xdp link" in run.copying.intercepts[0].messages
    assert "sends responses over the channel only" in said(run)
    run.load(503, 53, short=31)
    assert relayed(run.finish()) == 0


@placements
def test_without(scenario, placement):
    run = scenario(placement, 4, replay_arguments=("--no-fastpath",)).start()
    run.load(503, 53, short=31)
    outcome = run.finish()
    assert relayed(outcome) == 0
    assert outcome.replays[0]["ledger"]["fastpath"] == {"state": "off: --no-fastpath"}
    assert OFF not in said(run) and ON not in said(run)
