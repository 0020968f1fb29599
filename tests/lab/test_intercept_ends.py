"""When an intercept ends, real clients must not get the target's answers instead of it.

What reaches the clients is seen on their own interface, with a packet socket.
"""

import signal
import socket
import time

import pytest

from pycopy.lab.copying import Placement, Program

intercepted = pytest.mark.parametrize(
    "placement", [Placement.TARGET, Placement.ASSISTANT], ids=lambda one: one.value
)
ETH_P_ALL = 0x0003
PACKET_OUTGOING = 4
LOAD = {"short": 31, "rate": 300, "answers": (1, 1009, 100_003), "concurrency": 7}


class Sniffer:
    """Counts TCP segments over IPv4 with ``port`` as source or destination on a role's eth0."""

    def __init__(self, lab, role, *, source=0, destination=0):
        self._ports = source, destination
        self.seen = []
        with lab.inside(role):
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._sock.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        self._sock.bind(("eth0", ETH_P_ALL))
        self._sock.setblocking(False)

    def look(self):
        """Segments that came in, so far."""
        while True:
            try:
                frame, (_, _, kind, _, _) = self._sock.recvfrom(128)
            except BlockingIOError:
                return len(self.seen)
            if kind == PACKET_OUTGOING or frame[12:14] != b"\x08\x00" or frame[23] != 6:
                continue
            ports = frame[34:38]
            source, destination = (int.from_bytes(ports[at : at + 2], "big") for at in (0, 2))
            if self._ports[0] == source or self._ports[1] == destination:
                self.seen.append((source, destination, frame[47]))

    def close(self):
        self._sock.close()


@pytest.fixture
def sniff(lab):
    made = []

    def make(role, **ports):
        made.append(Sniffer(lab, role, **ports))
        return made[-1]

    yield make
    for sniffer in made:
        sniffer.close()


@pytest.fixture
def forwarding(lab):
    """Without a program the assistant would hand the answers on."""
    lab.set_forwarding(True)
    yield
    lab.set_forwarding(False)


def again(lab, run):
    """Start the intercept once more, as it was."""
    old = run.copying.intercepts[0]
    new = run.copying.intercepts[0] = Program(lab, old.role, old.arguments)
    new.start()
    return new


@intercepted
def test_a_stopped_intercept_leaves_no_answer_for_the_clients(
    scenario, lab, sniff, forwarding, placement
):
    run = scenario(placement, 4).start()
    at_clients = sniff("client", source=8080)
    at_target = sniff("target", destination=8080)
    load = run.load(6007, 601, wait=False, **LOAD)
    assert run.eventually(lambda: run.copied_count() > 101)
    at_target.look()
    intercept, replay = run.copying.intercepts[0], run.copying.replays[0]
    ended = intercept.stop(signal.SIGTERM)
    assert ended["balanced"] is True
    assert at_target.look() > 0
    assert "has been stopped there" in replay.messages
    before = at_target.look()
    # Longer than the target's retransmission timers, while the clients go on.
    until_s = time.monotonic() + 3
    while time.monotonic() < until_s:
        assert load.running
        assert at_clients.look() == 0, at_clients.seen[:5]
        time.sleep(0.05)
    assert at_target.look() == before
    # And back: copying goes on, with connections that are there already as with new ones.
    copied = run.copied_count()
    again(lab, run)
    assert run.eventually(lambda: run.copied_count() > copied + 101, 15), replay.messages
    assert at_clients.look() == 0, at_clients.seen[:5]
    run.checked(load, 6007)
    outcome = run.copying.stop()
    assert outcome.balanced
    ledger = outcome.replays[0]["ledger"]
    assert ledger["segments"]["refused_no_intercept"] > 0
    assert ledger["sessions"]["ended_intercept_ended"] > 0
    assert at_clients.look() == 0, at_clients.seen[:5]
    assert run.attached() == []


@intercepted
def test_after_kill_9_of_the_intercept_replay_is_silent_until_it_is_back(
    scenario, lab, sniff, forwarding, placement
):
    run = scenario(placement, 4).start()
    load = run.load(6007, 601, wait=False, **LOAD)
    assert run.eventually(lambda: run.copied_count() > 101)
    intercept, replay = run.copying.intercepts[0], run.copying.replays[0]
    intercept.kill()
    assert run.eventually(lambda: "trying again" in replay.messages)
    # Only what replay sends: real clients that get an answer now answer with a reset.
    from_online = _Sources(lab, sniff)
    until_s = time.monotonic() + 2
    while time.monotonic() < until_s:
        assert load.running
        time.sleep(0.05)
    assert from_online.count() == 0
    copied = run.copied_count()
    again(lab, run)
    assert run.eventually(lambda: run.copied_count() > copied + 101, 15), replay.messages
    run.checked(load, 6007)
    outcome = run.copying.stop()
    assert outcome.balanced
    assert outcome.replays[0]["ledger"]["sending"]["error_NO_INTERCEPT"] > 0
    assert run.attached() == []


class _Sources:
    """Frames for the target's port that come from the online host, by their link address."""

    def __init__(self, lab, sniff):
        self._mac = lab.run("online", ["cat", "/sys/class/net/eth0/address"]).stdout.strip()
        self._mac = bytes.fromhex(self._mac.replace(":", ""))
        with lab.inside("target"):
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._sock.bind(("eth0", ETH_P_ALL))
        self._sock.setblocking(False)

    def count(self):
        seen = 0
        with self._sock:
            while True:
                try:
                    frame = self._sock.recv(128)
                except BlockingIOError:
                    return seen
                ours = frame[6:12] == self._mac and frame[12:14] == b"\x08\x00"
                seen += ours and frame[36:38] == (8080).to_bytes(2, "big")
