"""Real HTTP between real nginx, copied live: every placement, both families, nothing lost."""

import pytest

from pycopy.lab.copying import Placement

everywhere = pytest.mark.parametrize("placement", list(Placement), ids=lambda one: one.value)
families = pytest.mark.parametrize("family", (4, 6))


@everywhere
@families
def test_short_connections(scenario, placement, family):
    run = scenario(placement, family).start()
    run.load(1009, 1009, short=1009, rate=1000, answers=(1, 1009))
    run.finish()


@everywhere
@families
def test_keep_alive(scenario, placement, family):
    run = scenario(placement, family).start()
    run.load(2003, 23, rate=2000, answers=(1, 1009, 10007))
    run.finish()


@everywhere
def test_the_drain_delivers_what_was_captured(scenario, placement):
    """Replay is told to stop the moment the clients are done, not when the target is."""
    run = scenario(placement, 4).start()
    run.load(1009, 211, short=101, rate=2000, close="client", answers=(1, 10007))
    run.finish(settle=False)


@everywhere
def test_clients_that_reset(scenario, placement):
    run = scenario(placement, 4).start()
    run.load(503, 503, short=503, rate=1000, close="reset", answers=(1, 1009))
    run.finish(resets=True)


@everywhere
def test_a_slow_target_gets_everything(scenario, placement):
    """Its answers take longer than the online server's by three orders of magnitude."""
    run = scenario(placement, 4, servers=((80, "http"),), delay_s=0.05).start()
    run.load(211, 23, rate=1000, answers=(1, 1009))
    run.finish()


def test_a_copy_changes_nothing_that_clients_see(scenario):
    run = scenario(Placement.SELF, 4)
    plain = run.load(503, 101, short=53, rate=1000, answers=(1, 1009, 100_003))
    run.start()
    for server in run.online:
        server.forget()
    copied = run.load(503, 101, short=53, rate=1000, answers=(1, 1009, 100_003))
    run.finish()
    assert copied["answers_sha256"] == plain["answers_sha256"]


@pytest.mark.parametrize("forward", [False, True], ids=["ip_forward off", "ip_forward on"])
def test_the_assistant_is_a_black_hole_whatever_ip_forward_says(scenario, lab, forward):
    lab.set_forwarding(forward)
    try:
        run = scenario(Placement.ASSISTANT, 4).start()
        run.load(211, 101, short=53, rate=500)
        run.finish()
    finally:
        lab.set_forwarding(False)
