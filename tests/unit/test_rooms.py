"""The plan of the house: no circle, few arrows, every room on its floor, and the drawing of it.

And every module says which tests are its own.
"""

import ast
import re

from tests import rooms


def test_the_plan_is_kept():
    """A failure says what to do: python3 -m tests.rooms --write, or another way than upwards."""
    assert rooms.faults(rooms.imports_by_ast(), rooms.imports_by_ast(types=False)) == []


def test_every_way_to_import_is_seen(tmp_path):
    room = tmp_path / "pycopy" / "room"
    room.mkdir(parents=True)
    (tmp_path / "pycopy" / "__init__.py").write_text("")
    (room / "__init__.py").write_text("from . import one\nfrom .two import name\n")
    (room / "one.py").write_text("import pycopy.room.two\nimport os\n")
    (room / "two.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from pycopy.room.one import Name\n"
        "def late():\n    from ..other import name\n"
    )
    (tmp_path / "pycopy" / "other.py").write_text("from pycopy import __version__\n")
    one, two, other = "pycopy.room.one", "pycopy.room.two", "pycopy.other"
    graph = rooms.imports_by_ast(tmp_path)
    assert graph == {
        "pycopy": set(), other: {"pycopy"}, "pycopy.room": {one, two}, one: {two},
        two: {one, other},
    }  # fmt: skip
    assert rooms.rooms(graph) == {"room": {"other"}, "other": set()}
    assert rooms.in_circles(graph) == [one, two]
    at_run_time = rooms.imports_by_ast(tmp_path, types=False)
    assert at_run_time[two] == {other}
    assert rooms.in_circles(at_run_time) == []


def test_what_is_wrong_with_a_plan_is_found():
    names = [f"pycopy.{room}" for layer in rooms.layers() for room in layer]
    good = {name: set() for name in names}
    assert rooms.faults(good, good) == [
        "the drawing in docs/architecture.md is not of these sources"
    ]
    upwards = {**good, "pycopy.wire": {"pycopy.session"}}
    assert rooms.faults(upwards, good) == ["not downwards: wire imports from session"]
    beside = {**good, "pycopy.errors": {"pycopy.session"}}
    assert rooms.faults(beside, good) == ["not downwards: errors imports from session"]
    circle = {**upwards, "pycopy.session": {"pycopy.wire"}}
    assert "in a circle of rooms: wire" in rooms.faults(circle, good)
    inside = {"pycopy.wire.a": {"pycopy.wire.b"}, "pycopy.wire.b": {"pycopy.wire.a"}}
    assert "in a circle of imports: pycopy.wire.a" in rooms.faults(good, {**good, **inside})
    assert "in no layer of pyproject.toml: attic" in rooms.faults(
        {**good, "pycopy.attic": set()}, good
    )
    every = {name: set(names[place + 1 :]) for place, name in enumerate(names)}
    assert any("arrows, at most 110" in fault for fault in rooms.faults(every, good))


def test_every_module_has_its_tests():
    """In a file of its name, or of its room's and its own; or its docstring ends with a line
    that names them ("Tests: tests/unit/test_one.py, tests/bpf/test_other.py")."""
    files = {path.stem for path in rooms.ROOT.glob("tests/*/test_*.py")}
    without = []
    for name, path in rooms.sources().items():
        tree = ast.parse(path.read_text())
        parts = name.split(".")[1:]
        named = re.search(r"^Tests: (.+)", ast.get_docstring(tree), re.M | re.S)
        if named:
            for file in re.split(r",\s+", named[1].strip().rstrip(".")):
                assert (rooms.ROOT / file).exists(), f"{name}: {file}"
        elif any(not isinstance(node, ast.Expr | ast.Import | ast.ImportFrom | ast.Assign)
                 for node in tree.body):  # fmt: skip
            own = {f"test_{'_'.join(parts[-count:])}" for count in (1, 2)}
            if not own & files:
                without.append(name)
    assert without == []
