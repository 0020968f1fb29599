"""What the sender does without a privilege or a network; the rest is tests/lab."""

import errno
import os
import socket
import types

import pytest

from pycopy.egress.sender import Sender
from pycopy.errors import HostUnfit

NOBODY = 65534
NO_SUCH_INTERFACE = types.SimpleNamespace(ifindex=0x7FFFFFF0)


def test_an_interface_that_is_not_there_is_counted_not_raised():
    sender = Sender()
    codes = {
        sender.send(NO_SUCH_INTERFACE, bytes(64)),
        sender.send(NO_SUCH_INTERFACE, bytes(64), b"x"),
    }
    assert codes <= {errno.ENXIO, errno.ENODEV} and len(codes) == 1
    assert sender.errors == {codes.pop(): 2}
    sender.open(NO_SUCH_INTERFACE)
    assert sum(sender.errors.values()) == 3
    sender.close()


def test_without_the_privilege_the_first_socket_says_so():
    loopback = types.SimpleNamespace(ifindex=socket.if_nametoindex("lo"))

    def attempt():
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        for call in (Sender().send, Sender().open):
            with pytest.raises(HostUnfit, match="not allowed") as refused:
                call(loopback, *([bytes(64)] if call.__name__ == "send" else []))
            assert "CAP_NET_RAW" in refused.value.cure

    child = os.fork()
    if child == 0:
        try:
            attempt()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
