"""One particular segment is lost: how long until the target has everything.

The times are those of RFC 6298 with Linux' minimum of 0.2 s: a lost SYN costs a second,
the last segment of a burst one retransmission timeout, anything before it next to nothing.
"""

import time

import pytest

from pycopy.kernel.attach import Hook
from pycopy.lab.copying import Placement
from pycopy.wire.segment import ACK, FIN, SYN
from tests.lab.dial import Client
from tests.lab.impair import PASS_UNSEEN, PER_MILLION, Impairment, impair_leg
from tests.lab.runs import account, run_impaired, settle

REPLAY, INTERCEPT = "replay to target", "target to intercept"

#: What is lost, on which leg, how often, and within which time all is well again.
CASES = {
    "the SYN": (REPLAY, {"flags": SYN}, 1, 1.3),
    "the SYN, twice": (REPLAY, {"flags": SYN}, 2, 3.4),
    "the third ACK": (REPLAY, {"flags": ACK}, 1, 0.3),
    "a request": (REPLAY, {"payload_bytes": 1}, 1, 0.5),
    "a request, three times": (REPLAY, {"payload_bytes": 1}, 3, 1.9),
    "a segment of an upload": (REPLAY, {"payload_bytes": 1, "skip": 23}, 1, 0.3),
    "a segment of an upload and its repetition": (REPLAY, {"payload_bytes": 1, "skip": 67}, 2, 0.9),
    "the last segment of an upload": (REPLAY, {"payload_bytes": 1, "skip": 70}, 1, 0.5),
    "the FIN": (REPLAY, {"flags": FIN}, 1, 0.5),
    "the SYN-ACK": (INTERCEPT, {"flags": SYN}, 1, 1.3),
    "an answer": (INTERCEPT, {"payload_bytes": 1}, 1, 0.5),
    "an acknowledgement": (INTERCEPT, {"flags": ACK, "skip": 2}, 1, 0.5),
    "the target's FIN": (INTERCEPT, {"flags": FIN}, 1, 0.5),
}


@pytest.fixture(scope="module", autouse=True)
def _no_offloads(lab):
    lab.set_offloads(False)


@pytest.mark.alone
@pytest.mark.parametrize("placement", [Placement.SELF, Placement.TARGET], ids=lambda p: p.value)
def test_time_to_recover(scenario, lab, request, placement):
    run = scenario(placement, 4, servers=((80, "http"),)).start()
    slow = {}
    for number, (name, (leg, what, times, limit_s)) in enumerate(CASES.items()):
        impairment = impair_leg(lab, placement, leg, drop_ppm=PER_MILLION, budget=times, **what)
        with impairment:
            client = Client(lab, 4, 80)
            client.ask(f"first{number}", 1009)
            client.ask(f"second{number}", 1009, 100_003)
            client.ask(f"third{number}", 1009)
            client.close()
            recovered_s = settle(run, number + 1)
        assert impairment.final["dropped"] == times, f"{name}: {impairment.final}"
        row = f"{name} is lost ({placement.value})", 3, 3, 0, round(recovered_s, 2)
        request.node.user_properties.append(("row", row))
        if recovered_s > limit_s:
            slow[name] = recovered_s
    account(run, request, f"all of these ({placement.value})", 0, resets=True)
    assert not slow


def test_a_target_far_away(scenario, lab, request):
    """20 ms each way, and 1 % loss, on both legs; the online server answers at once."""
    run_impaired(
        scenario, Placement.SELF, request, "20 ms each way and 1 % loss",
        lambda: [
            impair_leg(lab, Placement.SELF, leg, drop_ppm=10_000, hold_ppm=990_000, hold_s=0.02)
            for leg in (REPLAY, INTERCEPT)
        ],
    )  # fmt: skip


def test_what_the_capture_misses_ends_a_session_in_bounded_time(scenario, lab, request):
    """The online server gets a segment that we do not: nobody will repeat it for us.

    That request is lost, and no other: what comes behind it goes over a new connection.
    """
    run = scenario(Placement.SELF, 4, servers=((80, "http"),)).start()
    client, other = Client(lab, 4, 80), Client(lab, 4, 80, index=1)
    client.ask("before", 1009)
    with Impairment(
        lab, "online", hook=Hook.TC_INGRESS, destination_port=80, payload_bytes=1, skip=23,
        drop_ppm=PER_MILLION, budget=1, verdict=PASS_UNSEEN,
    ) as unseen:  # fmt: skip
        client.ask("gap", 1009, 100_003)
        assert unseen.counts()["dropped"] == 1
    began = time.monotonic()
    client.ask("behind", 1)
    for number in range(101):
        other.ask(f"other{number}", 1009)
    assert run.eventually(lambda: run.copied().matching("other").count == 101)
    assert run.eventually(lambda: run.copied().matching("behind").count, 20)
    gone_s = time.monotonic() - began
    client.ask("after", 1)
    client.close()
    other.close()
    assert run.eventually(lambda: run.copied().connections.total() == 3)
    asked, copied = run.asked(), run.copied()
    lost = asked.lost(copied)
    row = "a segment the capture missed", asked.count, copied.count, lost.total(), round(gone_s, 2)
    request.node.user_properties.append(("row", row))
    assert lost.total() == 1
    assert "gap" in next(iter(lost))
    assert not asked.surplus(copied)
    assert gone_s < 15
    outcome = run.copying.stop()
    assert outcome.replays[0]["ledger"]["sessions"]["ended_gap"] == 1, outcome
    assert outcome.balanced, outcome
    assert run.attached() == []


def test_a_syn_that_the_capture_missed(scenario, lab, request):
    """The session begins at the first request: it was the first the client ever said."""
    run = scenario(Placement.SELF, 4, servers=((80, "http"),)).start()
    time.sleep(0.3)  # a connection that speaks sooner might be in the middle of a request
    with Impairment(
        lab, "online", hook=Hook.TC_INGRESS, destination_port=80, flags=SYN,
        drop_ppm=PER_MILLION, budget=1, verdict=PASS_UNSEEN,
    ):  # fmt: skip
        client = Client(lab, 4, 80)
        for number in range(11):
            client.ask(f"r{number}", 1009, 10_007)
        client.close()
        recovered_s = settle(run, 1)
    account(run, request, "a SYN the capture missed", recovered_s)
