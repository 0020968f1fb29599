"""bpf/relay.h: a response becomes a datagram to its replay, whatever it was made of."""

import contextlib
import os
import socket
import threading
import time

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from pycopy.kernel import abi, syscall
from pycopy.kernel.abi import PASS, RELAY, InterceptCount
from pycopy.kernel.attach import Hook, attach
from pycopy.wire.segment import KIND_TARGET, SEGMENT, Segment
from tests.bpf.fast import ETH_P_ALL, TC_REDIRECT, ones_sum
from tests.bpf.frames import HEADERS, LINKS, SYN_OPTIONS, TIMESTAMPS, padded, tcp
from tests.bpf.harness import TC_SHOT, Intercept, check_record, mapped, sh, wait_for
from tests.bpf.test_live import SERVER, hosts, listening  # noqa: F401 (hosts: a fixture)

COOKIE = 0xFEDC_BA98_7654_3210
L2 = bytes.fromhex("020000000009 020000000008")
OURS, REPLAY = {4: "10.3.0.1", 6: "fd03::1"}, {4: "10.3.0.2", 6: "fd03::2"}
PORTS = 36524, 40001
IFINDEX = 17
FAMILIES = {"IPv4": 4, "IPv6": 6}


def entry(family, ifindex=IFINDEX):
    ether_type = b"\x08\x00" if family == 4 else b"\x86\xdd"
    return abi.RELAY_ENTRY.pack(
        COOKIE, ifindex, family, 0, L2 + ether_type, mapped(OURS[family]), mapped(REPLAY[family]),
        *(port.to_bytes(2, "big") for port in PORTS),
    )  # fmt: skip


@pytest.fixture(scope="module")
def program():
    """Relay 3 is for IPv4, relay 4 for IPv6."""
    made = Intercept("tc")
    for number, family in ((3, 4), (4, 6)):
        made.maps["relays"].update(number.to_bytes(4, "little"), entry(family))
    yield made
    made.close()


def relay_of(family):
    return RELAY + (3 if family == 4 else 4)


def run(program, frame):
    """(verdict, packet afterwards, what was counted beside MATCHED)."""
    before = program.counts()
    result = syscall.test_run(program.module.program_fd, frame)
    after = program.counts()
    program.check_balance(after)
    (kind,) = [kind for kind in after if kind and after[kind] != before[kind]]
    assert after[InterceptCount.MATCHED] == before[InterceptCount.MATCHED] + 1
    return result.retval, result.data, kind


def check_datagram(frame, family):
    """Headers to the last byte; the segment."""
    assert len(frame) == 14 + (20 if family == 4 else 40) + 8 + abi.DATAGRAM_BYTES
    assert frame[:12] == L2
    ip = Ether(frame).payload
    if family == 4:
        assert type(ip) is IP and ip.ihl == 5 and ip.len == len(frame) - 14
        assert ones_sum(frame[14:34]) == 0xFFFF, "IP checksum"
    else:
        assert type(ip) is IPv6 and ip.plen == len(frame) - 54
    assert (ip.src, ip.dst) == (OURS[family], REPLAY[family])
    udp = ip.payload
    assert type(udp) is UDP and (udp.sport, udp.dport, udp.chksum) == (*PORTS, 0)
    payload = bytes(udp.payload)
    assert udp.len == 8 + len(payload)
    cookie, _junk, kind, reserved = abi.DATAGRAM_HEAD.unpack_from(payload)
    assert (cookie, kind, reserved) == (COOKIE, abi.RELAYED_SEGMENT, 0)
    return Segment(*SEGMENT.unpack(payload[abi.DATAGRAM_HEAD.size :]))


@pytest.mark.parametrize("ip", FAMILIES)
@pytest.mark.parametrize("flags", ["SA", "A", "PA", "FPA", "R", "RA"])
@pytest.mark.parametrize("payload", [0, 1, 90, 1448, 3000])
def test_a_response_becomes_a_datagram(program, ip, flags, payload):
    """Shorter than the datagram, or longer: nothing of it is left."""
    family = FAMILIES[ip]
    program.set_default(relay_of(family))
    options = SYN_OPTIONS if "S" in flags else TIMESTAMPS
    for frame in (
        tcp(80, 4321, flags, b"\xee" * payload, ip=ip, options=options),
        padded(tcp(80, 4321, flags, b"\xee" * payload, ip=ip)),
    ):
        verdict, data, kind = run(program, frame)
        assert (verdict, kind) == (TC_REDIRECT, InterceptCount.RELAYED)
        segment = check_datagram(data, family)
        check_record((segment._replace(time_ns=time.monotonic_ns()), b""), frame, kind=KIND_TARGET)
    assert program.records() == []


@pytest.mark.parametrize("ip", HEADERS)
@pytest.mark.parametrize("link_name", LINKS)
def test_what_cannot_be_relayed_is_recorded(program, ip, link_name):
    """Where the TCP header is elsewhere than the datagram's own would be, or of another family."""
    frame = tcp(80, 4321, payload=b"x" * 100, ip=ip, link=link_name)
    family = 4 if ip.startswith("IPv4") else 6
    for relay_family in (4, 6):
        plain = (ip, link_name) in (("IPv4", "untagged"), ("IPv6", "untagged"))
        program.set_default(relay_of(relay_family))
        verdict, data, kind = run(program, frame)
        if plain and family == relay_family:
            assert (verdict, kind) == (TC_REDIRECT, InterceptCount.RELAYED)
            continue
        assert (verdict, kind, data) == (TC_SHOT, InterceptCount.CAPTURED, frame)
        (record,) = program.records()
        check_record(record, frame, kind=KIND_TARGET)


@pytest.mark.parametrize("number", [0, 63, 64, 1 << 30])
def test_a_relay_that_is_not_there(program, number):
    """As while a replay's way is gone: swallowed all the same."""
    program.set_default(RELAY + number)
    frame = tcp(80, 4321, payload=b"x")
    assert run(program, frame) == (TC_SHOT, frame, InterceptCount.CAPTURED)
    assert len(program.records()) == 1


def test_the_claim_says_by_which(program):
    program.set_default(PASS)
    program.claim(mapped("192.0.2.0"), 96 + 24, relay_of(4))
    program.claim(mapped("192.0.2.9"), 128, PASS)
    try:
        to = {last: tcp(80, 4321, ip=IP(src="10.1.0.1", dst=f"192.0.2.{last}")) for last in (8, 9)}
        assert run(program, to[8])[::2] == (TC_REDIRECT, InterceptCount.RELAYED)
        assert run(program, to[9])[1:] == (to[9], InterceptCount.PASSED)
    finally:
        program.unclaim()


#: linux/if_packet.h
SOL_PACKET, PACKET_AUXDATA, TP_STATUS_VLAN_VALID = 263, 8, 1 << 4


@pytest.mark.parametrize("ip", FAMILIES)
@pytest.mark.parametrize("link_name", ["untagged", "802.1Q"])
def test_a_tag_stays_behind(program, namespaces, ip, link_name):
    """The kernel takes it off before TC, and would put it on whatever leaves."""
    family = FAMILIES[ip]
    namespaces.new()
    with contextlib.ExitStack() as stack:
        sh("ip link add cli type veth peer name srv")
        tap, ifindex = _way_out(stack)
        for name in ("srv", "cli"):
            sh(f"ip link set {name} up")
        tap.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        number = relay_of(family) - RELAY
        program.maps["relays"].update(number.to_bytes(4, "little"), entry(family, ifindex))
        stack.callback(program.maps["relays"].update, number.to_bytes(4, "little"), entry(family))
        program.set_default(relay_of(family))
        stack.callback(attach(program.module, "srv", Hook.TC_INGRESS).close)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as client:
            client.bind(("cli", 0))
            frame = tcp(80, 4321, "A", b"x" * 1000, ip=ip, link=link_name)
            client.send(frame)
        tap.settimeout(10)
        data, ancillary, _, _ = tap.recvmsg(2000, 200)
        ((_, _, aux),) = ancillary
        assert not int.from_bytes(aux[:4], "little") & TP_STATUS_VLAN_VALID
        assert check_datagram(data, family).seg_len == 1000


def _way_out(stack):
    """A veth pair: a socket at its other end, and the index of the one to redirect to."""
    sh("ip link add out0 type veth peer name out1")
    for name in ("out1", "out0"):
        sh(f"sysctl -qw net.ipv6.conf.{name}.disable_ipv6=1")
        sh(f"ip link set {name} up")
    tap = stack.enter_context(
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    )
    tap.bind(("out1", ETH_P_ALL))
    return tap, socket.if_nametoindex("out0")


@pytest.mark.parametrize("family", [4, 6])
def test_of_real_sockets_whose_data_must_live(hosts, family):  # noqa: F811
    """At the target's egress: super-segments leave as one short datagram each, and what TCP
    keeps of them is untouched, for it is what the client gets afterwards."""
    stream = os.urandom(300_000)
    listener, port = listening(hosts, family)
    with contextlib.ExitStack() as stack:
        stack.callback(listener.close)
        tap, ifindex = _way_out(stack)
        tap.setblocking(False)
        program = Intercept("tc", expression=f"tcp src port {port}", redirect_away=True)
        stack.callback(program.close)
        program.maps["relays"].update(bytes(4), entry(family, ifindex))
        attachment = attach(program.module, "srv", Hook.TC_EGRESS)
        stack.callback(attachment.close)
        hosts.enter(hosts.cli)
        client = stack.enter_context(socket.create_connection((SERVER[family][1], port), 10))
        peer = stack.enter_context(listener.accept()[0])
        client.settimeout(20)
        program.set_default(RELAY)
        sender = threading.Thread(target=peer.sendall, args=(stream,))
        sender.start()
        frames = []

        def read():
            with contextlib.suppress(BlockingIOError):
                while True:
                    frames.append(tap.recv(1 << 17))
            return len(frames) >= 3

        wait_for(read)
        program.set_default(PASS)
        received = b""
        while len(received) < len(stream):
            received += client.recv(1 << 20)
        sender.join()
        attachment.close()
        read()
        counts = program.counts()
    assert received == stream
    segments = [check_datagram(frame, family) for frame in frames]
    assert max(segment.seg_len for segment in segments) > 1448, "no super-segment"
    assert all(segment.kind == KIND_TARGET for segment in segments)
    first, second = segments[:2]
    assert second.seq == first.seq + first.seg_len & 0xFFFFFFFF
    assert counts[InterceptCount.RELAYED] == len(segments)
    assert counts[InterceptCount.CAPTURED] == 0
