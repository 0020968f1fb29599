"""The services of -x: what tcpcopy's users write is understood, and nonsense is named."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pycopy.command import services, values
from pycopy.command.services import Service
from pycopy.errors import UsageError
from pycopy.wire.address import map_address

V4 = st.ip_addresses(v=4)
V6 = st.ip_addresses(v=6).filter(lambda address: address.ipv4_mapped is None)
PORTS = st.integers(1, 65535)


def mapped(text):
    return map_address(ipaddress.ip_address(text))


def no_names(host):
    raise AssertionError(f"{host} needs no resolving")


@given(st.one_of(*(st.tuples(st.none() | v, PORTS, v, PORTS) for v in (V4, V6))))
def test_service_round_trip(parts):
    online, online_port, target, target_port = parts
    service = Service(
        None if online is None else map_address(online),
        online_port,
        map_address(target),
        target_port,
    )
    assert services.parse_services(str(service), no_names) == [service]


def test_services_of_the_seeds():
    assert services.parse_services("80-61.135.233.160:8080") == [
        Service(None, 80, mapped("61.135.233.160"), 8080)
    ]
    assert services.parse_services("10.0.0.1:80-[::ffff:10.0.0.2]:8080,443-10.0.0.2:8443") == [
        Service(mapped("10.0.0.1"), 80, mapped("10.0.0.2"), 8080),
        Service(None, 443, mapped("10.0.0.2"), 8443),
    ]


def test_names_are_resolved_once():
    asked = []

    def resolver(host):
        asked.append(host)
        return ipaddress.ip_address("10.0.0.2")

    assert services.parse_services("80-test-host.example:81", resolver) == [
        Service(None, 80, mapped("10.0.0.2"), 81)
    ]
    assert values.parse_intercepts("a.example,b:9", 7, resolver) == [
        ("10.0.0.2", 7),
        ("10.0.0.2", 9),
    ]
    assert asked == ["test-host.example", "a.example", "b"]


def test_unresolvable_name():
    with pytest.raises(UsageError) as caught:
        services.parse_services("80-no-such-host.invalid:80")
    assert "cannot resolve 'no-such-host.invalid'" in caught.value.cause


@pytest.mark.parametrize(
    ("text", "bad", "form"),
    [
        # tcpcopy took this one for 0.0.0.0:192 without a word.
        ("10008-192.168.237.128", "'192.168.237.128' has no port", "192.168.237.128:10008"),
        ("80", "no '-'", "[srcIP:]srcPort-dstIP:dstPort"),
        ("80-8080", "'8080' has no address", "80-10.0.0.2:8080"),
        ("80-", "'' has no port", "80-10.0.0.2:80"),
        ("x-10.0.0.2:80", "the source 'x' has no port", "srcPort"),
        ("0-10.0.0.2:80", "the source port is '0'", "1 to 65535"),
        ("80-10.0.0.2:65536", "the target port is '65536'", "1 to 65535"),
        ("80-10.0.0.2:", "the target port is ''", "1 to 65535"),
        ("80-10.2:80", "'10.2', not an address", "10.0.0.2"),
        ("80-10.0.0.256:80", "'10.0.0.256', not an address", "10.0.0.2"),
        ("name:80-10.0.0.2:80", "the source is 'name'", "10.0.0.2"),
        ("10.0.0.1-10.0.0.2:80", "'10.0.0.1' has no port", "srcPort"),
        ("80-fd00::2:80", "'fd00::2:80' has too many colons", "[fd00::2]:80"),
        ("80-[fd00::2]", "'[fd00::2]' has no port", "80-[fd00::2]:80"),
        ("80-[fd00::2:80", "not [IPv6]:port", "[fd00::2]:80"),
        ("80-[fe80::1%eth0]:80", "with a zone", "global"),
        ("10.0.0.1:80-[fd00::2]:80", "IPv4 traffic cannot be copied to an IPv6", "one family"),
        ("80@00:11:22:33:44:55-10.0.0.2:80@66:77:88:99:aa:bb", "MAC addresses", "leave '@MAC'"),
        ("80-10.0.0.2:80,", "an entry is empty", "80-10.0.0.2:8080"),
        ("80-10.0.0.2:80,10.0.0.9:80-10.0.0.3:80", "takes the same traffic already", "second"),
    ],
)
def test_bad_services_say_what_is_bad_and_what_is_right(text, bad, form):
    with pytest.raises(UsageError) as caught:
        services.parse_services(text)
    assert bad in caught.value.cause
    assert form in caught.value.cure


def test_a_narrow_service_before_a_wide_one_is_fine():
    assert len(services.parse_services("10.0.0.9:80-10.0.0.3:80,80-10.0.0.2:80")) == 2


def ports(text, resolver=no_names):
    """(online, target) ports of services that have the rest in common."""
    found = services.parse_services(text, resolver)
    assert len({(service.online_addr, service.target_addr) for service in found}) == 1
    return [(service.online_port, service.target_port) for service in found]


@pytest.mark.parametrize(
    ("text", "first", "number", "step"),
    [
        ("8000-8999-10.0.0.2:8000", (8000, 8000), 1000, 1),
        ("10.0.0.1:8000-8999-10.0.0.2:18000", (8000, 18000), 1000, 1),
        ("[fd00::1]:8000-8999-[fd00::2]:8000", (8000, 8000), 1000, 1),
        ("8000-8999-10.0.0.2:18000-18999", (8000, 18000), 1000, 1),
        ("8000-8999-10.0.0.2:80-80", (8000, 80), 1000, 0),
        ("80-80-10.0.0.2:8080", (80, 8080), 1, 1),
        ("80-10.0.0.2:8080-8080", (80, 8080), 1, 1),
        ("1-65535-10.0.0.2:1", (1, 1), 65535, 1),
        ("65535-65535-10.0.0.2:65535", (65535, 65535), 1, 1),
    ],
)
def test_ranges(text, first, number, step):
    wanted = [(first[0] + index, first[1] + index * step) for index in range(number)]
    assert ports(text) == wanted


@pytest.mark.parametrize(
    ("text", "host", "number"),
    [
        ("80-my-host:8080", "my-host", 1),
        ("8000-8999-my-host:8080", "my-host", 1000),
        ("80-3com.example:80", "3com.example", 1),
        ("80-80-3-tier.example:80", "3-tier.example", 1),
        ("80-81-3-tier.example:80", "3-tier.example", 2),
        ("80-a-1-2.example:80", "a-1-2.example", 1),
    ],
)
def test_names_with_dashes_and_digits(text, host, number):
    asked = []

    def resolver(name):
        asked.append(name)
        return ipaddress.ip_address("10.0.0.2")

    assert len(ports(text, resolver)) == number
    assert asked == [host]


@pytest.mark.parametrize(
    ("text", "bad", "form"),
    [
        ("8999-8000-10.0.0.2:80", "range of ports 8999-8000 is empty", "write 8000-8999-..."),
        ("10.0.0.1:9-8-10.0.0.2:80", "range of ports 9-8 is empty", "write 10.0.0.1:8-9-..."),
        ("80-3-tier.example:80", "range of ports 80-3 is empty", "with '3-' write 80-80-..."),
        ("8000-8999-10.0.0.2:65000", "would be 65000-65999", "8000-8999-10.0.0.2:64536"),
        ("8000-8999-10.0.0.2:1-500", "1,000 online ports", "write 8000-8999-10.0.0.2:1 for"),
        ("80-10.0.0.2:80-90", "one online port, but target ports 80-90", "write 80-10.0.0.2:80,"),
        ("80-82-10.0.0.2:90-80", "3 online ports, but", "80-82-10.0.0.2:90-90 for one"),
        ("8000-65536-10.0.0.2:80", "last source port is '65536'", "1 to 65535"),
        ("0-80-10.0.0.2:80", "first source port is '0'", "1 to 65535"),
        ("80-82-10.0.0.2:80-65536", "last target port is '65536'", "1 to 65535"),
        ("80-82-10.0.0.2:80-", "target port is '80-'", "1 to 65535"),
        ("80-82-10.0.0.2", "'10.0.0.2' has no port", "write 80-82-10.0.0.2:80"),
        ("80-82-90-92", "'90-92' has no address", "write 80-82-10.0.0.2:90-92"),
        ("8000-8999", "'8999' has no address", "8000-8999-10.0.0.2:8000 for a range"),
        ("10.0.0.1:80-82-[fd00::2]:80", "IPv4 traffic", "one family"),
        ("81-10.0.0.2:1,80-90-10.0.0.2:80", "81-10.0.0.2:1 before it takes", "around port 81"),
        ("80-90-10.0.0.2:80,10.0.0.1:85-10.0.0.3:1", "85-10.0.0.2:85 before it", "second replay"),
    ],
)
def test_bad_ranges_say_what_is_bad_and_what_is_right(text, bad, form):
    with pytest.raises(UsageError) as caught:
        services.parse_services(text, no_names)
    assert bad in caught.value.cause
    assert form in caught.value.cure


def test_more_services_than_the_kernels_records_can_number():
    services.parse_services("1-40000-10.0.0.2:1,40001-65535-10.0.0.2:1", no_names)
    with pytest.raises(UsageError) as caught:
        services.parse_services("10.0.0.1:1-40000-10.0.0.2:1,10.0.0.3:1-25536-10.0.0.2:1", no_names)
    assert "65,536 services" in caught.value.cause
    assert "second replay" in caught.value.cure


def test_a_name_is_one_address_in_all_entries():
    asked = []

    def resolver(name):
        asked.append(name)
        return ipaddress.ip_address(f"10.0.0.{len(asked)}")

    text = ",".join(f"{port}-{'ab'[port % 2]}.example:80" for port in range(1000, 3000))
    targets = {service.target_addr for service in services.parse_services(text, resolver)}
    assert asked == ["a.example", "b.example"]
    assert len(targets) == 2


def test_a_name_read_as_a_target_is_no_source():
    with pytest.raises(UsageError, match="the source is 'local'"):
        services.parse_services(
            "80-local:80,local:81-10.0.0.2:80", lambda _: ipaddress.ip_address("10.0.0.2")
        )


def test_looking_for_rivals_does_not_compare_all_with_all(monkeypatch):
    """Each service is hashed, none is compared with the others."""
    compared = []

    class Counting(Service):
        __slots__ = ()

        def __eq__(self, other):
            compared.append(other)
            return super().__eq__(other)

        @property
        def online_port(self):
            compared.append(self)
            return Service.online_port.__get__(self)

        @online_port.setter
        def online_port(self, port):
            Service.online_port.__set__(self, port)

    monkeypatch.setattr(services, "Service", Counting)
    text = ",".join(f"{port}-10.0.0.2:80" for port in range(1000, 3000))
    assert len(services.parse_services(text, no_names)) == 2000
    assert len(compared) < 5 * 2000


def test_an_empty_entry_among_thousands_is_named_by_the_one_before_it():
    text = ",".join(f"{port}-10.0.0.2:80" for port in range(1000, 3000))
    with pytest.raises(UsageError) as caught:
        services.parse_services(f"{text},,5-10.0.0.2:80", no_names)
    assert caught.value.cause == "-x: an entry is empty, after '2999-10.0.0.2:80'"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("80-10.0.0.2:8080", "80-10.0.0.2:8080"),
        ("80-10.0.0.2:8080,81-10.0.0.2:8081", "80-10.0.0.2:8080, 81-10.0.0.2:8081"),
        ("8000-8999-10.0.0.2:8000", "8000-8999-10.0.0.2:8000"),
        ("[fd00::1]:8-10-[fd00::2]:80-80", "[fd00::1]:8-10-[fd00::2]:80-80"),
        ("7-10.0.0.3:7,8-10-10.0.0.2:8,11-13-10.0.0.2:11", "7-10.0.0.3:7, 8-13-10.0.0.2:8"),
        ("1-3-10.0.0.2:9-9,4-10.0.0.2:10", "1-3-10.0.0.2:9-9, 4-10.0.0.2:10"),
        ("1-10.0.0.2:1,3-10.0.0.2:3,5-10.0.0.2:5,7-10.0.0.2:7",
         "1-10.0.0.2:1, 3-10.0.0.2:3, 5-10.0.0.2:5, 7-10.0.0.2:7"),
        (",".join(f"{port}-10.0.0.2:{port}" for port in range(2, 8002, 2)),
         "2-10.0.0.2:2, 4-10.0.0.2:4, 6-10.0.0.2:6, and 3,997 more"),
        ("1-100-10.0.0.2:1,300-10.0.0.2:1,301-10.0.0.4:1,400-499-10.0.0.2:1,600-699-10.0.0.2:1",
         "1-100-10.0.0.2:1, 300-10.0.0.2:1, 301-10.0.0.4:1, and 200 more"),
    ],
)  # fmt: skip
def test_services_in_a_line_of_text(text, shown):
    assert services.describe(services.parse_services(text, no_names)) == shown


@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.integers(1, 4), st.sampled_from(["10.0.0.2", "10.0.0.3"])),
        min_size=1, max_size=4, unique_by=lambda each: each[0],
    )
)  # fmt: skip
def test_services_as_they_are_shown_mean_the_same(parts):
    text = ",".join(f"{online}-{host}:{target}" for online, target, host in parts)
    found = services.parse_services(text, no_names)
    assert services.parse_services(services.describe(found), no_names) == found


def test_targets_in_a_line_of_text():
    addr, other = mapped("10.0.0.2"), mapped("fd00::2")
    assert services.describe_endpoints([(addr, 81), (addr, 80), (addr, 80)]) == (
        "10.0.0.2:80, 10.0.0.2:81"
    )
    many = [(addr, port) for port in range(8999, 7999, -1)]
    assert services.describe_endpoints([(other, 9), *many]) == "10.0.0.2:8000-8999, [fd00::2]:9"
    assert services.describe_endpoints((addr, port) for port in range(2, 8002, 2)) == (
        "10.0.0.2:2, 10.0.0.2:4, 10.0.0.2:6, and 3,997 more"
    )


def test_ports_of_copies_are_none_that_is_copied():
    services.check_ports((20000, 29999), services.parse_services("80-10.0.0.2:80", no_names))
    for text, example in (
        ("25000-10.0.0.2:80", "--ports 25001-35000"),
        ("20000-29999-10.0.0.2:1", "--ports 30000-39999"),
        ("1-65535-10.0.0.2:1", "copy fewer ports"),
    ):
        with pytest.raises(UsageError) as caught:
            services.check_ports((20000, 29999), services.parse_services(text, no_names))
        assert "which is copied" in caught.value.cause
        assert example in caught.value.cure


def test_old_form():
    words = "1.2.3.13:1.2.3.14 12321 1.2.3.148 12322".split()
    assert services.parse_old_form(words) == [
        Service(mapped("1.2.3.13"), 12321, mapped("1.2.3.148"), 12322),
        Service(mapped("1.2.3.14"), 12321, mapped("1.2.3.148"), 12322),
    ]
    for locals_ in ("fd00::1", "[fd00::1]"):
        assert services.parse_old_form([locals_, "80", "fd00::2", "81"]) == [
            Service(mapped("fd00::1"), 80, mapped("fd00::2"), 81)
        ]
    assert [
        s.online_addr for s in services.parse_old_form(["[fd00::1]:[fd00::3]", "1", "fd00::2", "2"])
    ] == [
        mapped("fd00::1"),
        mapped("fd00::3"),
    ]
    for bad in (["1.2.3.4", "80", "1.2.3.5"], ["1.2.3.4:", "80", "1.2.3.5", "80"]):
        with pytest.raises(UsageError):
            services.parse_old_form(bad)


def test_client_pool_must_have_the_targets_family():
    found = services.parse_services("80-10.0.0.2:80,81-[fd00::2]:80")
    both = values.parse_networks("62.135.200.x,fd01::/64", "-c")
    services.check_client_pool(both, found)
    services.check_client_pool([], found)
    with pytest.raises(UsageError, match="no IPv6"):
        services.check_client_pool(both[:1], found)
