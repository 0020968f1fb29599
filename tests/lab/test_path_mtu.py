"""A path to the target that takes less than its first hop: found out and followed."""

import ipaddress

import pytest

from pycopy.egress.egress import Egress
from pycopy.host.nexthop import NextHops
from pycopy.lab.copying import Placement
from pycopy.report.ledger import Ledger
from pycopy.session.addresses import KeptAddresses
from pycopy.session.fates import Count
from pycopy.session.rules import Rules
from pycopy.session.table import Table
from pycopy.wire.address import map_address
from pycopy.wire.segment import ACK, KEY, OPT_MSS, PSH, SYN, Segment

ROUTER, LINK, NARROW = "online2", "onward", 1300


@pytest.fixture
def narrow_path(lab):
    """``narrow_path(family)``: online to target by way of a router whose onward link is narrow.

    The way back is the direct one. The addresses of the target are not those of its end of
    that link, so the router is told who has them.
    """

    def build(family):
        target, router = lab.address("target", family), lab.address(ROUTER, family)
        far = lab.namespace("target")
        ip = ["ip", f"-{family}"]
        add = f"ip link add {LINK} mtu {NARROW} type veth peer name {LINK} mtu {NARROW} netns {far}"
        lab.run(ROUTER, add.split())
        for role in (ROUTER, "target"):
            lab.run(role, ["ip", "link", "set", LINK, "up"])
        mac = lab.run("target", ["cat", f"/sys/class/net/{LINK}/address"]).stdout.strip()
        neighbour = ["neigh", "replace", target, "lladdr", mac, "dev", LINK, "nud", "permanent"]
        lab.run(ROUTER, [*ip, *neighbour])
        lab.run(ROUTER, [*ip, "route", "replace", target, "dev", LINK])
        forwarding = "net.ipv4.ip_forward" if family == 4 else "net.ipv6.conf.all.forwarding"
        lab.run(ROUTER, ["sysctl", "-qw", f"{forwarding}=1"])
        lab.run("online", [*ip, "route", "replace", target, "via", router, "dev", "eth0"])
        undo.append(("online", [*ip, "route", "delete", target]))
        undo.append((ROUTER, ["sysctl", "-qw", f"{forwarding}=0"]))
        undo.append((ROUTER, ["ip", "link", "delete", LINK]))

    undo = []
    yield build
    for role, command in undo:
        lab.run(role, command)


def upload(run):
    run.load(23, 7, concurrency=3, answers=(1, 10_007), uploads=(1, 1240, 1448, 10_007, 300_007))
    return run.finish()


@pytest.mark.parametrize("family", (4, 6))
def test_a_narrow_link_behind_the_first_hop(scenario, narrow_path, family):
    narrow_path(family)
    run = scenario(Placement.SELF, family, servers=((80, "http"),)).start()
    ledger = upload(run).replays[0]["ledger"]
    # Each connection learns it, and sends again at once what was lost.
    assert ledger["sending"]["path_mtu"] == 7
    assert ledger["kernel_intercept"]["too_big"] >= 7
    assert ledger["sending"]["timeouts"] < 7


def test_a_router_whose_way_to_the_clients_is_the_assistant(lab, scenario, narrow_path):
    narrow_path(4)
    clients = lab.prefix("client", 4)
    lab.run(ROUTER, ["ip", "route", "replace", clients, "via", lab.address("assistant", 4)])
    try:
        run = scenario(Placement.ASSISTANT, 4, servers=((80, "http"),)).start()
        outcome = upload(run)
    finally:
        lab.run(ROUTER, ["ip", "route", "replace", clients, "dev", "eth0", "scope", "link"])
    assert outcome.replays[0]["ledger"]["sending"]["path_mtu"] == 7
    assert outcome.intercepts[0]["ledger"]["kernel"]["too_big"] >= 7


def test_a_device_that_was_narrowed_a_moment_ago(lab):
    """Before its event is read: the socket says EMSGSIZE, and the segment is cut smaller."""
    client, online, target = (
        map_address(ipaddress.ip_address(lab.address(role, 4)))
        for role in ("client", "online", "target")
    )
    key = KEY.pack(client, online, 40001, 80)
    ledger, now_ns = Ledger(), 0
    with lab.inside("online"):
        hops = NextHops()
        hops.resolve(target)
        hops.wait_usable(5)
        egress = Egress(hops, ledger, 0)
        services = [(target, 8080)]
        table = Table(Rules(), ledger, KeptAddresses(), services, egress.path_mss, now_ns)
        seen = Segment(0, 1, SYN, OPT_MSS, *[0] * 9, 1460, 4, 0, key, bytes(32))
        table.on_client(seen, b"", now_ns)
        session = table.outbox[0].session
        table.on_target(
            seen._replace(key=session.target_key, tcp_flags=SYN | ACK, ack=1, wnd=65535), now_ns
        )
        seen = seen._replace(seq=1, ack=1, tcp_flags=PSH | ACK, mss=0, options=0)
        table.on_client(seen._replace(seg_len=1400, payload_bytes=1400), bytes(1400), now_ns)
        lab.run("online", ["ip", "link", "set", "eth0", "mtu", str(NARROW)])
        try:
            egress.flush(table.outbox)
        finally:
            lab.run("online", ["ip", "link", "set", "eth0", "mtu", "1500"])
            egress.close()
            hops.close()
    assert ledger.send_errors == {"EMSGSIZE": 1}
    assert session.target.mss == NARROW - 40
    assert (ledger.counts[Count.PATH_MTU], ledger.counts[Count.SENT_PAYLOAD]) == (1, 1)
