"""What connections go through in life: half-closed, reset, reused, slow, answered otherwise.

Everything the client sent must be at the target, in the same connections where the target
lets it, and every session must end.
"""

import os
import signal
import threading
import time

import pytest

from pycopy.lab.content import http_request
from pycopy.lab.copying import Placement
from tests.lab import traffic
from tests.lab.dial import Client
from tests.lab.odd import LATE_S, Odd
from tests.lab.runs import account, settle

everywhere = pytest.mark.parametrize("placement", list(Placement), ids=lambda one: one.value)
#: Kept client addresses meet in the target's tables; ports of our own do not.
kept_and_own = pytest.mark.parametrize(
    "placement", [Placement.SELF, Placement.TARGET], ids=lambda one: one.value
)


@pytest.fixture
def odd(scenario, lab):
    """``odd(placement, family, target mode, online mode)``: a started scenario with these."""

    def make(placement, family, target, online=""):
        run = scenario(placement, family, servers=((80, "http"),))
        for servers, mode in ((run.target, target), (run.online, online)):
            if mode:
                servers[0].stop()
                servers[0] = Odd(lab, servers[0].role, servers[0].port, mode)
                servers[0].start()
        return run.start()

    return make


# -- targets that are slow, close, or speak otherwise -----------------------------------------


@kept_and_own
def test_a_target_that_pauses_in_its_answers(scenario, placement):
    """A busy host. Its silence is no end of an answer, and a close would cut off the rest."""
    size = 5_000_011
    run = scenario(placement, 4, sizes=(size,)).start()
    group = os.getpgid(run.target[0].pid)
    load = run.load(23, 7, concurrency=3, answers=(size,), wait=False)
    until = time.monotonic() + 20
    while run.copied_count() < 23 and time.monotonic() < until:
        os.killpg(group, signal.SIGSTOP)
        time.sleep(0.06)
        os.killpg(group, signal.SIGCONT)
        time.sleep(0.005)
    run.checked(load, 23)
    run.finish()


@kept_and_own
def test_a_target_that_reads_late(odd, lab, request, placement):
    """8 MB meet a closed window: probed, and the data goes on as soon as it opens."""
    run = odd(placement, 4, "late")
    client = Client(lab, 4, 80)
    began = time.monotonic()
    client.ask("late", 1009, 8_000_009)
    assert time.monotonic() - began < LATE_S  # the client notices nothing
    client.ask("after", 1)
    client.close()
    recovered_s = settle(run, 1)
    outcome = account(run, request, f"8 MB, target reads 3 s late ({placement.value})", recovered_s)
    assert recovered_s < LATE_S + 3
    assert outcome.replays[0]["ledger"]["sending"]["window_probes"]


@everywhere
def test_a_target_that_closes_after_every_answer(odd, request, placement):
    """Every request gets a connection of its own there; online they share a few."""
    run = odd(placement, 4, "closes")
    run.load(503, 23, rate=1000, answers=(1, 1009))
    outcome = account(
        run, request, f"target closes after every answer ({placement.value})",
        settle(run), connections=False,
    )  # fmt: skip
    assert outcome.replays[0]["ledger"]["sessions"]["reopened"] >= 503 - 23


def test_a_target_that_closes_in_the_face_of_a_fast_client(odd, request):
    run = odd(Placement.SELF, 4, "closes")
    run.load(503, 23, answers=(1, 1009), uploads=(0, 10_007))
    account(
        run, request, "target closes after every answer, fast clients, uploads",
        settle(run), connections=False,
    )  # fmt: skip


@everywhere
def test_a_target_that_greets_and_an_online_server_that_does_not(odd, request, placement):
    run = odd(placement, 4, "greets")
    run.load(503, 23, rate=1000, answers=(1, 1009))
    account(run, request, f"only the target greets ({placement.value})", settle(run, 23))


@pytest.mark.parametrize("mode", ["curt", "verbose"])
def test_a_target_with_answers_of_another_size(odd, request, mode):
    run = odd(Placement.SELF, 4, mode)
    run.load(503, 23, rate=1000, answers=(1009, 100_003))
    account(run, request, f"answers of other sizes ({mode})", settle(run, 23))


def test_a_target_that_never_answers(odd, lab):
    """What waits for it is held; with -W it is not, and the end is clean all the same."""
    run = odd(Placement.SELF, 4, "mute")
    client = Client(lab, 4, 80)
    client.ask("first", 1009)
    client.ask("second", 1009)
    assert run.eventually(lambda: run.copied_count() == 1)
    outcome = run.copying.stop()
    assert outcome.balanced
    client.close()


# -- half-closed connections ------------------------------------------------------------------


@everywhere
def test_a_client_that_closes_its_side_and_reads_on(odd, lab, request, placement):
    run = odd(placement, 4, "plain")
    clients = [Client(lab, 4, 80, index=index) for index in range(11)]
    for number, client in enumerate(clients):
        client.sock.sendall(http_request(f"half{number}", 1_000_003, 10_007))
        client.shut()
    for client in clients:
        client.read_answer(1_000_003)
        client.read_end()
        client.close()
    account(run, request, f"client half-closes ({placement.value})", settle(run, 11))


@everywhere
def test_a_server_that_closes_its_side_and_reads_on(odd, lab, request, placement):
    """Both servers do: the client goes on sending into the open half, and so does the copy."""
    run = odd(placement, 4, "half", "half")
    clients = [Client(lab, 4, 80, index=index) for index in range(11)]
    for number, client in enumerate(clients):
        client.ask(f"answered{number}", 1009)
        client.read_end()
    for number, client in enumerate(clients):
        client.sock.sendall(http_request(f"unanswered{number}", 1, 100_003))
        client.sock.sendall(http_request(f"last{number}", 1))
        client.close()
    account(run, request, f"server half-closes ({placement.value})", settle(run, 11))


# -- clients that reset ------------------------------------------------------------------------


@everywhere
def test_a_client_that_resets(scenario, lab, request, placement):
    """Idle, in the middle of an upload, in the middle of an answer; then all goes on."""
    run = scenario(placement, 4, servers=((80, "http"),)).start()
    traffic.clients_reset(lab)
    run.load(101, 11, id="after")
    recovered_s = settle(run)
    # Which bytes a server got to see before a reset is chance on either side.
    assert run.eventually(
        lambda: run.copied().connections.total() == run.asked().connections.total()
    )
    outcome = account(
        run, request, f"clients reset ({placement.value})", recovered_s, connections=False
    )
    ledger = outcome.replays[0]["ledger"]
    assert ledger["sessions"]["ended_client_reset"] == 33, ledger


# -- ports -------------------------------------------------------------------------------------


@everywhere
def test_one_client_port_towards_two_copied_ports(scenario, lab, request, placement):
    run = scenario(placement, 4, servers=((80, "http"), (81, "http"))).start()
    traffic.two_at_a_time(lab)
    account(run, request, f"one client port, two services ({placement.value})", settle(run, 46))


@everywhere
def test_one_client_port_towards_two_ports_copied_to_one(scenario, lab, request, placement):
    """The two connections would be one at the target: the second gets another port there."""
    run = scenario(placement, 4, servers=((80, "http"), (81, "http")))
    target = lab.address("target", 4)
    for replay in run.copying.replays:
        replay.arguments[2] = f"80-{target}:8080,81-{target}:8080"
    for intercept in run.copying.intercepts:
        place = intercept.arguments.index("-F") + 1
        intercept.arguments[place] = "tcp and src port 8080"
    run.start()
    traffic.two_at_a_time(lab)
    account(run, request, f"one client port, one target port ({placement.value})", settle(run, 46))


@kept_and_own
@pytest.mark.parametrize("ending", ["server closes", "client resets"])
def test_a_client_port_used_again_at_once(scenario, lab, request, placement, ending):
    run = scenario(placement, 4, servers=((80, "http"),)).start()
    # A server in TIME_WAIT may answer the new SYN for the old connection: reset, and again. The
    # other one may have taken that connection by then.
    run.only_spoken = True
    traffic.port_used_again(lab, reset=ending == "client resets")
    account(
        run, request, f"port used again, {ending} ({placement.value})", settle(run, 53), resets=True
    )


# -- joining -----------------------------------------------------------------------------------


@everywhere
def test_replay_started_while_connections_are_open(scenario, lab, request, placement):
    """Idle ones are joined at their next request, none of which is lost."""
    run = scenario(placement, 4, servers=((80, "http"),))
    clients = [Client(lab, 4, 80, index=index) for index in range(23)]
    for number, client in enumerate(clients):
        client.ask(f"before{number}", 1009)
    run.start()
    time.sleep(0.3)  # what is under way just now may be the rest of a request: not copied
    for round_ in range(3):
        for number, client in enumerate(clients):
            client.ask(f"after{number}.{round_}", 1009, 10_007 * (round_ == 1))
    for client in clients:
        client.close()
    for server in run.online:
        _forget_requests(server, "before")
    recovered_s = settle(run)
    outcome = account(
        run, request, f"joined while idle ({placement.value})", recovered_s, connections=False
    )
    assert outcome.replays[0]["ledger"]["sessions"]["mid_stream"] == 23


@everywhere
def test_replay_started_under_load(scenario, lab, request, placement):
    """Busy ones lose the request under way at most; from then on each is copied whole."""
    run = scenario(placement, 4, servers=((80, "http"),))
    clients = [Client(lab, 4, 80, index=index) for index in range(23)]
    rounds, last = 0, [1 << 30]

    def ask_on():
        nonlocal rounds
        while rounds < last[0]:
            for number, client in enumerate(clients):
                client.ask(f"r{rounds}.{number}", 1009, 1009)
            rounds += 1

    busy = threading.Thread(target=ask_on, daemon=True)
    busy.start()
    run.start()
    joined = rounds + 2  # the one under way is passed over, with the next each begins
    last[0] = joined + 23
    busy.join(20)
    for client in clients:
        client.close()
    wanted = {f"r{number}.{c}" for number in range(joined, rounds) for c in range(23)}

    def copied():
        return {text.split("id=")[1].split()[0] for text in run.copied().requests}

    run.eventually(lambda: wanted <= copied())
    missing = wanted - copied()
    row = f"joined under load ({placement.value})", len(wanted), "-", len(missing), "-"
    request.node.user_properties.append(("row", row))
    assert not missing
    assert not run.asked().surplus(run.copied())
    assert run.copying.stop().balanced
    assert run.attached() == []


def _forget_requests(server, text):
    log = server.dir / "access.log"
    kept = [line for line in log.read_text().splitlines(True) if text not in line]
    log.write_text("".join(kept))
