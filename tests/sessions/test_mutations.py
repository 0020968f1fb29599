"""No rule of the transition table can be changed without a script failing."""

from pathlib import Path

import pytest

from pycopy.session.states import TRANSITIONS, State
from tests.sessions.runner import Script

TEXTS = [path.read_text() for path in sorted(Path(__file__).parent.glob("*/*.pkt"))]
MUTANTS = [
    (rule, other)
    for rule, end in TRANSITIONS.items()
    for other in (None, *State)
    if other is not end
]


def a_script_fails():
    for text in TEXTS:
        try:
            Script(text).run()
        except Exception:
            return True
    return False


@pytest.mark.parametrize("rule", TRANSITIONS, ids=lambda rule: f"{rule[0].name}-{rule[1].name}")
def test_every_other_end_is_noticed(rule, monkeypatch):
    for changed, other in MUTANTS:
        if changed == rule:
            with monkeypatch.context() as patch:
                if other is None:
                    patch.delitem(TRANSITIONS, rule)
                else:
                    patch.setitem(TRANSITIONS, rule, other)
                assert a_script_fails(), f"nobody notices that it leads to {other}"
