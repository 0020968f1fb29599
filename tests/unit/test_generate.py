"""bpf/generated.h is what is declared, and the declaration is about what the engine has."""

import struct
from operator import attrgetter

import pytest

from pycopy.fastpath import generate
from pycopy.kernel import objects
from pycopy.session.fields import FIELDS, Known, Space
from pycopy.session.states import TRANSITIONS, Event, State
from tests.unit.test_handover import opened


def test_the_committed_header_is_what_is_declared():
    committed = (objects.bpf_dir() / generate.NAME).read_text()
    assert committed == generate.text(), "run: python3 -P -m pycopy.fastpath.generate"


def test_lines_fit():
    assert all(len(line.expandtabs()) <= 100 for line in generate.text().splitlines())


@pytest.mark.parametrize("each", [*FIELDS, *Known], ids=lambda each: each.name)
def test_the_engine_has_what_is_said_to_be_there(each):
    """And of the type that its space asks for."""
    if each.at:
        kind = bool if isinstance(each, Known) else int
        kind = bytes if getattr(each, "space", None) is Space.CONNECTION else kind
        assert isinstance(attrgetter(each.at)(opened()), kind)


def test_each_bit_has_a_place_of_its_own_in_the_field():
    assert sorted(Known) == [1 << place for place in range(len(Known))]
    (known,) = (field for field in FIELDS if field.name == "known")
    assert max(Known) < 1 << 8 * struct.calcsize(known.type.letter)


def test_every_transition_of_a_healthy_session_is_in_c():
    """What is left out makes a session leave the kernel, or frees its slot."""
    text = generate.text()
    for (state, event), end in TRANSITIONS.items():
        if event in (Event.RESET, Event.ABORT, Event.EXPIRED):
            assert f"EVENT_{event.name}" not in text
            continue
        if (state, event) == (State.LAST_ACK, Event.FIN_ACKED):
            end = State.TIME_WAIT  # from where late segments are answered
        body = text[text.index(f"event == PYCOPY_EVENT_{event.name})") :]
        rule = f"if (state == PYCOPY_{state.name})\n\t\t\treturn PYCOPY_{end.name};"
        assert rule in body[: body.index("\n\t}")]
