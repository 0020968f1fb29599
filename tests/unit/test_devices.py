"""The host's devices as the kernel tells them."""

import ipaddress
import socket

import pytest

from pycopy.errors import HostUnfit, UsageError
from pycopy.host.devices import find_devices, local_addresses
from pycopy.wire.address import unmap_address


def test_loopback_by_name_only():
    (device,) = find_devices(["lo"])
    assert device == ("lo", socket.if_nametoindex("lo"), 14)
    try:
        names = [device.name for device in find_devices([])]
    except HostUnfit as error:
        assert "-i" in error.cure
    else:
        assert names
        assert "lo" not in names


def test_a_device_that_is_not_there():
    with pytest.raises(UsageError, match="there is no network device nosuch0"):
        find_devices(["lo", "nosuch0"])


def test_local_addresses_are_those_that_can_be_bound():
    found = {unmap_address(address) for address in local_addresses()}
    assert ipaddress.ip_address("127.0.0.1") in found
    for address in found:
        if address.is_link_local:
            continue
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.bind((str(address), 0))
