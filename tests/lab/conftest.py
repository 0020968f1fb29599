"""Fixtures of the lab tier: hosts in namespaces, and one copying run to its accounts.

A lab lives for one test module; servers and pycopy live for one test. Whatever a test
does, the lab is removed at the end together with every process started in it.
"""

import contextlib
import ctypes
import hashlib
import os
import socket
import struct
import time
from pathlib import Path

import pytest

from pycopy.kernel import pcapfilter, syscall
from pycopy.lab.copying import Copying, LoadRun, wait_settled
from pycopy.lab.servers import Nginx, Served
from pycopy.lab.topology import DEVICE, SWITCH, Lab
from tests.lab.exact import Exact

#: A connection in the log of the exact server over which nothing was said.
_SILENT = hashlib.sha256().hexdigest()

_TCX = {"tcx ingress": syscall.TCX_INGRESS, "tcx egress": syscall.TCX_EGRESS}


@pytest.fixture(scope="session", autouse=True)
def _root():
    if os.geteuid() != 0:
        pytest.fail("the lab tier makes network namespaces: run it as root", pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def _fastpath(pytestconfig):
    transport = pytestconfig.getoption("--transport")
    options = ("--transport", transport) if transport else ()
    Copying.replay_options = Copying.intercept_options = options
    if pytestconfig.getoption("--no-fastpath"):
        Copying.replay_options = ("--no-fastpath", *options)


def pytest_collection_modifyitems(config, items):
    """What tests the fast path itself needs it: whole files, and cases that are ``fast``."""
    if config.getoption("--no-fastpath"):
        own = set(Path(__file__).parent.glob("test_fastpath*.py"))
        items[:] = [item for item in items if item.path not in own and not _is_fast(item)]


def _is_fast(item):
    return hasattr(item, "callspec") and item.callspec.params.get("fast") is True


@pytest.fixture(scope="module")
def lab(request):
    name = f"pycopy-test-{os.getpid()}-{request.module.__name__.rpartition('.')[2]}"
    with Lab(name, extra=("online2",)) as lab:
        yield lab


@pytest.fixture
def scenario(lab):
    """``scenario(placement, family, ...)``: servers on all hosts, a copying when started."""
    made = []

    def make(*args, **options):
        made.append(Scenario(lab, *args, **options))
        return made[-1]

    yield make
    for one in reversed(made):
        one.close()


def attached(lab):
    """Every BPF program on any interface of the lab, as text; [] is as it should be.

    Asked of the kernel without pycopy's own listing: ip for XDP, tc for clsact filters,
    BPF_PROG_QUERY for TCX, which iproute2 does not show.
    """
    found = []
    for role in (*lab.roles, SWITCH):
        for line in lab.run(role, ["ip", "-o", "-d", "link"]).stdout.splitlines():
            if "xdp" in line:
                found.append(f"{role}: {line[:60]}")
        if "clsact" in lab.run(role, ["tc", "qdisc", "show"]).stdout:
            found.append(f"{role}: clsact")
        with lab.inside(role):
            for index, device in socket.if_nameindex():
                for hook, number in _TCX.items():
                    with contextlib.suppress(OSError):  # below 6.6 there is none
                        there = syscall.attached(index, number)
                        found += [f"{role}: {device} {hook} {ids}" for ids in there]
    return found


def eventually(condition, timeout_s=5.0):
    """Poll until ``condition()`` is true; False when it was not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Resets:
    """What a host's kernel sends to the target by itself: resets, one for each stray response.

    Counted on the wire: a client may have reasons of its own to reset a connection online.
    """

    _EXPRESSION = (
        "(tcp[13] & 4 != 0 and dst host {4}) or"
        " (ip6 and ip6[6] = 6 and ip6[53] & 4 != 0 and dst host {6})"
    )
    _SO_ATTACH_FILTER, _SOL_PACKET, _PACKET_STATISTICS, _ETH_P_ALL = 26, 263, 6, 3

    def __init__(self, lab, role):
        targets = {family: lab.address("target", family) for family in (4, 6)}
        expression = self._EXPRESSION.replace("{4}", targets[4]).replace("{6}", targets[6])
        program = pcapfilter._instructions(expression, 14)
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in program))
        with lab.inside(role):
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            fprog = struct.pack("HL", len(program), ctypes.addressof(code))
            self._sock.setsockopt(socket.SOL_SOCKET, self._SO_ATTACH_FILTER, fprog)
            self._sock.bind((DEVICE, self._ETH_P_ALL))
        self._count = 0

    def count(self):
        statistics = self._sock.getsockopt(self._SOL_PACKET, self._PACKET_STATISTICS, 8)
        self._count += struct.unpack("II", statistics)[0]
        return self._count

    def close(self):
        self._sock.close()


class Scenario:
    """Servers online and as target, pycopy between them, load, and the comparison.

    ``servers`` pairs an online port with what listens there ("nginx", "http", "line");
    the target listens on port + 8000. ``only_spoken``: connections over which nothing was
    said are left out of the comparison.
    """

    only_spoken = False
    #: The fast path is off for a while, or for good, and that is what is tested.
    without_fastpath = False

    def __init__(
        self, lab, placement, family, *, servers=((80, "nginx"),), online=("online",),
        sizes=(1, 211, 1009, 10007, 100003), delay_s=0.0, **copying,
    ):  # fmt: skip
        self.lab = lab
        self.family = family
        self._ports = [port for port, _ in servers]
        self.online = [
            self._server(role, port, kind, sizes) for role in online for port, kind in servers
        ]
        self.target = [
            self._server("target", port + 8000, kind, sizes, delay_s) for port, kind in servers
        ]
        self._resets = None
        self.copying = Copying(
            lab, placement, family, online=online,
            ports=[(port, port + 8000) for port in self._ports], **copying,
        )  # fmt: skip
        for server in (*self.online, *self.target):
            server.start()

    def _server(self, role, port, kind, sizes, delay_s=0.0):
        if kind == "nginx":
            return Nginx(self.lab, role, port, sizes)
        return Exact(self.lab, role, port, kind, delay_s)

    def start(self):
        self.copying.start()
        self.watch_resets()
        return self

    def watch_resets(self):
        """From now on no response may stray: what start() does once pycopy runs."""
        self._resets = Resets(self.lab, "client")
        self._own_resets = self._resets_online()

    def _resets_online(self):
        """Of hosts that swallow answers themselves; others have a channel, which may be reset."""
        sent = {}
        for role in () if self.copying.intercepts else {server.role for server in self.online}:
            text = self.lab.run(role, ["cat", "/proc/net/snmp"]).stdout
            names, values = (line.split() for line in text.splitlines() if line[:4] == "Tcp:")
            sent[role] = int(values[names.index("OutRsts")])
        return sent

    def attached(self):
        return attached(self.lab)

    def eventually(self, condition, timeout_s=5.0):
        return eventually(condition, timeout_s)

    def load(self, requests, connections, *, role="online", port=0, wait=True, **options):
        """Drive load at an online server; options as in pycopy.lab.load, ``wait`` for its end."""
        arguments = ["--requests", str(requests), "--connections", str(connections)]
        for option, value in options.items():
            if isinstance(value, (list, tuple)):
                value = ",".join(str(part) for part in value)
            arguments += [f"--{option.replace('_', '-')}", str(value)]
        run = LoadRun(self.lab, self.family, role, port or self._ports[0], *arguments)
        return self.checked(run, requests) if wait else run

    def checked(self, run, requests):
        """The result of a load that the online service must have served to the last byte."""
        result = run.result()
        assert result["ok"], result["errors"]
        assert result["requests"] == requests
        return result

    @property
    def expects_fastpath(self):
        """What is typed leaves the healthy sessions to the kernel."""
        words = [word for program in self.copying.programs for word in program.arguments]
        without = {"--no-fastpath", "--hook", "-r", "-g", "--sample", "--ramp"}
        elsewhere = bool(self.copying.intercepts)
        shared = elsewhere and len(self.copying.replays) > 1 and "-c" not in words
        spread = elsewhere and "--workers" in words
        return not (without.intersection(words) or shared or spread or self.without_fastpath)

    def asked(self):
        return self._served(self.online)

    def copied(self):
        return self._served(self.target)

    def _served(self, servers):
        served = Served.sum(server.served() for server in servers)
        if self.only_spoken:
            del served.connections[_SILENT]
        return served

    def copied_count(self):
        return sum(server.count() for server in self.target)

    def settle(self, patience_s=5.0):
        """Wait for the last copy to arrive, or for none to arrive any more."""
        wanted = sum(server.count() for server in self.online)
        return wait_settled(self.copied_count, wanted, patience_s)

    def finish(self, *, settle=True, resets=False):
        """Stop pycopy and hold it to everything it promises; returns its results.

        ``resets``: the clients of this run send resets of their own.
        """
        if settle:
            self.settle()
        outcome = self.copying.stop()
        # A server logs a connection when it ends, which may be an instant after the last request.
        eventually(lambda: self.asked().connections == self.copied().connections, 2)
        asked, copied = self.asked(), self.copied()
        assert asked.count > 0
        said = "\n".join(program.messages for program in self.copying.programs)
        summary = f"{outcome}\n{said}"
        assert not asked.lost(copied), f"lost {_few(asked.lost(copied))}\n{summary}"
        assert not asked.surplus(copied), f"unasked {_few(asked.surplus(copied))}\n{summary}"
        assert asked.connections == copied.connections, "requests regrouped\n" + summary
        strayed = self._resets.count()
        assert not strayed, f"{strayed} responses strayed to clients\n{summary}"
        if not resets:
            assert self._resets_online() == self._own_resets, "a response strayed\n" + summary
        assert outcome.balanced, summary
        if self.expects_fastpath:
            assert outcome.fastpath == "on", summary
        assert attached(self.lab) == []
        return outcome

    def close(self):
        self.copying.abandon()
        if self._resets is not None:
            self._resets.close()
        for server in (*self.target, *self.online):
            server.stop()


def _few(counter):
    return f"{counter.total()}, such as {sorted(counter)[:3]}"
