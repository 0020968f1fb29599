"""Records by perf ring buffers: the same copies as by the BPF ring buffer, losses counted as there.

``pytest tests/lab --transport perf`` runs everything else so.
"""

import signal
import time

import pytest

from pycopy.lab.copying import Placement

PERF = ("--transport", "perf")
USER = (*PERF, "--no-fastpath")

everywhere = pytest.mark.parametrize("placement", list(Placement), ids=lambda one: one.value)
families = pytest.mark.parametrize("family", (4, 6))
either = pytest.mark.parametrize("options", [PERF, USER], ids=["fast path", "user space"])


@everywhere
@families
@either
def test_keep_alive_and_short_connections(scenario, placement, family, options):
    run = scenario(
        placement, family, replay_arguments=options, intercept_arguments=PERF
    ).start()  # fmt: skip
    run.load(1009, 211, short=101, rate=1000, answers=(1, 1009, 10_007))
    run.finish()


@everywhere
def test_requests_of_1_byte_to_1_megabyte(scenario, placement):
    run = scenario(
        placement, 4, servers=((80, "http"),), replay_arguments=USER, intercept_arguments=PERF
    ).start()  # fmt: skip
    run.load(
        31, 11, concurrency=4, answers=(1, 1009),
        uploads=(1, 2, 1447, 1448, 1449, 16_384, 65_521, 300_007, 1_000_003),
    )  # fmt: skip
    run.finish()


def test_a_ring_that_is_too_small_is_counted(scenario):
    """What found no room is `ring_full`, and the ledger balances."""
    run = scenario(
        Placement.SELF, 4, servers=((80, "http"),), replay_arguments=(*USER, "--ring", "64K")
    ).start()
    replay = run.copying.replays[0].process
    replay.send_signal(signal.SIGSTOP)
    try:
        run.load(5, 5, uploads=(1_000_003,), answers=(1,))
    finally:
        replay.send_signal(signal.SIGCONT)
    time.sleep(0.2)
    outcome = run.copying.stop()
    assert outcome.balanced, outcome
    kernel = outcome.replays[0]["ledger"]["kernel"]
    assert kernel["ring_full"] > 0 and kernel["captured"] > 0
    assert run.attached() == []
