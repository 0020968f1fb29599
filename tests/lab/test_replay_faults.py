"""What must not happen whatever happens: kill -9, hostile packets, garbage on the channel.

The measure is always the same: the online service's own answers are byte for byte those it
gives without pycopy, and nothing stays attached anywhere.
"""

import random
import signal
import socket

import pytest

from pycopy.lab.content import http_request
from pycopy.lab.copying import Placement

everywhere = pytest.mark.parametrize("placement", list(Placement), ids=lambda one: one.value)
intercepted = pytest.mark.parametrize(
    "placement", [Placement.TARGET, Placement.ASSISTANT], ids=lambda one: one.value
)
families = pytest.mark.parametrize("family", (4, 6))
CHANNEL_PORT = 36524
LOAD = {"short": 31, "rate": 700, "answers": (1, 1009, 100_003)}


@everywhere
def test_kill_9_of_replay(scenario, placement):
    run = scenario(placement, 4)
    plain = run.load(701, 101, **LOAD)
    run.start()
    assert run.attached()
    load = run.load(701, 101, wait=False, **LOAD)
    assert run.eventually(lambda: run.copied_count() > 101)
    run.copying.replays[0].kill()
    assert run.eventually(lambda: not _on(run, "online"), 1)
    assert run.checked(load, 701)["answers_sha256"] == plain["answers_sha256"]
    for intercept in run.copying.intercepts:
        assert intercept.stop()["balanced"] is True
    assert run.attached() == []


@intercepted
def test_kill_9_of_intercept(scenario, placement):
    run = scenario(placement, 4)
    plain = run.load(701, 101, **LOAD)
    run.start()
    load = run.load(701, 101, wait=False, **LOAD)
    assert run.eventually(lambda: run.copied_count() > 101)
    run.copying.intercepts[0].kill()
    assert run.eventually(lambda: not _on(run, placement.value), 1)
    assert run.checked(load, 701)["answers_sha256"] == plain["answers_sha256"]
    replay = run.copying.replays[0].process
    if replay.poll() is None:
        replay.send_signal(signal.SIGINT)
    # Losing every intercept may end replay as a failure; it must end, and say which.
    assert replay.wait(timeout=20) in (0, 1)
    assert run.attached() == []


@everywhere
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_a_signal_in_full_flow(scenario, placement, number):
    """The clients go on; what was captured is accounted for, and the service is untouched."""
    run = scenario(placement, 4)
    plain = run.load(701, 101, **LOAD)
    run.start()
    load = run.load(701, 101, wait=False, **LOAD)
    assert run.eventually(lambda: run.copied_count() > 101)
    results = [program.stop(number) for program in reversed(run.copying.programs)]
    assert all(result["balanced"] is True for result in results), results
    assert run.checked(load, 701)["answers_sha256"] == plain["answers_sha256"]
    assert run.attached() == []


@pytest.mark.parametrize("family", (4, 6))
def test_hostile_packets_at_the_online_host(scenario, lab, family):
    """Truncated, contradictory and fragmented packets are counted, and copying goes on."""
    run = scenario(Placement.SELF, family).start()
    load = run.load(503, 101, wait=False, short=31, rate=500, id="good")
    _blast(lab, family, 1009)
    run.checked(load, 503)
    # Broken packets may look like the middle of a connection and be replayed as one: what
    # the target makes of those is not compared.
    run.eventually(lambda: run.copied().matching("id=good").count == 503)
    outcome = run.copying.stop()
    assert outcome.balanced, outcome
    assert run.copied().matching("id=good").requests == run.asked().matching("id=good").requests
    assert run.attached() == []


@intercepted
def test_garbage_on_the_channel_port(scenario, lab, placement):
    run = scenario(placement, 4).start()
    load = run.load(503, 101, wait=False, short=31, rate=500)
    noise = random.Random(23)
    for payload in (
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes(1009),
        b"\xff" * 1009,
        noise.randbytes(10_007),
        *(noise.randbytes(noise.randrange(1, 53)) for _ in range(23)),
    ):
        with lab.inside("client"):
            sock = socket.socket()
        with sock:
            sock.settimeout(2)
            sock.connect((lab.address(placement.value, 4), CHANNEL_PORT))
            try:
                sock.sendall(payload)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(4096):
                    pass
            except (ConnectionError, TimeoutError):
                pass  # cut off: one of the right answers to garbage
    run.checked(load, 503)
    run.finish()


@intercepted
@pytest.mark.parametrize("family", (4, 6))
def test_a_client_whose_port_is_the_channels(scenario, lab, placement, family):
    """Its copies' responses go to that port, and are responses all the same."""
    run = scenario(placement, family).start()
    with lab.inside("client"):
        sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6)
    with sock:
        sock.settimeout(5)
        sock.bind((lab.address("client", family), CHANNEL_PORT))
        sock.connect((lab.address("online", family), 80))
        sock.sendall(http_request("channel", 1009, close=True))
        while sock.recv(4096):
            pass
    run.finish()


def _on(run, role):
    return [line for line in run.attached() if line.startswith(f"{role}:")]


def _blast(lab, family, count):
    """Send ``count`` broken frames from the client to port 80 of the online host."""
    from scapy.layers.inet import IP, TCP
    from scapy.layers.inet6 import IPv6
    from scapy.layers.l2 import Ether

    noise = random.Random(97)
    shown = lab.run("online", ["cat", "/sys/class/net/eth0/address"]).stdout.strip()
    network = IP if family == 4 else IPv6
    # Not an address of any client of the load: nobody answers for these.
    source = lab.address("client", family, 97)
    with lab.inside("client"):
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with raw:
        raw.bind(("eth0", 0))
        for number in range(count):
            options = [("MSS", 1460), ("Timestamp", (number, 0))]
            header = TCP(
                sport=noise.randrange(1024, 65536), dport=80, seq=noise.getrandbits(32),
                flags=noise.randrange(256), dataofs=noise.choice((None, 0, 1, 4, 6, 15)),
                options=noise.choice(([], options)),
            )  # fmt: skip
            body = noise.randbytes(noise.choice((0, 1, 7, 211, 1009)))
            where = network(src=source, dst=lab.address("online", family))
            if family == 4 and number % 7 == 0:
                where.flags, where.frag = noise.choice((("MF", 0), ("MF", 23), (0, 23)))
            if family == 4 and number % 11 == 0:
                where.len = noise.choice((0, 19, 21, 39, 65535))
            frame = bytearray(bytes(Ether(dst=shown) / where / header / body))
            if number % 3 == 0:
                frame = frame[: noise.randrange(14, len(frame) + 1)]
            if number % 5 == 0:
                place = noise.randrange(14, len(frame)) if len(frame) > 14 else 13
                frame[place] ^= 1 << noise.randrange(8)
            raw.send(bytes(frame))


@families
def test_a_service_that_starts_after_the_intercept(scenario, family):
    """Started first it cannot know that it is on the target; it must notice."""
    run = scenario(Placement.TARGET, family)
    for server in run.target:
        server.stop()
    run.copying.intercepts[0].start()
    assert "this is the assistant" in run.copying.intercepts[0].messages
    for server in run.target:
        server.start()
    run.copying.replays[0].start()
    assert "this is the target now" in run.copying.intercepts[0].messages
    run.watch_resets()
    run.load(101, 23, short=7)
    run.finish()
