"""Every public definition has a docstring, and no docstring or comment is a riddle.

A docstring says what the reader cannot see in the signature: shapes, units, what is raised,
where it is specified. What is public: modules, classes, functions and methods without a leading
underscore, but for functions within functions.
"""

import ast
import re
from pathlib import Path

import pytest

import pycopy

PACKAGE = Path(pycopy.__file__).parent
#: What is not held to this yet, rooms and modules; a new one is from the start.
NOT_YET = {"command", "fastpath", "responses", "workers", "cli.py", "intercept.py", "replay.py"}

FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).parts[0] not in NOT_YET
]
#: What of, and as what? The noun is to be written.
RIDDLE = re.compile(
    r'(""" ?|# |#: )(Of |The same([,.]| (after|by|for|from|in|less|of|under|when|while|without) ))'
)


def public(body, prefix=""):
    """Names and nodes of what a module or class offers."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from public(node.body, prefix)
        is_definition = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if is_definition and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_everything_public_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    found = [("the module", tree), *public(tree.body)]
    assert not [name for name, node in found if not ast.get_docstring(node)]


def raised(function):
    """Names of what a function's own text raises; what is raised again has no name."""
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            made = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = ast.unparse(made).rpartition(".")[2]
            if name[0].isupper() and name not in ("NotImplementedError", "KeyboardInterrupt"):
                yield name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_is_raised_is_said(path):
    for name, node in public(ast.parse(path.read_text()).body):
        if not isinstance(node, ast.ClassDef):
            said = ast.get_docstring(node) or ""
            # A base class will do, or "the kernel's no as OSError".
            missing = [each for each in raised(node) if each not in said and "rror" not in said]
            assert not missing or "aise" in said, f"{name} raises {missing}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_riddles(path):
    lines = enumerate(path.read_text().splitlines(), 1)
    assert not [(number, line.strip()) for number, line in lines if RIDDLE.search(line)]


def test_it_would_be_noticed():
    missing = "class Public:\n    def method(self): ...\n    def _own(self): ...\n"
    assert [name for name, _ in public(ast.parse(missing).body)] == ["Public", "Public.method"]
    for line in ("#: Of one wait.", "    # Of a ring.", '"""The same by its slot."""'):
        assert RIDDLE.search(line)
    assert not RIDDLE.search("# The same process connected anew.")
