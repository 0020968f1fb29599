"""The C text of bpf/ as a reader meets it."""

import re

import pytest

from pycopy.kernel.objects import bpf_dir

FILES = sorted(path.name for path in bpf_dir().glob("*.[ch]"))
#: A body that begins and ends in the first column is a function's.
FUNCTION = re.compile(
    r"^(?:static|int)\b[^;{}()]*?(\w+)\([^;{}]*?\)\n\{\n(.*?)\n\}\n", re.DOTALL | re.MULTILINE
)
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)


def functions(name):
    """(name, lines of code) of each function of a file; comments and empty lines do not count."""
    text = COMMENT.sub("", (bpf_dir() / name).read_text())
    for found in FUNCTION.finditer(text):
        yield found[1], sum(bool(line.strip()) for line in found[2].splitlines())


@pytest.mark.parametrize("name", FILES)
def test_functions_fit_a_screen(name):
    long = {function: lines for function, lines in functions(name) if lines > 45}
    assert not long


@pytest.mark.parametrize("name", FILES)
def test_lines_fit(name):
    lines = (bpf_dir() / name).read_text().splitlines()
    assert all(len(line.expandtabs()) <= 100 for line in lines)


def test_every_function_is_found():
    found = [name for file in FILES for name, _ in functions(file)]
    assert len(found) > 150
    assert {"pycopy_open", "pycopy_find_target", "pycopy_capture", "is_mine"} <= set(found)
