"""The rooms of pycopy, and who imports from whom: counted, drawn, and held to limits.

A room is a package or a module directly below pycopy/; an arrow is an ordered pair of rooms, of
which the first has a module that imports one of the second, wherever in its text. In the checkout::

    python3 -m tests.rooms           every arrow, and how many
    python3 -m tests.rooms --write   draws them into docs/architecture.md
    python3 -m tests.rooms --check   what contrib/check runs: by grimp, which must see the same

grimp comes with the extra ``dev``; without it imports are read from the sources by ast, as
tests/unit/test_rooms.py does.
"""

import argparse
import ast
import importlib.util
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN = "<!-- drawn by: python3 -m tests.rooms --write -->\n"
END = "<!-- end of the drawing -->\n"
#: More, and nobody keeps the plan of the house in mind.
ARROWS_MOST = 110

Graph = dict[str, set[str]]


def sources(root: Path = ROOT) -> dict[str, Path]:
    """Every module by its dotted name; a package by its own name."""
    found = {}
    for path in sorted((root / "pycopy").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_by_ast(root: Path = ROOT, types: bool = True) -> Graph:
    """From each module to those of ours that it imports; no code is run.

    Without ``types``, those are left out that only a type checker follows (TYPE_CHECKING).
    """
    modules = sources(root)
    graph = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text())
        if not types:
            tree = _AtRunTime().visit(tree)
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        graph[name] = {each for each in _imported(tree, package, modules) if each in modules}
        graph[name].discard(name)
    return graph


class _AtRunTime(ast.NodeTransformer):
    def visit_If(self, node):
        named = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return node.orelse if named else self.generic_visit(node)


def _imported(tree, package, modules):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                module = f"{base}.{alias.name}"
                yield module if module in modules else base


def imports_by_grimp(types: bool = True) -> Graph:
    """The same, as grimp sees it. ImportError where it is not installed."""
    import grimp

    graph = grimp.build_graph("pycopy", exclude_type_checking_imports=not types, cache_dir=None)
    return {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}


def rooms(imports: Graph) -> Graph:
    """From each room to those it imports from. pycopy itself, which has the version, is none."""
    graph = defaultdict(set)
    for name, others in imports.items():
        for room, other in ((_room(name), _room(other)) for other in others):
            if room and other and room != other:
                graph[room].add(other)
        if _room(name):
            graph[_room(name)].update()
    return dict(graph)


def _room(module: str) -> str:
    return ".".join(module.split(".")[1:2])


def arrows(graph: Graph) -> int:
    return sum(map(len, graph.values()))


def reached(graph: Graph, start: str) -> set[str]:
    """All that can be got to from ``start``, itself only by a circle."""
    seen, todo = set(), [start]
    while todo:
        for other in graph.get(todo.pop(), ()):
            if other not in seen:
                seen.add(other)
                todo.append(other)
    return seen


def in_circles(graph: Graph) -> list[str]:
    return sorted(name for name in graph if name in reached(graph, name))


def layers() -> list[list[str]]:
    """The contract in pyproject.toml: the rooms from above to below, line by line."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = project["tool"]["importlinter"]["contracts"]
    (contract,) = (each for each in contracts if each["type"] == "layers")
    return [[room.strip() for room in line.split("|")] for line in contract["layers"]]


def drawing(graph: Graph) -> str:
    """The rooms line by line as a diagram, and below it every arrow.

    In the diagram an arrow that is also a way by other rooms is left out: what matters there is
    what lies above what. Only where there are no circles.
    """
    lines = ["```mermaid", "flowchart TD"]
    for layer in layers():
        for room in layer:
            through = set().union(*(reached(graph, other) for other in graph[room]), ())
            nearest = sorted(graph[room] - through)
            lines.append(f"    {room} --> {' & '.join(nearest)}" if nearest else f"    {room}")
    lines += ["```", "", "| room | imports from |", "|---|---|"]
    for layer in layers():
        lines += [f"| `{room}` | {', '.join(sorted(graph[room]))} |" for room in layer]
    lines += ["", f"{arrows(graph)} arrows between {len(graph)} rooms."]
    return "\n".join(lines) + "\n"


def drawn() -> str:
    """The drawing as docs/architecture.md has it now."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0]


def draw(graph: Graph) -> None:
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"rooms: {PAGE} has no place for the drawing: {BEGIN}{END}")
    PAGE.write_text(before + begin + drawing(graph) + end + after)


def faults(imports: Graph, at_run_time: Graph) -> list[str]:
    """What is wrong, in words; [] if nothing is.

    Modules of one room may name each other for the type checker; rooms may not.
    """
    graph = rooms(imports)
    found = [f"in a circle of imports: {name}" for name in in_circles(at_run_time)]
    found += [f"in a circle of rooms: {room}" for room in in_circles(graph)]
    if arrows(graph) > ARROWS_MOST:
        found.append(f"{arrows(graph)} arrows, at most {ARROWS_MOST}")
    places = {room: place for place, layer in enumerate(layers()) for room in layer}
    placed = set(places)
    found += [f"in no layer of pyproject.toml: {room}" for room in sorted(set(graph) - placed)]
    found += [f"a layer without its room: {room}" for room in sorted(placed - set(graph))]
    for room in placed & set(graph):
        for other in sorted(graph[room] & placed):
            if places[room] >= places[other]:
                found.append(f"not downwards: {room} imports from {other}")
    if not found and drawn() != drawing(graph):
        found.append("the drawing in docs/architecture.md is not of these sources")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.rooms", description="See its docstring."
    )
    parser.add_argument("--write", action="store_true", help="draw docs/architecture.md anew")
    parser.add_argument("--check", action="store_true", help="say what is wrong; needs grimp")
    options = parser.parse_args()
    by_grimp = options.check or importlib.util.find_spec("grimp") is not None
    read = imports_by_grimp if by_grimp else imports_by_ast
    imports = read()
    graph = rooms(imports)
    if options.write:
        draw(graph)
    for room in sorted(graph):
        print(room, "->", *sorted(graph[room]))
    print(f"{arrows(graph)} arrows between {len(graph)} rooms, by {'grimp' if by_grimp else 'ast'}")
    found = faults(imports, read(types=False))
    if options.check and imports != imports_by_ast():
        found.append("grimp and ast do not see the same imports")
    for fault in found:
        print(f"rooms: {fault}", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
