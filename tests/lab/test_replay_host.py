"""The online host goes on with its own business while it is copied."""

import socket

import pytest

from pycopy.errors import PycopyError
from pycopy.lab.copying import Placement, Program, wait_settled
from pycopy.lab.topology import DEVICE

families = pytest.mark.parametrize("family", (4, 6))


def ask(address, port, source_port=0, size=1009):
    """GET from this process's namespace; the body."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
        sock.settimeout(5)
        sock.bind(("", source_port))
        sock.connect((address, port))
        sock.sendall(f"GET /b/{size} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while part := sock.recv(65536):
            answer += part
    return answer.partition(b"\r\n\r\n")[2]


@families
def test_its_own_connections_to_the_target_on_ports_of_the_copies(scenario, lab, family):
    """What a copy does not use at this moment is not touched, whatever the port."""
    run = scenario(Placement.SELF, family, replay_arguments=("--ports", "20001-20960")).start()
    load = run.load(503, 101, wait=False, short=31, rate=400, id="copied")
    with lab.inside("online"):
        for port in range(20_101, 20_960, 13):
            assert len(ask(lab.address("target", family), 8080, port)) == 1009
    run.checked(load, 503)
    run.settle(2)
    assert run.copying.stop().balanced
    assert run.copied().matching("id=copied").count == 503


@pytest.mark.parametrize("forwarded", [False, True])
def test_what_is_only_routed_through_is_copied_on_demand(scenario, lab, forwarded):
    """Port 80 of somebody else, as from a container or on a gateway."""
    options = ("--forwarded",) if forwarded else ()
    run = scenario(Placement.SELF, 4, replay_arguments=options).start()
    other = lab.address("online2", 4)
    lab.run("online", ["sysctl", "-q", "-w", "net.ipv4.ip_forward=1"])
    lab.run("client", ["ip", "route", "add", other, "via", lab.address("online", 4)])
    try:
        with lab.inside("client"), pytest.raises(ConnectionRefusedError):
            ask(other, 80)
        run.load(11, 5)
        run.settle()
        ledger = run.copying.stop().replays[0]["ledger"]
    finally:
        lab.run("client", ["ip", "route", "del", other, "via", lab.address("online", 4)])
        lab.run("online", ["sysctl", "-q", "-w", "net.ipv4.ip_forward=0"])
    assert ledger["sessions"]["opened"] == 5 + forwarded


def test_an_address_added_later_is_copied_too(scenario, lab):
    run = scenario(Placement.SELF, 4).start()
    added = "10.91.2.77"
    lab.run("online", ["ip", "address", "add", f"{added}/24", "dev", DEVICE])
    try:
        # Looked at once a second.
        assert run.eventually(lambda: _copied_from(run, lab, added), 5)
    finally:
        lab.run("online", ["ip", "address", "del", f"{added}/24", "dev", DEVICE])
    assert run.copying.stop().balanced


def _copied_from(run, lab, address):
    with lab.inside("client"):
        ask(address, 80)
    return run.copied_count() > 0


def test_a_link_to_the_target_that_is_made_anew(scenario, lab):
    """The responses are swallowed on the new device as they were on the old."""
    run = scenario(Placement.SELF, 4)
    near, far = "10.99.1.1", "10.99.1.2"

    def plug():
        lab.run("online", ["ip", "link", "add", "way0", "type", "veth", "peer", "name", "way1",
                           "netns", lab.namespace("target")])  # fmt: skip
        lab.run("online", ["ip", "address", "add", f"{near}/24", "dev", "way0"])
        lab.run("online", ["ip", "link", "set", "way0", "up"])
        lab.run("target", ["ip", "address", "add", f"{far}/24", "dev", "way1"])
        lab.run("target", ["ip", "link", "set", "way1", "up"])

    plug()
    program = run.copying.replays[0]
    program.arguments[program.arguments.index("-x") + 1] = f"80-{far}:8080"
    try:
        run.start()
        run.load(101, 23, id="before")
        run.settle()
        assert run.copied().matching("id=before").count == 101
        lab.run("online", ["ip", "link", "del", "way0"])
        plug()
        assert run.eventually(lambda: "way0" in program.messages, 5)
        assert run.eventually(lambda: _again(run), 15), program.messages
        assert run.copying.stop().balanced
    finally:
        lab.run("online", ["ip", "link", "del", "way0"])


def _again(run):
    before = run.copied_count()
    run.load(23, 5, id="after")
    return run.eventually(lambda: run.copied_count() >= before + 23, 1)


def test_two_replays_on_one_host(scenario, lab):
    """The second one is told to take ports of its own; then both copy everything."""
    run = scenario(Placement.SELF, 4, replay_arguments=("--ports", "20001-20500")).start()
    target = lab.address("target", 4)
    line = ["replay", "-x", f"80-{target}:8080", "-i", DEVICE, "--json", "--ports"]
    clash = Program(lab, "online", [*line, "20400-20900"])
    with pytest.raises(PycopyError, match="another replay on this host"):
        clash.start()
    second = Program(lab, "online", [*line, "20501-20900"])
    second.start()
    run.load(211, 23)
    wait_settled(run.copied_count, 422)
    assert second.stop()["balanced"]
    assert run.copying.stop().balanced
    assert run.copied_count() == 422


def test_silence_of_the_target_is_told(scenario, lab):
    """No route on the target, the commonest fault: the ledger balances, but nothing is copied."""
    run = scenario(Placement.ASSISTANT, 4)
    for program in run.copying.programs:
        program.start()  # and no route
    run.load(5, 5)
    replay = run.copying.replays[0]
    assert run.eventually(lambda: "no answer yet from" in replay.messages, 8), replay.messages
    assert "ip route get" in replay.messages
    assert run.copying.stop().balanced
