"""bpf(2) by ctypes: arguments the kernel takes, errors as it gives them."""

import errno
import os

import pytest

from pycopy.errors import HostUnfit
from pycopy.kernel import syscall


def test_possible_cpus_is_no_less_than_the_online_ones():
    assert syscall.possible_cpus() >= os.cpu_count()


@pytest.mark.parametrize(
    ("layout", "size"), [("_ELEM", 32), ("_TEST_RUN", 80), ("_INFO", 16), ("_QUERY", 64)]
)
def test_layouts_are_as_long_as_in_the_kernel_header(layout, size):
    assert getattr(syscall, layout).size == size


def test_a_failure_is_an_oserror_with_the_kernels_errno():
    read_end, write_end = os.pipe()
    try:
        for call in (syscall.map_info, lambda fd: syscall.map_lookup(fd, bytes(4), 8)):
            with pytest.raises(OSError, match=r".") as caught:
                call(read_end)
            assert caught.value.errno in (errno.EINVAL, errno.EPERM)
    finally:
        os.close(read_end)
        os.close(write_end)


def test_an_unknown_architecture_is_named(monkeypatch):
    monkeypatch.setattr(syscall.platform, "machine", lambda: "vax")
    with pytest.raises(HostUnfit, match="vax"):
        syscall.map_info(0)
