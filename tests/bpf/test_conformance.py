"""Both executors of the session rules send the same, by the same scripts: see conformance.py.

And after every line the kernel's sessions stand where the engine's do: see states.py.
"""

from collections import Counter
from pathlib import Path

import pytest

from pycopy.session.fields import KernelSession
from tests.bpf.conformance import Pair
from tests.bpf.fastpath import Programs
from tests.bpf.harness import Namespaces
from tests.bpf.states import KERNELS_OWN
from tests.sessions.runner import Failed

SESSIONS = Path(__file__).parents[1] / "sessions"
SCRIPTS = sorted(str(path.relative_to(SESSIONS)) for path in SESSIONS.glob("*/*.pkt"))

#: These the kernel brings to their end alone: handing over everything is no way to pass.
ALONE = {
    "capture/captured_twice.pkt",
    "capture/client_keepalive.pkt",
    "capture/urgent_ecn_and_push.pkt",
    "close/client_closes_first.pkt",
    "close/fin_acked_while_rest_is_lost.pkt",
    "close/fin_with_data_both_ways.pkt",
    "close/half_close_not_reset.pkt",
    "close/keepalive_probe_answered.pkt",
    "close/repeated_fin_in_time_wait.pkt",
    "close/simultaneous.pkt",
    "close/target_closes_first.pkt",
    "early_close/nothing_left_to_send.pkt",
    "handshake/data_before_the_answer.pkt",
    "handshake/options_are_negotiated.pkt",
    "handshake/third_ack_lost.pkt",
    "limits/end_of_the_run.pkt",
    "options/timestamps_are_echoed.pkt",
    "release/held_request_leaves_with_the_answer.pkt",
    "release/longer_answer.pkt",
    "release/overtaken_ack_of_a_held_close.pkt",
    "release/pipelined_not_held.pkt",
    "release/server_first_no_stall.pkt",
    "release/target_that_ended_frees_all.pkt",
    "release/without_waiting.pkt",
    "reset/syn_in_established.pkt",
    "retransmit/delayed_ack.pkt",
    "retransmit/old_ack.pkt",
    "retransmit/window_update_is_no_duplicate_ack.pkt",
    "reuse/same_client_port_two_services.pkt",
    "window/old_segment_does_not_change_it.pkt",
    "window/window_taken_back.pkt",
}

#: A session of the kernel's has its outcome when both sides have closed, and a RST in TIME_WAIT
#: does not change it (RFC 1337): what is sent is the same, what is counted is not.
ONLY_SENT = {
    "close/simultaneous.pkt",
    "reset/client_resets_in_time_wait.pkt",
    "reset/target_resets_in_time_wait.pkt",
}

FAMILIES = pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])


@pytest.fixture(scope="module")
def programs():
    namespaces = Namespaces()
    namespaces.new()
    made = Programs()
    yield made
    made.close()
    namespaces.close()


def run(name, family, programs, **more):
    script = Pair((SESSIONS / name).read_text(), family, programs, **more)
    try:
        script.run()
        script.clean()
    except Failed as failure:
        pytest.fail(f"{name}\n{failure}", pytrace=False)
    return script


@FAMILIES
@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name, family, programs):
    script = run(name, family, programs, only_sent=name in ONLY_SENT)
    assert script.alone or name not in ALONE, f"left to user space: {script.left()}"


@FAMILIES
@pytest.mark.parametrize("name", SCRIPTS)
def test_script_while_sessions_change_hands(name, family, programs):
    script = run(name, family, programs, shuttle=True)
    assert not script.alone or not script.connections


def test_share_of_the_kernel(programs, record_property):
    """How much of the scripts, which are mostly about what is unusual, the kernel takes."""
    scripts = [run(name, 4, programs, only_sent=name in ONLY_SENT) for name in SCRIPTS]
    kernel = sum(script.in_kernel for script in scripts)
    user = sum(sum(script.user.values()) for script in scripts)
    direct = sum(script.direct for script in scripts)
    alone = sum(script.alone for script in scripts)
    said = f"{alone} of {len(scripts)} scripts wholly in the kernel; segments: "
    said += f"{kernel} in the kernel, {user} in user space, {direct} too long for a test run"
    print(said)
    record_property("share", said)
    compared = sum((script.comparison.compared for script in scripts), Counter())
    assert set(compared) == set(KernelSession._fields) - set(KERNELS_OWN)
    assert sum(compared.values()) > 30_000
    assert alone >= len(ALONE)
    assert kernel > user
    assert direct <= 17
