"""Attaching on the real kernel: every way, what refuses it, and what is left after SIGKILL."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pycopy.errors import UsageError
from pycopy.kernel import syscall
from pycopy.kernel.attach import (
    Hook,
    HookTaken,
    attach,
    attachments,
    detach_leftovers,
    xdp_program_ids,
)
from tests.bpf.sources import load

CLONE_NEWNET = 0x40000000
ROOT = Path(__file__).resolve().parents[2]

#: Counts, and lets every packet through; VERDICT says how.
COUNTER = """
BPF_PERCPU_ARRAY(counts, u64, 1);
int %s(PYCOPY_CTX *ctx)
{
	u32 zero = 0;
	u64 *count = counts.lookup(&zero);
	if (count)
		*count += 1;
	return VERDICT;
}
"""

CHILD = """
import sys, time
from pycopy.kernel.attach import Hook, attach
from tests.bpf.sources import load
source, ifname, hook, prefer_link = sys.argv[1:]
hook = Hook[hook]
xdp = hook is Hook.XDP
module = load(source, xdp=xdp, VERDICT=2 if xdp else -1)
attachment = attach(module, ifname, hook, prefer_link=bool(int(prefer_link)))
print(attachment.how, flush=True)
time.sleep(60)
"""

EVERY_WAY = [
    (Hook.TC_INGRESS, True),
    (Hook.TC_EGRESS, True),
    (Hook.TC_INGRESS, False),
    (Hook.TC_EGRESS, False),
    (Hook.XDP, True),
]


@pytest.fixture
def veth():
    """va and vb, joined, in a namespace of our own that nobody else can see."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/self/ns/net", os.O_RDONLY)
    assert libc.unshare(CLONE_NEWNET) == 0
    try:
        run("ip link set lo up")
        run("ip link add va type veth peer name vb")
        run("sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
        run("ip link set va up")
        run("ip link set vb up")
        # Until then va has no queue yet, and what is sent into it is dropped.
        assert eventually(lambda: "state UP" in run("ip -o link show va"))
        yield "va", "vb"
    finally:
        assert libc.setns(before, CLONE_NEWNET) == 0
        os.close(before)


@pytest.fixture
def compiled(tmp_path):
    """Loads a counting program for a hook, under a name."""
    modules = []

    def compile_counter(hook, name="pycopy_counter", verdict=None):
        source = tmp_path / f"{name}.c"
        source.write_text(COUNTER % name)
        xdp = hook is Hook.XDP
        if verdict is None:
            verdict = 2 if xdp else -1
        modules.append(load(source, xdp=xdp, name=name, VERDICT=verdict))
        return modules[-1]

    yield compile_counter
    for module in modules:
        module.close()


def run(command):
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def send_frames(ifname, count=5):
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((ifname, 0))
        for _ in range(count):
            sender.send(b"\xff" * 6 + b"\x02\0\0\0\0\1" + b"\x88\xb5" + bytes(50))


def eventually(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def sees_frames(module, ifname):
    before = module.maps["counts"].sum_percpu(0)
    send_frames(ifname)
    return eventually(lambda: module.maps["counts"].sum_percpu(0) >= before + 5, 2.0)


def tcx_names(ifname):
    ifindex = socket.if_nametoindex(ifname)
    names = []
    for attach_type in (syscall.TCX_INGRESS, syscall.TCX_EGRESS):
        for program_id, _ in syscall.attached(ifindex, attach_type):
            fd = syscall.program_fd_by_id(program_id)
            names.append(syscall.program_info(fd).name)
            os.close(fd)
    return names


def traces(ifname):
    """Everything of anybody that is attached to an interface."""
    ifindex = socket.if_nametoindex(ifname)
    filters = "".join(run(f"tc filter show dev {ifname} {way}") for way in ("ingress", "egress"))
    qdiscs = "clsact" if "clsact" in run(f"tc qdisc show dev {ifname}") else ""
    return tcx_names(ifname), xdp_program_ids(ifindex), filters, qdiscs


NOTHING = ([], [], "", "")


@pytest.mark.parametrize(("hook", "prefer_link"), EVERY_WAY)
def test_attached_program_sees_frames_until_closed(veth, compiled, hook, prefer_link):
    near, far = veth
    module = compiled(hook)
    ifname, sender = (near, near) if hook is Hook.TC_EGRESS else (near, far)
    attachment = attach(module, ifname, hook, prefer_link=prefer_link)
    assert sees_frames(module, sender)
    assert attachment.alive()
    assert any("pycopy_counter" in line for line in attachments())
    attachment.close()
    attachment.close()
    assert not attachment.alive()
    assert traces(near) == NOTHING
    assert attachments() == []


def test_how_and_reason(veth, compiled):
    near, _ = veth
    tc = compiled(Hook.TC_INGRESS)
    with contextlib.closing(attach(tc, near, Hook.TC_INGRESS)) as attachment:
        assert attachment.how in ("tcx link", "clsact filter")
        assert bool(attachment.reason) == (attachment.how == "clsact filter")
    xdp = compiled(Hook.XDP)
    with contextlib.closing(attach(xdp, near, Hook.XDP)) as attachment:
        assert (attachment.how, attachment.reason) == ("native xdp link", "")


def test_xdp_generic_when_the_driver_has_none(veth, compiled):
    with contextlib.closing(attach(compiled(Hook.XDP), "lo", Hook.XDP)) as attachment:
        assert attachment.how == "generic xdp link"
        assert attachment.reason == "native: the driver of lo has no XDP"


def test_xdp_generic_when_the_mtu_is_too_large(veth, compiled):
    near, far = veth
    run(f"ip link set {near} mtu 9000")
    run(f"ip link set {far} mtu 9000")
    module = compiled(Hook.XDP)
    with contextlib.closing(attach(module, near, Hook.XDP)) as attachment:
        assert attachment.how == "generic xdp link"
        assert "MTU 9000" in attachment.reason
        assert sees_frames(module, far)


@pytest.mark.parametrize("mode", [syscall.XDP_FLAGS_DRV, syscall.XDP_FLAGS_SKB])
def test_xdp_never_replaces_a_foreign_link(veth, compiled, mode):
    near, far = veth
    foreign = compiled(Hook.XDP, "foreign")
    ifindex = socket.if_nametoindex(near)
    foreign_link = syscall.link_create(foreign.program_fd, ifindex, syscall.XDP, mode)
    ident = syscall.program_info(foreign.program_fd).id
    with pytest.raises(HookTaken, match=rf"program {ident} \(foreign\)"):
        attach(compiled(Hook.XDP), near, Hook.XDP)
    assert sees_frames(foreign, far)
    os.close(foreign_link)


def test_xdp_never_replaces_a_foreign_netlink_program(veth, compiled):
    from pyroute2 import IPRoute

    near, far = veth
    foreign = compiled(Hook.XDP, "foreign")
    ifindex = socket.if_nametoindex(near)
    with IPRoute() as ipr:
        ipr.link("set", index=ifindex, xdp_fd=foreign.program_fd)
    ident = syscall.program_info(foreign.program_fd).id
    with pytest.raises(HookTaken, match=f"program {ident}"):
        attach(compiled(Hook.XDP), near, Hook.XDP)
    assert xdp_program_ids(ifindex) == [ident]
    assert sees_frames(foreign, far)


def test_unknown_interface_names_the_known_ones(veth, compiled):
    with pytest.raises(UsageError) as caught:
        attach(compiled(Hook.TC_INGRESS), "nosuch", Hook.TC_INGRESS)
    assert "nosuch" in caught.value.cause
    assert "va" in caught.value.cure


@pytest.mark.parametrize("prefer_link", [True, False])
def test_a_foreign_program_before_ours_does_not_end_the_chain(veth, compiled, prefer_link):
    """TC_ACT_OK of an earlier program is final: whoever comes after sees nothing."""
    near, far = veth
    foreign = compiled(Hook.TC_INGRESS, "foreign", verdict=0)
    ours = compiled(Hook.TC_INGRESS)
    first = None
    if prefer_link:
        ifindex = socket.if_nametoindex(near)
        first = syscall.link_create(foreign.program_fd, ifindex, syscall.TCX_INGRESS)
    else:
        attach_foreign_filter(foreign, near, priority=1)
    attachment = attach(ours, near, Hook.TC_INGRESS, prefer_link=prefer_link)
    assert sees_frames(ours, far)
    assert sees_frames(foreign, far)
    attachment.close()
    assert sees_frames(foreign, far)
    if first is not None:
        os.close(first)


def attach_foreign_filter(module, ifname, priority):
    from pyroute2 import IPRoute

    ifindex = socket.if_nametoindex(ifname)
    with IPRoute() as ipr:
        if "clsact" not in run(f"tc qdisc show dev {ifname}"):
            ipr.tc("add", "clsact", ifindex)
        ipr.tc(
            "add-filter",
            "bpf",
            ifindex,
            1,
            parent=0xFFFFFFF2,
            prio=priority,
            protocol=3,
            fd=module.program_fd,
            name="foreign",
            direct_action=True,
        )


def test_clsact_beside_a_filter_of_another_kind(veth, compiled):
    near, far = veth
    run(f"tc qdisc add dev {near} clsact")
    run(f"tc filter add dev {near} ingress prio 1 protocol ip u32 match u32 0 0 classid 1:1")
    before = run(f"tc filter show dev {near} ingress")
    module = compiled(Hook.TC_INGRESS)
    attachment = attach(module, near, Hook.TC_INGRESS, prefer_link=False)
    assert sees_frames(module, far)
    attachment.close()
    assert run(f"tc filter show dev {near} ingress") == before


def test_clsact_that_was_there_before_stays(veth, compiled):
    near, _ = veth
    run(f"tc qdisc add dev {near} clsact")
    attach(compiled(Hook.TC_INGRESS), near, Hook.TC_INGRESS, prefer_link=False).close()
    assert traces(near) == ([], [], "", "clsact")


def test_two_of_us_by_clsact(veth, compiled):
    near, far = veth
    one, two = compiled(Hook.TC_INGRESS), compiled(Hook.TC_INGRESS)
    first = attach(one, near, Hook.TC_INGRESS, prefer_link=False)
    second = attach(two, near, Hook.TC_INGRESS, prefer_link=False)
    assert sees_frames(one, far)
    assert sees_frames(two, far)
    first.close()
    assert sees_frames(two, far)
    assert second.alive()
    second.close()


@pytest.mark.parametrize(("hook", "prefer_link"), EVERY_WAY)
def test_alive_tells_that_the_interface_is_gone(veth, compiled, hook, prefer_link):
    near, _ = veth
    attachment = attach(compiled(hook), near, hook, prefer_link=prefer_link)
    run(f"ip link set {near} down")
    run(f"ip link set {near} up")
    assert attachment.alive()
    run(f"ip link del {near}")
    assert eventually(lambda: not attachment.alive())
    attachment.close()


def attached_then_killed(tmp_path, ifname, hook, prefer_link):
    """Attach in a process of its own and SIGKILL it; the way it was attached."""
    source = tmp_path / "counter.c"
    source.write_text(COUNTER % "pycopy_counter")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, source, ifname, hook.name, str(int(prefer_link))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    how = child.stdout.readline().strip()
    if not prefer_link:
        assert detach_leftovers() == []  # its process lives: in use, not a leftover
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    return how


@pytest.mark.parametrize(("hook", "prefer_link"), EVERY_WAY)
def test_sigkill(veth, compiled, tmp_path, hook, prefer_link):
    near, far = veth
    foreign = compiled(Hook.TC_INGRESS, "foreign")
    ifindex = socket.if_nametoindex(near)
    foreign_link = syscall.link_create(foreign.program_fd, ifindex, syscall.TCX_INGRESS)
    how = attached_then_killed(tmp_path, near, hook, prefer_link)
    assert how
    if how.endswith("link"):
        assert eventually(lambda: traces(near) == (["foreign"], [], "", ""))
        assert detach_leftovers() == []
    else:
        assert "pycopy_counter" in traces(near)[2]
        assert detach_leftovers([far]) == []
        removed = eventually_removed(near)
        assert len(removed) == 1
        assert removed[0].startswith(f"{near}: clsact filter pycopy_counter")
    assert traces(near) == (["foreign"], [], "", "")
    assert sees_frames(foreign, far)
    os.close(foreign_link)


def eventually_removed(ifname):
    """The killed process's descriptors go a moment after it does."""
    removed = []
    assert eventually(lambda: removed.extend(detach_leftovers([ifname])) or removed)
    return removed


def test_leftovers_leave_foreign_filters_alone(veth, compiled, tmp_path):
    near, far = veth
    foreign = compiled(Hook.TC_INGRESS, "foreign")
    attach_foreign_filter(foreign, near, priority=1)
    before = run(f"tc filter show dev {near} ingress")
    attached_then_killed(tmp_path, near, Hook.TC_INGRESS, False)
    assert len(eventually_removed(near)) == 1
    assert run(f"tc filter show dev {near} ingress") == before
    assert "clsact" in traces(near)[3]
    assert sees_frames(foreign, far)
