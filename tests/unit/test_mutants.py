"""What tests/mutants changes in C, without compiling anything."""

import pytest

from tests.mutants.__main__ import State, all_mutants, equivalents, report
from tests.mutants.operators import OPERATORS, Mutant, mutants_of
from tests.mutants.trial import ROOT, Outcome

TEXT = """\
/* a < b && c, 7 */
#include <linux/bpf.h>
#define PYCOPY_PAUSE 32
static __always_inline int pycopy_rule(struct pycopy_session *s, u32 ack)
{
	u32 left = s->snd_nxt - s->snd_una; /* 1 + 1 */

	if (left > 5 && (s->held || ack == 9))
		return 1;
	if (left)
		s->held++;
	s->asked = ack;
	return left <= 3;
}
"""


def changes(operator):
    return [
        (each.old, each.new) for each in mutants_of("rule.h", TEXT) if each.operator == operator
    ]


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("comparison", [(">", ">="), ("==", "!="), ("<=", "<")]),
        ("logic", [("&&", "||"), ("||", "&&")]),
        ("sum", [("-", "+"), ("++", "--")]),
        (
            "constant",
            [(old, str(new)) for old, near in (("32", (31, 33)), ("5", (4, 6)), ("9", (10, 8)),
             ("1", (0, 2)), ("3", (2, 4))) for new in sorted(near, key=str)],
        ),
        ("statement", [("return 1;", ";"), ("s->held++;", ";"), ("s->asked = ack;", ";")]),
        (
            "condition",
            [("left > 5 && (s->held || ack == 9)", "0"), ("left > 5 && (s->held || ack == 9)", "1"),
             ("left", "0"), ("left", "1")],
        ),
    ],
)  # fmt: skip
def test_what_an_operator_changes(operator, expected):
    assert changes(operator) == expected


def test_an_operand_is_dropped_with_what_joins_it():
    of_lines = {each.apply(TEXT).splitlines()[7].strip() for each in mutants_of("rule.h", TEXT)
                if each.operator == "operand"}  # fmt: skip
    squeezed = {" ".join(line.split()).replace("( ", "(").replace(" )", ")") for line in of_lines}
    assert squeezed == {
        "if ((s->held || ack == 9))", "if (left > 5)", "if (left > 5 && (ack == 9))",
        "if (left > 5 && (s->held))",
    }  # fmt: skip


def test_the_rules_have_enough_changes_and_each_is_one():
    found = all_mutants()
    assert len({each.key for each in found}) == len(found)
    by_file = {name: (ROOT / "bpf" / name).read_text() for name in {each.file for each in found}}
    assert len(found) >= 150 and {each.operator for each in found} == set(OPERATORS)
    for each in found:
        text = by_file[each.file]
        assert text[each.start : each.end] == each.old != each.new
        before, after = text[: each.start], text[each.end :]
        assert each.apply(text) == before + each.new + after


def test_a_key_does_not_depend_on_what_stands_before():
    moved = mutants_of("rule.h", "\n\n" + TEXT)
    assert [each.key for each in moved] == [each.key for each in mutants_of("rule.h", TEXT)]


def test_reasons_are_of_changes_that_are_there():
    assert all(equivalents(all_mutants()).values())


def test_a_run_goes_on_where_it_was_and_tells_the_score(tmp_path, capsys):
    mutants = mutants_of("rule.h", TEXT)[:4]
    state = State(tmp_path / "state")
    outcomes = (Outcome.KILLED, Outcome.SURVIVED, Outcome.SURVIVED, Outcome.SAME)
    for mutant, outcome in zip(mutants, outcomes, strict=True):
        state.put(mutant, outcome, "")
    with open(tmp_path / "state", "a") as file:
        file.write('{"key": "cut o')
    again = State(tmp_path / "state")
    assert again.results == state.results
    assert report(mutants, again, {mutants[1].key: "it is the same"}) == 1
    said = capsys.readouterr().out
    assert "4 of 4 changes tried; 1 of 2 noticed (50.0 %), 1 that nobody could notice" in said
    assert "NO REASON GIVEN" in said and "it is the same" in said


def test_a_mutant_says_where_it_is():
    mutant = Mutant("rule.h", 3, "constant", 0, 2, "32", "8", "#define PYCOPY_PAUSE 32", 0)
    assert str(mutant) == "rule.h:3 constant: '32' -> '8' in: #define PYCOPY_PAUSE 32"
