"""The guards: every refusal has its status, its reason, and what to type."""

import ipaddress

import pytest

from pycopy.command import guards, services
from pycopy.errors import HostUnfit, Refused, UsageError
from pycopy.host import privileges
from pycopy.wire.address import map_address

LOCAL = {map_address(ipaddress.ip_address(a)) for a in ("10.0.0.1", "fd00::1")}


def check(text, allow_public=False):
    guards.check_targets(services.parse_services(text), LOCAL, allow_public)


@pytest.mark.parametrize(
    "text",
    [
        "80-10.0.0.2:80",
        "80-[fd00::2]:80",
        "10.0.0.1:80-10.0.0.2:80,10.0.0.2:81-10.0.0.3:80",
        "80-192.168.1.1:80",
        "80-100.64.0.1:80",
    ],
)
def test_ordinary_targets_pass(text):
    check(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("80-10.0.0.1:8080", "this host itself"),
        ("80-[fd00::1]:8080", "this host itself"),
        ("80-127.0.0.1:8080", "this host itself"),
        ("80-127.9.9.9:8080", "this host itself"),
        ("80-[::1]:8080", "this host itself"),
        ("80-239.1.1.1:80", "one host"),
        ("80-255.255.255.255:80", "one host"),
        ("80-0.0.0.0:80", "one host"),
        ("80-[::]:80", "one host"),
        ("80-[ff02::1]:80", "one host"),
        ("10.0.0.2:80-10.0.0.2:80", "a loop"),
        ("10.0.0.2:80-10.0.0.3:80,10.0.0.3:80-10.0.0.2:81", "a loop"),
    ],
)
def test_refusals_that_cannot_be_overruled(text, reason):
    with pytest.raises(Refused) as caught:
        check(text, allow_public=True)
    assert reason in caught.value.cause
    assert caught.value.cure.startswith("cannot be overruled: ")
    assert len(caught.value.cause) < 100 and len(caught.value.cure) < 98


def test_an_address_that_is_not_this_hosts_is_worth_a_warning():
    (warning,) = guards.foreign_sources(
        services.parse_services("81-10.0.0.3:80,10.0.0.1:80-10.0.0.3:80,10.0.0.9:80-10.0.0.3:80"),
        LOCAL,
    )
    assert "no address 10.0.0.9" in warning
    assert len(warning) < 100


def test_one_warning_an_address_and_few_in_all():
    text = "10.0.0.8:8000-8999-10.0.0.3:80-80,10.0.0.9:80-10.0.0.3:80"
    first, second = guards.foreign_sources(services.parse_services(text), LOCAL)
    assert "10.0.0.8:8000-10.0.0.3:80 and 999 more: this host has no address 10.0.0.8" in first
    assert "no address 10.0.0.9" in second
    text = ",".join(f"10.1.{n >> 8}.{n & 255}:80-10.0.0.3:80" for n in range(4000))
    warnings = guards.foreign_sources(services.parse_services(text), LOCAL)
    assert len(warnings) < 10 and "3,992 more addresses" in warnings[-1]


def test_every_address_is_judged_once(monkeypatch):
    judged = []
    judge = guards.unmap_address
    monkeypatch.setattr(guards, "unmap_address", lambda addr: judged.append(addr) or judge(addr))
    check("1000-4999-10.0.0.2:1000,5000-10.0.0.3:1")
    assert len(judged) <= 2 * 2


def test_a_loop_inside_a_range():
    for text in ("10.0.0.2:80-89-10.0.0.3:80,90-10.0.0.2:85", "10.0.0.2:80-89-10.0.0.2:85"):
        with pytest.raises(Refused, match="a loop"):
            check(text)
    check("10.0.0.2:80-89-10.0.0.2:90")


@pytest.mark.parametrize("text", ["80-1.2.3.148:80", "80-[2001:4860:4860::8888]:80"])
def test_public_targets_need_a_flag(text):
    with pytest.raises(Refused) as caught:
        check(text)
    assert "--allow-public-target" in caught.value.cure
    check(text, allow_public=True)


def test_privileges():
    bits = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_PERFMON": 38, "CAP_BPF": 39}
    every = sum(1 << bit for bit in bits.values())
    needed = privileges.SENDING
    privileges.check_privileges(needed, every)
    # CAP_SYS_ADMIN stands in for CAP_BPF and CAP_PERFMON
    privileges.check_privileges(needed, 1 << 12 | 1 << 13 | 1 << 21)
    for name, bit in bits.items():
        with pytest.raises(HostUnfit) as caught:
            privileges.check_privileges(needed, every & ~(1 << bit))
        assert caught.value.cause.endswith(f": {name} missing")
        assert "sudo" in caught.value.cure
        assert "AmbientCapabilities" in caught.value.cure and name in caught.value.cure
    privileges.check_privileges(privileges.LOADING, every & ~(1 << bits["CAP_NET_RAW"]))


def test_interfaces():
    present = ["lo", "eth0"]
    guards.check_interfaces(["eth0"], present)
    guards.check_interfaces(["lo"])
    with pytest.raises(UsageError) as caught:
        guards.check_interfaces(["eht0"], present)
    assert "eht0" in caught.value.cause
    assert "did you mean eth0?" in caught.value.cure
