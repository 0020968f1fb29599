"""The table of options: nothing is missing in it, and nothing is written twice."""

import dataclasses
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from pycopy.command import config, options
from pycopy.command.config import InterceptConfig, ReplayConfig
from pycopy.command.declare import HELP, VERSION, options_of

ROOT = Path(__file__).parents[2]
#: From the originals' getopt strings, of all builds; and intercept's -t, which nothing there reads.
TCPCOPY = "xspcHnfrgmMDRUCtklPOWLdhviFBSoaIT"
INTERCEPT = "FipbsnDcxqlPdhv"
ROWS = [
    pytest.param(name, row, id=f"{name} {row.long}")
    for name, command in options.COMMANDS.items()
    for row in options_of(command.config)
]


@pytest.mark.parametrize(
    ("table", "original"), [(ReplayConfig, TCPCOPY), (InterceptConfig, INTERCEPT)]
)
def test_every_letter_of_the_originals_has_a_row(table, original):
    rows = [*options_of(table), HELP, VERSION, *table.refused]
    assert sorted(row.letter for row in rows if row.was) == sorted(f"-{each}" for each in original)
    for row in table.refused:
        assert row.instead and not row.long


@pytest.mark.parametrize("name", options.COMMANDS)
def test_no_name_is_given_twice(name):
    table = options.COMMANDS[name].config
    rows = [*options_of(table), HELP, VERSION, *table.refused]
    names = [each for row in rows for each in (row.letter, row.long) if each]
    assert len(names) == len(set(names))
    assert {*options.parser(name)._option_string_actions} == set(names)


def test_every_field_is_an_option():
    fields = {
        field.name for command in options.COMMANDS.values()
        for field in dataclasses.fields(command.config)
    }  # fmt: skip
    assert fields - {row.values[1].field for row in ROWS} == {"worker"}


@pytest.mark.parametrize(("command", "row"), ROWS)
def test_no_default_is_written_twice(command, row):
    """The help has it from the field: nobody changes one and forgets the other."""
    shown = row.help_text(command)
    computed = row.default == config.default_ring_bytes()  # from this host's memory
    if row.metavar and row.default and isinstance(row.default, int | float) and not computed:
        assert not re.search(rf"\b{row.default_text()}\b", row.help)
    elif row.metavar and isinstance(row.default, str) and row.default:
        assert f"({row.default})" not in row.help
        assert f"{row.default} (default)" not in row.help
    if "{default}" in row.help:
        assert row.default_text() in shown
    assert not set(shown) & set("{}")


def test_a_default_can_be_typed():
    """What the help names as a default, the parser takes, and it changes nothing."""
    for parameter in ROWS:
        name, row = parameter.values
        if "{default}" in row.help and row.parse is not None:
            assert row.read(row.default_text()) == row.default, (name, row)


def test_the_page_is_as_the_tables_are():
    spec = spec_from_file_location("make_options", ROOT / "docs/make_options.py")
    make_options = module_from_spec(spec)
    spec.loader.exec_module(make_options)
    assert (ROOT / "docs/options.md").read_text() == make_options.page()


def test_nothing_is_shared_by_two_configurations():
    one, other = ReplayConfig(), ReplayConfig()
    one.interfaces.append("eth0")
    assert other.interfaces == [] == ReplayConfig().interfaces


@pytest.mark.parametrize(
    ("memory_gb", "workers", "ring_mb"), [(0.25, 1, 4), (1, 1, 16), (7, 1, 64), (512, 1, 128),
                                          (512, 30, 4), (0.25, 64, 1)],
)  # fmt: skip
def test_rings_by_the_host_s_memory(monkeypatch, memory_gb, workers, ring_mb):
    has = {"SC_PHYS_PAGES": int(memory_gb * 2**18), "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(config.os, "sysconf", has.get)
    assert config.default_ring_bytes(workers) == ring_mb << 20
