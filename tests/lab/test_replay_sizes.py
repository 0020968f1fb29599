"""Requests of 1 B to 1 MB, answers of 1 B to 10 MB, with offloads and without.

The servers log a digest of every body and of every connection's whole stream, so equal
logs mean that the target was sent exactly the bytes the online server was sent.
"""

import signal

import pytest

from pycopy.lab.copying import Placement

everywhere = pytest.mark.parametrize("placement", list(Placement), ids=lambda one: one.value)
families = pytest.mark.parametrize("family", (4, 6))


@pytest.fixture(params=[True, False], ids=["offloads", "no offloads"])
def offloads(lab, request):
    lab.set_offloads(request.param)
    yield request.param
    lab.set_offloads(True)


@everywhere
@families
def test_requests_of_1_byte_to_1_megabyte(scenario, placement, family, offloads):
    run = scenario(placement, family, servers=((80, "http"),)).start()
    run.load(
        53, 11, concurrency=4, answers=(1, 1009),
        uploads=(1, 2, 1447, 1448, 1449, 16_384, 65_521, 300_007, 1_000_003),
    )  # fmt: skip
    run.finish()


@everywhere
@families
def test_answers_of_1_byte_to_10_megabytes(scenario, placement, family, offloads):
    sizes = (1, 1009, 100_003, 1_000_003, 10_000_019)
    run = scenario(placement, family, sizes=sizes).start()
    run.load(23, 7, concurrency=3, answers=sizes)
    run.finish()


@everywhere
def test_a_small_mtu_on_the_way_to_the_target(scenario, lab, placement):
    """Captured segments are larger than the path takes: cut, never refused."""
    for role in ("target", "assistant"):
        lab.run(role, ["ip", "link", "set", "dev", "eth0", "mtu", "1300"])
    lab.run("online", ["ip", "route", "change", lab.prefix("target", 4), "dev", "eth0",
                       "scope", "link", "mtu", "1300"])  # fmt: skip
    try:
        run = scenario(placement, 4, servers=((80, "http"),)).start()
        run.load(23, 7, concurrency=3, answers=(1, 10_007), uploads=(1, 10_007, 300_007))
        run.finish()
    finally:
        lab.run("online", ["ip", "route", "change", lab.prefix("target", 4), "dev", "eth0",
                           "scope", "link"])  # fmt: skip
        for role in ("target", "assistant"):
            lab.run(role, ["ip", "link", "set", "dev", "eth0", "mtu", "1500"])


def test_a_burst_while_replay_has_no_cpu(scenario):
    """It waits in the ring, and moves to memory when there is no end of it."""
    run = scenario(
        Placement.SELF, 4, servers=((80, "http"),),
        replay_arguments=("--no-fastpath", "--ring", "32M"),
    ).start()  # fmt: skip
    replay = run.copying.replays[0].process
    replay.send_signal(signal.SIGSTOP)
    try:
        run.load(17, 5, uploads=(1_000_003,), answers=(1, 1009))
    finally:
        replay.send_signal(signal.SIGCONT)
    run.load(17, 5, uploads=(1_000_003,), answers=(1, 1009))
    run.finish()
