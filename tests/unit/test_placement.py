"""Target or assistant, judged by the filter and by what listens here."""

import ipaddress
import socket

import pytest

from pycopy.channel import Placement
from pycopy.errors import UsageError
from pycopy.interception import placement
from pycopy.interception.placement import choose, listeners
from pycopy.wire.address import map_address


def at(address, port):
    return map_address(ipaddress.ip_address(address)), port


ANY = bytes(16)
OWN = [at(address, 0)[0] for address in ("10.0.0.2", "fd00::2", "127.0.0.1", "::1")]


@pytest.mark.parametrize(
    ("expression", "listening", "placement"),
    [
        ("tcp and src port 8080", [(ANY, 8080)], Placement.TARGET),
        ("tcp and src port 8080", [at("10.0.0.2", 8080)], Placement.TARGET),
        ("tcp and src port 8080", [at("fd00::2", 8080)], Placement.TARGET),
        ("tcp and src port 8080", [(ANY, 80), (ANY, 22)], Placement.ASSISTANT),
        ("tcp and src port 8080", [], Placement.ASSISTANT),
        # Nobody can be answered from there.
        ("tcp and src port 8080", [at("127.0.0.1", 8080)], Placement.ASSISTANT),
        # The same port listens here too, but it is another host's answers that are wanted.
        ("tcp and src host 10.0.0.9 and src port 8080", [(ANY, 8080)], Placement.ASSISTANT),
        ("tcp and src host 10.0.0.2 and src port 8080", [(ANY, 8080)], Placement.TARGET),
        ("src port 8080 and dst net 62.135.200.0/24", [(ANY, 8080)], Placement.TARGET),
        ("src port 8080 and dst net 62.135", [(ANY, 8080)], Placement.TARGET),
        ("ip6 and src port 8080 and dst host fd00::9", [(ANY, 8080)], Placement.TARGET),
        ("tcp and dst port 8080", [(ANY, 8080)], Placement.ASSISTANT),
        ("tcp[tcpflags] & tcp-syn != 0 and src portrange 8000-9000", [(ANY, 8080)],
         Placement.TARGET),
        ("udp and src port 8080", [(ANY, 8080)], Placement.ASSISTANT),
    ],
)  # fmt: skip
def test_auto(expression, listening, placement):
    found, why = choose("auto", expression, listening, OWN)
    assert found is placement
    other = "assistant" if placement is Placement.TARGET else "target"
    assert f"--at {other} overrules" in why


def test_the_reason_names_the_service():
    _, why = choose("auto", "src port 8080", [(ANY, 22), at("fd00::2", 8080)], OWN)
    assert "answers of port 8080" in why


@pytest.mark.parametrize("wanted", ["target", "assistant"])
def test_overruled(wanted):
    found, why = choose(wanted, "src port 8080", [(ANY, 8080)], OWN)
    assert found is Placement[wanted.upper()]
    assert why == f"--at {wanted}"


def test_a_wrong_expression_is_the_users():
    with pytest.raises(UsageError, match="src prot 80"):
        choose("auto", "src prot 80", [(ANY, 80)], OWN)


def test_thousands_of_sockets_do_not_take_for_ever():
    many = [(ANY, port) for port in range(1, 30000)]
    assert choose("auto", "udp", many, OWN)[0] is Placement.ASSISTANT


@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_real_listeners_are_seen(family, address):
    with socket.create_server((address, 0), family=family) as sock:
        port = sock.getsockname()[1]
        assert at(address, port) in listeners()
    assert at(address, port) not in listeners()


@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")]
)
def test_listening_everywhere_is_all_zero(family, address):
    with socket.create_server((address, 0), family=family) as sock:
        assert (ANY, sock.getsockname()[1]) in listeners()


def test_a_kernel_that_cannot_be_asked_has_a_table(monkeypatch):
    def refuse(*_args):
        raise FileNotFoundError("no inet_diag")

    with (
        socket.create_server(("127.0.0.1", 0)),
        socket.create_server(("::", 0), family=socket.AF_INET6),
    ):
        asked = listeners()
        monkeypatch.setattr(placement.netlink, "request", refuse)
        assert listeners() == asked and len(asked) >= 2
