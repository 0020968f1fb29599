import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from pycopy.session.states import (
    FIN_IN_FLIGHT,
    MAY_RECEIVE,
    MAY_SEND,
    SAID_ALL,
    TRANSITIONS,
    Event,
    State,
)

ROOT = Path(__file__).parent.parent.parent

# RFC 9293 figure 5, the active opener's part, written down independently.
PATHS = {
    "we close first": "OPEN SYN_ACK FIN_SENT FIN_ACKED FIN_RECEIVED EXPIRED",
    "the target closes first": "OPEN SYN_ACK FIN_RECEIVED FIN_SENT FIN_ACKED",
    "both at once": "OPEN SYN_ACK FIN_SENT FIN_RECEIVED FIN_ACKED EXPIRED",
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_paths_of_rfc_9293_lead_from_closed_to_closed(path):
    state = State.CLOSED
    for name in path.split():
        state = TRANSITIONS[state, Event[name]]
    assert state is State.CLOSED


def test_the_table_is_complete_and_nothing_more():
    assert len(TRANSITIONS) == 11 + 2 * (len(State) - 1)
    reached = set(TRANSITIONS.values())
    assert reached == set(State)


def test_the_sets_agree_with_the_table():
    may_close = {state for state, event in TRANSITIONS if event is Event.FIN_SENT}
    assert may_close == MAY_SEND
    awaits_ack = {state for state, event in TRANSITIONS if event is Event.FIN_ACKED}
    assert awaits_ack == FIN_IN_FLIGHT
    takes_fin = {state for state, event in TRANSITIONS if event is Event.FIN_RECEIVED}
    assert takes_fin == MAY_RECEIVE
    assert not SAID_ALL & (MAY_SEND | MAY_RECEIVE) and State.CLOSED not in SAID_ALL
    assert len(SAID_ALL) == 3


def test_the_diagram_in_the_docs_is_the_table():
    spec = spec_from_file_location("make_diagram", ROOT / "docs/make_diagram.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs/states.md").read_text() == module.page()


def test_the_engine_is_sans_io():
    """In a fresh interpreter, and only what the import brings: some are there from the start."""
    program = (
        "import sys; before = set(sys.modules)\n"
        "import pycopy.session.table, pycopy.session.rewrite\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    came = {name.partition(".")[0] for name in run.stdout.split()}
    assert "pycopy" in came
    assert not came & {
        "socket", "_socket", "select", "selectors", "time", "datetime", "threading", "_thread",
        "logging", "bcc", "asyncio", "ctypes", "subprocess", "random", "signal", "multiprocessing",
    }  # fmt: skip
