"""The lab's arithmetic: content, plans of connections, comparison of what servers served."""

import subprocess
import sys

import pytest

from pycopy.lab import demo
from pycopy.lab.content import MAX_CONTENT_BYTES, content, http_request, line_request
from pycopy.lab.copying import Outcome
from pycopy.lab.plan import make_plans
from pycopy.lab.servers import Served
from pycopy.lab.topology import CLIENT_ADDRESSES, ROLES, Lab


def test_content_is_a_prefix_of_longer_content():
    long = content(1_000_003)
    for size_bytes in (0, 1, 65_520, 65_521, 65_522, 999_983):
        assert content(size_bytes) == long[:size_bytes]


def test_content_is_bounded():
    with pytest.raises(ValueError):
        content(MAX_CONTENT_BYTES + 1)


def test_requests_carry_their_id_and_body():
    assert http_request("r7", 5).startswith(b"GET /b/5?id=r7 HTTP/1.1\r\n")
    posted = http_request("r8", 5, 3, close=True)
    assert b"\r\nContent-Length: 3\r\n" in posted
    assert b"\r\nConnection: close\r\n" in posted
    assert posted.endswith(b"\r\n\r\n" + content(3))
    assert line_request("r7", 5) == b"GET 5 r7\r\n"
    assert line_request("r8", 5, 3) == b"PUT 3 r8\r\n" + content(3)


@pytest.mark.parametrize(
    ("requests", "connections", "short"),
    [(10_007, 1_009, 0), (10_007, 1_009, 331), (1_009, 1_009, 1_009), (23, 7, 6), (1, 1, 0)],
)
@pytest.mark.parametrize("rate", [0.0, 1000.0])
def test_plans_hold_every_request_once(requests, connections, short, rate):
    plans = make_plans(requests, connections, short, 32, "mix", rate)
    assert len(plans) == connections
    assert sorted(n for plan in plans for n in plan.requests) == list(range(requests))
    assert sum(len(plan.requests) == 1 for plan in plans) >= short
    for plan in plans:
        assert plan.requests == sorted(plan.requests)
        assert plan.dues == [n / rate if rate else 0.0 for n in plan.requests]


def test_plans_of_the_demonstration():
    sizes = [len(plan.requests) for plan in make_plans(10_007, 1_009, 0, 32, "mix", 0)]
    assert (sizes.count(10), sizes.count(9)) == (926, 83)


def test_plans_open_in_order_at_a_constant_rate():
    firsts = [plan.dues[0] for plan in make_plans(1_009, 101, 31, 8, "mix", 500)]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize(("requests", "connections", "short"), [(5, 6, 0), (5, 4, 5), (5, 4, 4)])
def test_impossible_plans_are_refused(requests, connections, short):
    with pytest.raises(ValueError):
        make_plans(requests, connections, short, 1, "mix", 0)


def test_served_names_what_is_lost_and_what_was_never_asked():
    online, target = Served(), Served()
    online.requests.update(["a", "b", "b", "c"])
    target.requests.update(["a", "b", "x"])
    assert dict(online.lost(target)) == {"b": 1, "c": 1}
    assert dict(online.surplus(target)) == {"x": 1}
    assert Served.sum([online, target]).count == 7
    assert online.matching("b").count == 2


def test_addresses_of_a_role_lie_in_its_own_prefix():
    import ipaddress

    lab = Lab("pycopy-unit")
    for family in (4, 6):
        networks = [ipaddress.ip_network(lab.prefix(role, family)) for role in ROLES]
        for role, network in zip(ROLES, networks, strict=True):
            for address in lab.addresses(role, family):
                inside = [ipaddress.ip_address(address) in one for one in networks]
                assert inside.count(True) == 1 and ipaddress.ip_address(address) in network
    assert len(set(lab.addresses("client", 4))) == CLIENT_ADDRESSES


def test_an_outcome_balances_only_if_every_program_says_so():
    assert not Outcome().balanced
    assert Outcome([{"balanced": True}], [{"balanced": True}]).balanced
    assert not Outcome([{"balanced": True}], [{"balanced": False}]).balanced
    assert not Outcome([{"balanced": True}], [{}]).balanced


def test_a_row_is_good_only_with_everything_at_the_target():
    row = demo.Row("self", 4, 7, 7, kernel_percent=99.96, balanced=True, seconds=1.0)
    assert row.good
    assert row.cells() == ("self", "IPv4", "7", "7", "0", "100.0 %", "yes", "1.0")
    for spoilt in (
        {"lost": 1}, {"surplus": 1}, {"balanced": False}, {"problem": "no ready line"},
        {"online": 0, "target": 0},
    ):  # fmt: skip
        row = {"online": 7, "target": 7, "balanced": True, **spoilt}
        assert not demo.Row("self", 4, **row).good, spoilt


def test_importing_the_lab_imports_nothing_heavy():
    code = (
        "import sys, pycopy.lab, pycopy.lab.topology, pycopy.lab.load, pycopy.lab.demo;"
        "sys.exit(any(m in sys.modules for m in ('bcc', 'pyroute2', 'rich', 'scapy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=20).returncode == 0
