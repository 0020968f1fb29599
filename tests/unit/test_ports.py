"""Ports of the zero-route mode: outside the ephemeral range, and none that is in use."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pycopy.errors import PycopyError, UsageError
from pycopy.host import ports

ROOT = Path(ports.__file__).parents[2]


def test_default_range_is_beside_the_ephemeral_one():
    low, high = ports.choose_range(None)
    ephemeral_low, ephemeral_high = ports.ephemeral_range()
    assert high < ephemeral_low or low > ephemeral_high
    assert ports.LOWEST <= low < high <= ports.HIGHEST


def test_a_range_inside_the_ephemeral_one_is_refused_with_both_named():
    low, high = ports.ephemeral_range()
    with pytest.raises(UsageError, match=f"{low}-{high}"):
        ports.choose_range((low + 1, low + 10))


def test_a_range_of_the_users_own_is_taken_as_given(monkeypatch):
    monkeypatch.setattr(ports, "ephemeral_range", lambda: (32768, 60999))
    assert ports.choose_range((20000, 20010)) == (20000, 20010)


@pytest.mark.parametrize(
    ("ephemeral", "expected"),
    [((32768, 60999), (10000, 32767)), ((10000, 30000), (30001, 65535))],
)
def test_the_wider_side_is_taken(monkeypatch, ephemeral, expected):
    monkeypatch.setattr(ports, "ephemeral_range", lambda: ephemeral)
    assert ports.choose_range(None) == expected


def test_no_room_beside_the_ephemeral_range_is_an_error(monkeypatch):
    monkeypatch.setattr(ports, "ephemeral_range", lambda: (1024, 65535))
    with pytest.raises(PycopyError, match="leave no room"):
        ports.choose_range(None)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_port_that_a_socket_uses_is_left_out(family):
    with socket.socket(family) as used:
        used.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        assert port in ports.ports_in_use()
        assert ports.choose_ports((port - 1, port + 1)).count(port) == 0


def test_a_port_that_is_copied_is_left_out():
    chosen = ports.choose_ports((20_000, 20_099))
    assert ports.choose_ports((20_000, 20_099), chosen[:-1]) == chosen[-1:]
    with pytest.raises(PycopyError, match="or copied"):
        ports.choose_ports((20_000, 20_099), range(10_000, 30_000))


def test_a_range_without_a_free_port_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        with pytest.raises(PycopyError, match="in use"):
            ports.choose_ports((port, port))


def test_a_range_is_held_until_the_process_ends():
    """Two replays that hand out the same ports would take each other's answers."""
    code = (
        "import sys; from pycopy.host import ports as selfports\n"
        "try: selfports.hold_range((%d, %d))\n"
        "except Exception as error: print(error)\n"
        "else: print('held')\n"
    )

    def other(low, high):
        done = subprocess.run(
            [sys.executable, "-c", code % (low, high)], capture_output=True, text=True, timeout=20
        )
        return done.stdout

    lock = ports.hold_range((21_000, 21_999))
    try:
        assert "another replay" in other(21_999, 22_500)
        assert "--ports" in other(20_000, 21_000)
        assert other(22_000, 22_500) == "held\n"
    finally:
        os.close(lock)
    assert other(21_000, 21_999) == "held\n"


HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pycopy.host import ports as selfports
try:
    selfports.hold_range((23_000, 23_999))
except Exception as error:
    print(type(error).__name__, flush=True)
else:
    print("held", flush=True)
    sys.stdin.read()
"""


def holders(number, *prefix):
    """So many processes that want the same range, started at once, and what each has said."""
    words = [*prefix, sys.executable, "-I", "-c", HOLD, ROOT]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(words, **pipes) for _ in range(number)]
    said = [child.stdout.readline().strip() for child in children]
    for child in children:
        child.communicate(timeout=20)
    return sorted(said)


def test_of_many_at_once_one_gets_it():
    for _ in range(3):
        assert holders(8) == ["PycopyError"] * 7 + ["held"]


def test_each_network_namespace_has_ports_of_its_own(root):
    lock = ports.hold_range((23_000, 23_999))
    try:
        assert holders(1) == ["PycopyError"]
        assert holders(1, "unshare", "-n") == ["held"]
        assert holders(1, "setpriv", "--reuid=65534", "--clear-groups") == ["PycopyError"]
    finally:
        os.close(lock)


#: Fresh directories instead of the host's; if anything is left in them, stderr says what.
ELSEWHERE = """
mount --bind "$1" /mnt && shift || exit
mount -t tmpfs none /run && mount -t tmpfs none /tmp && mount -t tmpfs none /var/tmp || exit
%s
before=$(find /run /tmp /var/tmp)
"$@"
[ "$(find /run /tmp /var/tmp)" = "$before" ] || find /run /tmp /var/tmp >&2
"""


@pytest.mark.parametrize(
    "tight", ["", "mount -o remount,ro,bind /; for d in /run /tmp; do mount -o remount,ro $d; done"]
)
@pytest.mark.parametrize("user", ["0", "65534"])
def test_it_needs_no_file_and_leaves_none(root, tight, user):
    done = subprocess.run(
        [
            "unshare", "-m", "sh", "-c", ELSEWHERE % tight, "sh", ROOT,
            "setpriv", f"--reuid={user}", "--clear-groups", sys.executable, "-I", "-c",
            HOLD, "/mnt",
        ],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("held\n", "")
