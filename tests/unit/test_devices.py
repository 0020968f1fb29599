"""The host's devices as the kernel tells them."""

import socket

import pytest

from pycopy.devices import find_devices
from pycopy.errors import HostUnfit, UsageError


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
