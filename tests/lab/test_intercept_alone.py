"""pycopy intercept by itself: real nginx, real kernel, a replay made of the channel's client.

``target`` and ``client`` are joined directly; ``assistant`` is joined to both and forwards,
so that without pycopy the answers to routed clients do arrive.
"""

import ctypes
import ipaddress
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pycopy.channel import Hello, InterceptClient
from pycopy.interception.verdicts import range_of
from pycopy.process.loop import Loop
from pycopy.wire.address import map_address
from pycopy.wire.segment import ACK, KIND_TARGET, SYN

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces"),
    pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx"),
    pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl"),
]

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ["env", f"PYTHONPATH={ROOT}", sys.executable]
FILTER = "tcp and src port 8080"
LIMIT_S = 20
#: Addresses of copied clients: the client host has them, and the target routes them as told.
POOL = {4: "10.99.0.0/24", 6: "fd99::/64"}
COPIED = {4: "10.99.0.5", 6: "fd99::5"}
OTHER = {4: "10.81.0.2", 6: "fd81::2"}
TARGET = {4: "10.81.0.1", 6: "fd81::1"}
CLONE_NEWNET = 0x40000000


def sh(*words, check=True):
    return subprocess.run(words, check=check, capture_output=True, text=True, timeout=30)


def until(condition, what, limit_s=LIMIT_S):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s} s: {what}"
        time.sleep(0.02)


def in_namespace(name, body):
    """Run ``body`` in a thread that has entered the namespace; its sockets stay there."""
    result = []

    def enter():
        try:
            with open(f"/run/netns/{name}", "rb") as handle:
                if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            result.append((body(), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    value, error = result[0]
    if error is not None:
        raise error
    return value


class Net:
    """Three namespaces and nginx on the target, gone again at the end."""

    def __init__(self, folder):
        self.folder = folder
        mark = secrets.token_hex(3)
        self.names = {role: f"pych-{mark}-{role}" for role in ("target", "client", "assistant")}
        self.children = []

    def up(self):
        for name in self.names.values():
            sh("ip", "netns", "add", name)
            for knob in ("all", "default"):
                self.sysctl(name, f"net.ipv4.conf.{knob}.rp_filter=0")
                self.sysctl(name, f"net.ipv6.conf.{knob}.accept_dad=0")
            sh("ip", "-n", name, "link", "set", "lo", "up")
        self.join(81, ("target", "t-c"), ("client", "c-t"))
        self.join(82, ("target", "t-a"), ("assistant", "a-t"))
        self.join(83, ("assistant", "a-c"), ("client", "c-a"))
        self.sysctl(self.names["assistant"], "net.ipv4.ip_forward=1")
        self.sysctl(self.names["assistant"], "net.ipv6.conf.all.forwarding=1")
        for family, address in COPIED.items():
            bits = 32 if family == 4 else 128
            self.ip("client", "addr", "add", f"{address}/{bits}", "dev", "lo")
            hop = "10.83.0.2" if family == 4 else "fd83::2"
            self.ip("assistant", f"-{family}", "route", "add", POOL[family], "via", hop)
        self.route_copied("client")
        self.start_nginx()

    def join(self, number, left, right):
        """A veth between two (role, device), with the network's first and second address."""
        peer = ("peer", "name", right[1], "netns", self.names[right[0]])
        self.ip(left[0], "link", "add", left[1], "type", "veth", *peer)
        for host, (role, device) in enumerate((left, right), 1):
            self.ip(role, "addr", "add", f"10.{number}.0.{host}/24", "dev", device)
            self.ip(role, "addr", "add", f"fd{number}::{host}/64", "dev", device)
            self.ip(role, "link", "set", device, "up")

    def route_copied(self, via_role):
        """Where the target sends answers to copied clients."""
        hops = {"client": ("10.81.0.2", "fd81::2"), "assistant": ("10.82.0.2", "fd82::2")}
        for family, hop in zip((4, 6), hops[via_role], strict=True):
            self.ip("target", f"-{family}", "route", "replace", POOL[family], "via", hop)

    def start_nginx(self):
        conf = self.folder / "nginx.conf"
        conf.write_text(
            f"daemon off; master_process off; pid {self.folder}/nginx.pid;\n"
            f"error_log {self.folder}/error.log; events {{}}\n"
            "http { access_log off; server {\n"
            "  listen 8080; listen [::]:8080; return 200 'a real answer'; } }\n"
        )
        self.spawn("target", "nginx", "-p", str(self.folder), "-c", str(conf))
        until(lambda: self.curl(OTHER[4], TARGET[4]) == "a real answer", "nginx answers")

    def ip(self, role, *words):
        return sh("ip", "-n", self.names[role], *words).stdout

    def run(self, role, *words, check=True):
        return sh("ip", "netns", "exec", self.names[role], *words, check=check)

    def sysctl(self, name, setting):
        sh("ip", "netns", "exec", name, "sysctl", "-qw", setting)

    def spawn(self, role, *words, **options):
        words = ["ip", "netns", "exec", self.names[role], *words]
        child = subprocess.Popen(words, text=True, **options)
        self.children.append(child)
        return child

    def curl(self, source, target, limit_s=1):
        host = f"[{target}]" if ":" in target else target
        words = ["curl", "-s", "-m", str(limit_s), "--interface", source, f"http://{host}:8080/"]
        done = self.run("client", *words, check=False)
        return done.stdout if done.returncode == 0 else None

    def attached(self, role):
        """What our own tool sees attached in there."""
        code = "from pycopy.kernel.attach import attachments; print(*attachments(), sep='\\n')"
        return [line for line in self.run(role, *PYTHON, "-c", code).stdout.splitlines() if line]

    def down(self):
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.wait()
            for pipe in (child.stdout, child.stderr):
                if pipe is not None:
                    pipe.close()
        for name in self.names.values():
            sh("ip", "netns", "del", name, check=False)


@pytest.fixture
def net(tmp_path):
    net = Net(tmp_path)
    try:
        net.up()
        yield net
    finally:
        net.down()


class Running:
    """``pycopy intercept`` as typed, with what it says collected."""

    def __init__(self, net, role, *words):
        self.log = net.folder / f"intercept-{role}.log"
        words = ["-F", FILTER, "--json", "-q", "-l", str(self.log), *words]
        self.child = net.spawn(
            role, *PYTHON, "-m", "pycopy", "intercept", *words,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until(self.ready, "intercept is ready")

    def ready(self):
        assert self.child.poll() is None, self.said()
        return "waiting for replays" in self.said()

    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    def stop(self, number=signal.SIGTERM):
        """The ledger it printed."""
        self.child.send_signal(number)
        return self.ended(0)

    def ended(self, status):
        out, _ = self.child.communicate(timeout=LIMIT_S)
        assert self.child.returncode == status, self.said()
        last = json.loads(out.splitlines()[-1])
        assert last["balanced"] is True, (last, self.said())
        return last["ledger"]


class FakeReplay:
    """The channel's client with nothing behind it; connects from a namespace."""

    def __init__(self, net, role, address, ranges=(), instance=1):
        self.loop = Loop()
        self.got = []
        self.states = []
        self.client = InterceptClient(
            (address, 36524),
            Hello(instance, tuple(ranges)),
            self.loop,
            on_records=self.got.extend,
            on_state=self.states.append,
        )
        in_namespace(net.names[role], lambda: self.client.connect_blocking(5))

    def until(self, condition, what, limit_s=LIMIT_S):
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, f"not within {limit_s} s: {what}"
            self.loop.wait(time.monotonic_ns() + 20_000_000)
            self.client.on_timer(time.monotonic_ns())

    def close(self):
        self.client.close()
        self.loop.close()


def pool(family):
    return range_of(ipaddress.ip_network(POOL[family]))


def is_syn_ack_to(segment, client):
    return (
        segment.kind == KIND_TARGET
        and segment.tcp_flags == SYN | ACK
        and segment.key[:16] == map_address(ipaddress.ip_address(client))
        and segment.key[34:] == (8080).to_bytes(2, "big")
    )


def test_target_swallows_what_is_claimed_and_nothing_else(net):
    running = Running(net, "target", "-i", "t-c,t-a")
    assert "this is the target: the filter selects answers of" in running.said()
    assert "t-c: tc egress" in running.said()
    replay = FakeReplay(net, "client", TARGET[4], [pool(4), pool(6)])
    for family in (4, 6):
        assert net.curl(COPIED[family], TARGET[family], 3) is None, running.said()
        assert net.curl(OTHER[family], TARGET[family]) == "a real answer"
        replay.until(
            lambda family=family: any(is_syn_ack_to(s, COPIED[family]) for s in replay.got),
            "the SYN-ACK's record",
        )
    # TCP believes that each was sent, so what comes again comes by its timer.
    assert len(replay.got) < 20
    replay.close()
    ledger = running.stop()
    assert ledger["kernel"]["passed"] > 0
    assert (
        ledger["kernel"]["captured"]
        == ledger["responses"]["read"]
        == len(replay.got) + ledger["responses"]["no_replay"] + ledger["copies"]["lost_with_replay"]
    )
    assert net.attached("target") == []
    assert net.curl(COPIED[4], TARGET[4], 3) == "a real answer"


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    ("choice", "how"), [((), "tc ingress, "), (("--hook", "xdp"), "xdp, native xdp link")]
)
def test_assistant_is_a_black_hole_though_it_forwards(net, family, choice, how):
    net.route_copied("assistant")
    until(lambda: net.curl(COPIED[family], TARGET[family]), "forwarding works without pycopy")
    running = Running(net, "assistant", "-i", "a-t", *choice)
    assert "this is the assistant" in running.said()
    assert f"a-t: {how}" in running.said()
    # Nobody has claimed anything yet: everything passes.
    assert net.curl(COPIED[family], TARGET[family]) == "a real answer"
    address = "10.83.0.1" if family == 4 else "fd83::1"
    replay = FakeReplay(net, "client", address, [pool(family)])
    assert net.curl(COPIED[family], TARGET[family]) is None
    replay.until(
        lambda: any(is_syn_ack_to(s, COPIED[family]) for s in replay.got), "the SYN-ACK's record"
    )
    replay.close()
    ledger = running.stop(signal.SIGINT)
    assert ledger["responses"]["to_range"] >= 1
    assert net.attached("assistant") == []
    assert net.curl(COPIED[family], TARGET[family]) == "a real answer"


def test_where_xdp_is_taken_tc_does_it_and_the_reason_is_told(net):
    net.route_copied("assistant")
    first = Running(net, "assistant", "-i", "a-t", "-p", "36525", "--hook", "xdp")
    first.log.rename(net.folder / "first.log")
    second = Running(net, "assistant", "-i", "a-t", "--hook", "xdp")
    assert "a-t: tc ingress" in second.said()
    assert "XDP on a-t is taken by program" in second.said()
    replay = FakeReplay(net, "client", "10.83.0.1", [pool(4)])
    assert net.curl(COPIED[4], TARGET[4]) is None
    replay.until(lambda: any(is_syn_ack_to(s, COPIED[4]) for s in replay.got), "the record")
    replay.close()
    second.stop()
    assert len(net.attached("assistant")) == 1
    first.stop()


def test_a_device_without_ethernet(net):
    net.ip("assistant", "tuntap", "add", "dev", "tun9", "mode", "tun")
    net.ip("assistant", "link", "set", "tun9", "up")
    running = Running(net, "assistant", "-i", "a-t,tun9", "--hook", "xdp")
    assert "a-t: xdp" in running.said()
    assert "tun9: tc ingress" in running.said()
    assert "XDP needs Ethernet, tun9 has none" in running.said()
    running.stop()


def test_true_client_addresses_claimed_one_by_one(net):
    running = Running(net, "target", "-i", "t-c", "--pass", "10.81.0.0/24")
    first = FakeReplay(net, "client", TARGET[4], instance=1)
    second = FakeReplay(net, "client", TARGET[4], instance=2)
    assert net.curl(COPIED[4], TARGET[4]) is None
    assert net.curl(OTHER[4], TARGET[4]) == "a real answer"  # --pass
    for replay in (first, second):
        replay.until(lambda replay=replay: replay.got, "unclaimed goes to all")
    key = first.got[0].key
    before = len(first.got), len(second.got)
    second.client.claim(key)
    second.client.flush()
    # nginx has the connection in SYN-RECEIVED and sends its SYN-ACK again.
    second.until(lambda: len(second.got) > before[1] + 1, "retransmissions come to the claimer")
    first.until(lambda: True, "")
    assert len(first.got) - before[0] <= 1
    first.close()
    second.close()
    # A stray answer to a real client is worse than a slow test: it stays so.
    assert net.curl(COPIED[4], TARGET[4]) is None
    ledger = running.stop()
    assert ledger["responses"]["to_claim"] >= 1
    assert ledger["responses"]["to_all"] >= 1
    assert ledger["responses"]["no_replay"] >= 1


def test_memory_of_the_long_lived_process(net):
    running = Running(net, "target", "-i", "t-c")
    status = Path(f"/proc/{running.child.pid}/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    assert int(resident.split()[1]) < 40_000, resident
    running.stop()


@pytest.mark.parametrize(("role", "device"), [("target", "t-c"), ("assistant", "a-t")])
def test_nothing_stays_attached_after_kill_9(net, role, device):
    running = Running(net, role, "-i", device)
    assert net.attached(role)
    running.child.kill()
    running.child.wait()
    until(lambda: net.attached(role) == [], "the kernel detaches")


def test_a_device_goes_away_then_the_last_one(net):
    running = Running(net, "target", "-i", "t-c,t-a")
    replay = FakeReplay(net, "client", TARGET[4], [pool(4)])
    replay.close()
    net.ip("target", "link", "del", "t-a")
    until(lambda: "t-a is gone" in running.said(), "it notices")
    assert running.child.poll() is None
    net.ip("target", "link", "del", "t-c")
    ledger = running.ended(1)
    assert "no network device is left" in running.said()
    assert ledger["connections"]["left"] == 1


def test_usr1_prints_and_hup_reopens_the_log(net):
    running = Running(net, "target", "-i", "t-c")
    running.child.send_signal(signal.SIGUSR1)
    line = json.loads(running.child.stdout.readline())
    assert line["ledger"]["responses"]["read"] == 0
    rotated = running.log.rename(net.folder / "rotated.log")
    running.child.send_signal(signal.SIGHUP)
    until(running.log.exists, "a new log file")
    FakeReplay(net, "client", TARGET[4], [pool(4)]).close()
    until(lambda: "has left" in running.said(), "the new file is written to")
    assert "has left" not in rotated.read_text()
    running.stop()


def test_daemon(net):
    log, pid_file = net.folder / "daemon.log", net.folder / "daemon.pid"
    files = ["-l", str(log), "-P", str(pid_file)]
    net.run("target", *PYTHON, "-m", "pycopy", "intercept", "-F", FILTER, "-i", "t-c", "-d", *files)
    pid = int(pid_file.read_text())
    try:
        assert "waiting for replays" in log.read_text()
        assert len(net.attached("target")) == 1
    finally:
        os.kill(pid, signal.SIGTERM)
    until(lambda: not pid_file.exists(), "the daemon ends")
    assert "ledger balanced: yes" in log.read_text()
    assert net.attached("target") == []


def test_default_devices_and_a_busy_port(net):
    running = Running(net, "target")
    assert "t-c: tc egress" in running.said()
    assert "t-a: tc egress" in running.said()
    done = net.run("target", *PYTHON, "-m", "pycopy", "intercept", "-F", FILTER, check=False)
    assert done.returncode == 1
    assert "port 36524 is in use" in done.stderr
    assert "-p" in done.stderr
    assert len(net.attached("target")) == 2
    running.stop()


def test_a_frozen_replay_is_noticed_and_harms_nobody(net):
    running = Running(net, "target", "-i", "t-c")
    frozen = FakeReplay(net, "client", TARGET[4], [pool(6)], instance=1)
    good = FakeReplay(net, "client", TARGET[4], [pool(4)], instance=2)
    assert net.curl(COPIED[4], TARGET[4]) is None
    good.until(lambda: good.got, "records go on")
    good.until(lambda: "silent for 5 s" in running.said(), "the frozen one is noticed")
    assert good.client.connected
    frozen.close()
    good.close()
    running.stop()
