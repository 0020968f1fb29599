"""The parsers of single values: what tcpcopy's users write is understood, nonsense is named."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pycopy.command import services, values
from pycopy.command.values import endpoint
from pycopy.errors import UsageError
from pycopy.wire.address import map_address, unmap_address

ADDRESSES = st.ip_addresses().filter(
    # ::ffff:a.b.c.d is the same address as a.b.c.d here.
    lambda address: address.version == 4 or address.ipv4_mapped is None
)
PORTS = st.integers(1, 65535)


def no_names(host):
    raise AssertionError(f"{host} needs no resolving")


@given(ADDRESSES)
def test_address_round_trip(address):
    packed = map_address(address)
    assert len(packed) == 16
    assert unmap_address(packed) == address


@given(st.lists(st.tuples(ADDRESSES, PORTS), min_size=1, unique=True))
def test_intercepts_round_trip(intercepts):
    text = ",".join(endpoint(map_address(address), port) for address, port in intercepts)
    wanted = [(str(address), port) for address, port in intercepts]
    assert values.parse_intercepts(text, resolver=no_names) == wanted


@given(st.ip_addresses(v=4), st.integers(0, 32))
def test_networks_round_trip(address, bits):
    network = ipaddress.ip_network((address, bits), strict=False)
    assert values.parse_networks(str(network), "-c") == [network]


@given(st.text(max_size=40))
def test_no_text_escapes_as_anything_but_a_usage_error(text):
    def unresolvable(host):
        raise UsageError("cannot resolve", "")

    for parse in (
        lambda: services.parse_services(text, unresolvable),
        lambda: values.parse_intercepts(text, resolver=unresolvable),
        lambda: values.parse_networks(text, "-c"),
        lambda: services.parse_old_form(text.split() or [""], unresolvable),
        lambda: values.parse_interfaces(text, "-i"),
        lambda: values.parse_ports(text, "--ports"),
        lambda: values.parse_bytes(text, "--ring"),
        lambda: values.parse_int(text, "-m", 1, 9, "it"),
        lambda: values.parse_interval(text, "--interval"),
    ):
        try:
            parse()
        except UsageError as error:
            assert error.cause


def test_intercept_forms():
    assert values.parse_intercepts("10.0.0.3,fd00::3,[fd00::4],[fd00::5]:7") == [
        ("10.0.0.3", 36524),
        ("fd00::3", 36524),
        ("fd00::4", 36524),
        ("fd00::5", 7),
    ]
    for bad in ("10.0.0.3:", "36524", "10.0.0.3,10.0.0.3", ""):
        with pytest.raises(UsageError):
            values.parse_intercepts(bad)


def test_client_ranges():
    assert values.parse_networks("62.135.200.x,10.0.0.1, fd00::/64,10.1.0.0/16", "-c") == [
        ipaddress.ip_network("62.135.200.0/24"),
        ipaddress.ip_network("10.0.0.1/32"),
        ipaddress.ip_network("fd00::/64"),
        ipaddress.ip_network("10.1.0.0/16"),
    ]
    with pytest.raises(UsageError) as caught:
        values.parse_networks("10.0.0.5/24", "-c")
    assert "10.0.0.0/24" in caught.value.cure
    for bad in ("62.135.x.x", "62.135.200.*", "x", "1.2.3.x/24", "fd00::x", "1.2.3", "host"):
        with pytest.raises(UsageError) as caught:
            values.parse_networks(bad, "-c")
        assert bad in caught.value.cause


def test_small_parsers():
    assert values.parse_interfaces("eth0,eth1,eth0", "-i") == ["eth0", "eth1"]
    assert values.parse_interfaces("any", "-i") == []
    assert values.parse_ports("20000-29999", "--ports") == (20000, 29999)
    assert values.parse_bytes("16M", "--ring") == 16 << 20
    assert values.parse_bytes("65537", "--ring") == 128 << 10
    assert values.parse_bytes("512KiB", "--ring") == 512 << 10
    assert values.parse_interval("0.5", "--interval") == 0.5
    for parse, bad in (
        (values.parse_interfaces, "a/b"),
        (values.parse_interfaces, "sixteen-letters-x"),
        (values.parse_ports, "29999-20000"),
        (values.parse_ports, "1"),
        (values.parse_interval, "nan"),
        (values.parse_interval, "0"),
        (values.parse_bytes, "1K"),
        (values.parse_bytes, "2G"),
        (values.parse_percent, "0"),
        (values.parse_percent, "10%%"),
        (values.whole(1, 9, "it"), "10"),
        (values.one_of("tc", "xdp"), "TC"),
        (values.some_of("4", "6"), "4,"),
    ):
        with pytest.raises(UsageError) as caught:
            parse(bad, "--option")
        assert caught.value.cause.startswith("--option")


@pytest.mark.parametrize("text", ["64K", "512K", "1M", "64M", "128M", "1G"])
def test_sizes_are_shown_as_they_are_typed(text):
    assert values.size_text(values.parse_bytes(text, "--ring")) == text


@pytest.mark.parametrize("text", ["10.0.0.2", "fd00::2", "[fd00::2]"])
def test_bind(text):
    assert values.parse_bind(text, "-b") == text.strip("[]")


@pytest.mark.parametrize(
    ("text", "cause", "cure"),
    [
        ("10.0.0.2:40000", "followed by a port", "write -b 10.0.0.2 -p 40000"),
        ("[fd00::2]:40000", "followed by a port", "write -b fd00::2 -p 40000"),
        ("40000", "not one address", "write -b 10.0.0.2"),
        ("10.0.0.2,10.0.0.3", "not one address", "write -b 10.0.0.2"),
        ("eth0", "not an address", "write 10.0.0.2"),
        ("", "not one address", "write -b 10.0.0.2"),
    ],
)
def test_bind_errors_name_b(text, cause, cure):
    with pytest.raises(UsageError) as caught:
        values.parse_bind(text, "-b")
    assert caught.value.cause.startswith(f"-b {text}: ")
    assert cause in caught.value.cause
    assert cure in caught.value.cure
