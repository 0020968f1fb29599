"""What the pages of docs/ name is there: files, rooms in their order, words of the glossary."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: A path as pages write it, from the repository's root.
PATH = re.compile(r"`((?:bpf|pycopy|tests|docs|contrib)/[\w./-]*)`|\]\(([\w./-]+\.md)[)#]")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_are_there(page):
    for inside, linked in PATH.findall(page.read_text()):
        place = ROOT / inside if inside else page.parent / linked
        assert place.exists(), f"{page.name} names {inside or linked}"


def table_under(heading, text):
    """The cells of the first table behind a heading."""
    rows = text.partition(heading)[2].partition("\n| ")[2].partition("\n\n")[0]
    return [
        [cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows.splitlines()[2:]
    ]


def rooms_listed():
    """Row by row, the rooms that it names."""
    return [
        re.findall(r"`(\w+)(?:/|\.py)`", row[0]) for row in table_under("## Rooms", ARCHITECTURE)
    ]


def imports():
    """From each room to every other one that it imports from."""
    found = {}
    for path in (ROOT / "pycopy").rglob("*.py"):
        room = path.relative_to(ROOT / "pycopy").with_suffix("").parts[0]
        others = found.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            words = [name.split(".") for name in names]
            others |= {each[1] for each in words if each[0] == "pycopy" and len(each) > 1}
    rooms = found.keys() - {"__init__", "__main__"}
    return {room: found[room] & rooms - {room} for room in rooms}


def test_every_room_is_listed_above_those_it_imports_from():
    graph, listed = imports(), rooms_listed()
    assert sorted(room for row in listed for room in row) == sorted(graph)
    below = set()
    for row in reversed(listed):
        for room in reversed(row):
            assert graph[room] <= below, f"{room} imports from {graph[room] - below}"
            below.add(room)


def test_the_engine_is_described_file_by_file():
    rows = table_under("## Inside the session engine", ARCHITECTURE)
    listed = {name for row in rows for name in re.findall(r"`(\w+\.py)`", row[0])}
    files = {path.name for path in (ROOT / "pycopy/session").glob("*.py")}
    assert listed | {"__init__.py", "session.py"} == files


def test_every_program_is_listed():
    rows = table_under("The programs are in `bpf/`:", ARCHITECTURE)
    listed = {name for row in rows for name in re.findall(r"`bpf/(\w+\.[ch])`", row[0])}
    # What every program includes: the hook's names, and scratch memory.
    files = {path.name for path in (ROOT / "bpf").glob("*.[ch]")} - {"hook.h", "scratch.h"}
    assert listed == files


def test_words_of_the_glossary_are_in_use():
    """Those that are names in the code, and so written like it."""
    glossary = ARCHITECTURE.partition("## Glossary")[2]
    source = "".join(
        path.read_text() for path in (*ROOT.glob("pycopy/**/*.py"), *ROOT.glob("bpf/*.[ch]"))
    )
    cells = re.findall(r"^\| ([^|]+) \|", glossary, re.M)
    words = [word for cell in cells for word in re.findall(r"`(\w+)`", cell)]
    assert len(words) > 20
    for word in words:
        assert re.search(rf"\b{word}\b", source), f"no {word} in the code"
