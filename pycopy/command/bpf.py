"""``pycopy bpf``: the compiled BPF programs that pycopy ships: show, verify, load, make anew.

``verify`` compiles them from the sources beside them and compares the bytes, so that nobody
has to believe that what runs in the kernel is what can be read. The same bytes come only from
the same compiler, which the manifest names.

Tests: tests/bpf/test_objects.py
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pycopy.errors import EXIT_FAILED, EXIT_OK, HostUnfit, PycopyError
from pycopy.kernel import objects
from pycopy.kernel.module import lift_memory_limit
from pycopy.process.console import say

ACTIONS = ("list", "verify", "load", "build")


def run(action: str, directory: Path | None, names: Sequence[str]) -> int:
    """One action on the objects of ``directory`` (the shipped ones); the exit status."""
    where = directory or objects.objects_dir()
    wanted = list(names) or list(objects.CATALOGUE)
    if action == "build":
        return _build(where, wanted)
    return {"list": _list, "verify": _verify, "load": _load}[action](where, wanted)


def _build(where: Path, names: Sequence[str]) -> int:
    made, compiler = objects.compile_all(names, lambda name: say(f"compiling {name}"))
    kept = {}
    if objects.manifest(where).get("sources") == objects.source_digest():
        others = [each for each in objects.manifest(where)["objects"] if each not in made]
        kept = {name: objects.read(where, name) for name in others}
    try:
        objects.write(where, {**kept, **made}, compiler)
    except OSError as error:
        raise PycopyError(
            f"cannot write {error.filename or where}: {error.strerror}", "name another --output"
        ) from None
    print(f"{len(made)} objects in {where}, by {_name(compiler)}")
    return EXIT_OK


def _list(where: Path, names: Sequence[str]) -> int:
    said = objects.manifest(where)
    if not said:
        raise PycopyError(f"there are no BPF objects in {where}", "make them: pycopy bpf build")
    print(f"{where}: by {_name(said['compiler'])}")
    for name in names:
        each = objects.read(where, name)
        size = sum(len(code) for code in each.programs.values()) // 8
        print(f"{name:24}{size:6} instructions  sha256 {said['objects'][name]['sha256']}")
    fresh = said.get("sources") == objects.source_digest()
    if not fresh:
        say("the sources in bpf/ have changed since: pycopy compiles them at each start")
    return EXIT_OK if fresh else EXIT_FAILED


def _verify(where: Path, names: Sequence[str]) -> int:
    """Whether the sources give the same bytes; says so for each object."""
    said = objects.manifest(where)
    if not said:
        raise PycopyError(f"there are no BPF objects in {where}", "make them: pycopy bpf build")
    differing = []
    for name in names:
        shipped = objects.read(where, name)
        made, compiler = objects.compile_all([name])
        if compiler != said["compiler"]:
            raise HostUnfit(
                f"the objects were made by {_name(said['compiler'])}, here is {_name(compiler)},"
                " which makes other bytes of the same text",
                "verify them on a host with that compiler",
            )
        same = made[name].programs == shipped.programs
        print(f"{name:24}{'same' if same else 'DIFFERS'}")
        sys.stdout.flush()
        if not same:
            differing.append(name)
    if said.get("sources") != objects.source_digest():
        say("the sources in bpf/ are not those of the manifest: make it anew (pycopy bpf build)")
        return EXIT_FAILED
    if differing:
        say(f"{len(differing)} of {len(names)} objects are not what their sources say")
        return EXIT_FAILED
    print(f"{len(names)} objects are what {where.parent} and {_name(said['compiler'])} make")
    return EXIT_OK


def _load(where: Path, names: Sequence[str]) -> int:
    """Whether this kernel loads them, and through how many instructions its verifier goes."""
    lift_memory_limit()
    refused = 0
    for name in names:
        try:
            costs = objects.try_load(where, name)
        except PycopyError as error:
            refused += 1
            print(f"{name:24}REFUSED")
            say(str(error))
            continue
        print(f"{name:24}" + ", ".join(f"{each} {cost}" for each, cost in sorted(costs.items())))
    return EXIT_FAILED if refused else EXIT_OK


def _name(compiler: dict[str, str]) -> str:
    return f"bcc {compiler.get('bcc', '?')} with clang {compiler.get('clang', '?')}"
