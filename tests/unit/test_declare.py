"""How options are declared: a field becomes a row, and what is typed becomes the field's value."""

# ruff: noqa: RUF009
import argparse
from dataclasses import dataclass

import pytest

from pycopy.command.declare import Configuration, Group, fill, flag, option, options_of, refuse
from pycopy.command.values import as_typed, parse_bytes, parse_networks, whole


@dataclass
class Table(Configuration):
    late: int = option("--late N", 7, whole(1, 9, "it"), Group.PROCESS, "some ({default})")
    early: str = option("-e, --early TEXT", "", as_typed, Group.COPIED, "first", was="the first")
    off: bool = flag("--no-thing", Group.PROCESS, "not", default=True)
    size_bytes: int = option("--size SIZE", 2 << 20, parse_bytes, Group.PACE, "size ({default})")
    many: list = option("-m, --many X", [], parse_networks, Group.PACE, "all", repeated=True)
    asks: int = option("--asks N", 1, None, Group.PACE, "read by the command {command}")
    made: float = option("--made S", lambda: 2.5, None, Group.PACE, "{default}")
    inner: int = 3

    refused = (refuse("-z", "what it was", "do this"),)


ROWS = {row.field: row for row in options_of(Table)}


def given(**typed):
    return argparse.Namespace(**({field: None for field in ROWS} | typed))


def test_rows_are_in_the_order_of_the_headings_then_of_the_fields():
    assert list(ROWS) == ["early", "size_bytes", "many", "asks", "made", "late", "off"]


def test_a_row_has_what_help_shows():
    row = ROWS["early"]
    assert (row.letter, row.long, row.metavar, row.name) == ("-e", "--early", "TEXT", "-e")
    row = ROWS["late"]
    assert (row.letter, row.long, row.metavar, row.name) == ("", "--late", "N", "--late")
    assert (ROWS["off"].metavar, ROWS["off"].name) == ("", "--no-thing")


@pytest.mark.parametrize(
    ("field", "text"),
    [("late", "some (7)"), ("size_bytes", "size (2M)"), ("made", "2.5"),
     ("asks", "read by the command replay")],
)  # fmt: skip
def test_help_has_the_default_from_the_field(field, text):
    assert ROWS[field].help_text("replay") == text


def test_what_is_not_typed_stays_as_it_is():
    assert fill(Table(), given()) == Table()
    assert (Table().late, Table().off, Table().many, Table().made) == (7, True, [], 2.5)


def test_what_is_typed_is_read():
    wanted = fill(Table(), given(late="9", off=True, size_bytes="1M", early="x"))
    assert (wanted.late, wanted.off, wanted.size_bytes, wanted.early) == (9, False, 1 << 20, "x")


def test_a_repeated_option_adds_up():
    wanted = fill(Table(), given(many=["10.0.0.1,10.0.0.2", "10.1.0.x"]))
    assert [str(each) for each in wanted.many] == ["10.0.0.1/32", "10.0.0.2/32", "10.1.0.0/24"]


def test_what_the_command_reads_itself_is_left():
    assert fill(Table(), given(asks="5")).asks == 1


@pytest.mark.parametrize("spec", ["-l", "long", "-l --long", "--long N M", "-l, --long  N"])
def test_a_spec_that_help_would_not_show(spec):
    with pytest.raises(AssertionError):
        option(spec, "", as_typed, Group.ALONE, "")
