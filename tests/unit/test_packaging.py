"""The package as a whole: what is shipped, what may import what, and the scripts around it."""

import ast
import importlib.util
import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pycopy

ROOT = Path(pycopy.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES = sorted(module.name for module in pkgutil.walk_packages([str(ROOT / "pycopy")], "pycopy."))
#: What the sans-IO engine must not reach, by any way.
FORBIDDEN = {
    "asyncio",
    "bcc",
    "logging",
    "multiprocessing",
    "pyroute2",
    "select",
    "selectors",
    "socket",
    "subprocess",
    "threading",
    "time",
}


def python(program):
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50
    )


def imports_of(name):
    """Every module that the source of ``name`` imports, at any depth of its text."""
    spec = importlib.util.find_spec(name)
    package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: 1 - node.level or None], *filter(None, [base])]
                )
            yield base
            for alias in node.names:
                if base.split(".")[0] == "pycopy" and f"{base}.{alias.name}" in MODULES:
                    yield f"{base}.{alias.name}"


def test_the_distribution_has_its_own_name_and_the_command_ours():
    project = PROJECT["project"]
    assert project["name"] != "pycopy"
    module, _, function = project["scripts"]["pycopy"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_what_the_wheel_is_made_of_exists():
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    for path in [*wheel["packages"], *wheel["force-include"]]:
        assert (ROOT / path).is_dir()
    assert wheel["force-include"]["bpf"] == "pycopy/bpf"
    for name in ("capture.c", "intercept.c", "pycopy.h"):
        assert (ROOT / "bpf" / name).is_file()
    for name in ("LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"):
        assert (ROOT / name).is_file()


def test_every_module_can_be_imported_without_privilege():
    drop = []
    if os.geteuid() == 0:
        owner = ROOT.stat().st_uid
        drop = ["setpriv", f"--reuid={owner}", "--clear-groups", "--bounding-set=-all"]
    program = (
        "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    )
    names = [name for name in MODULES if not name.endswith("__main__")]
    done = subprocess.run(
        [*drop, sys.executable, "-c", program, *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_line_imports_nothing_heavy():
    done = python(
        "import sys; before = set(sys.modules); import pycopy.cli\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    assert not set(done.stdout.split()) & {"bcc", "rich", "pyroute2", "scapy", "asyncio"}, done


def test_the_session_engine_reaches_no_io():
    todo = [name for name in MODULES if name.split(".")[:2] == ["pycopy", "session"]]
    assert todo
    seen = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for imported in imports_of(name):
            assert imported.split(".")[0] not in FORBIDDEN, f"{name} imports {imported}"
            if imported in MODULES:
                todo.append(imported)


def test_the_session_engine_brings_no_io_at_run_time():
    # "time" is there already when the interpreter starts; the test above looks for it.
    names = [name for name in MODULES if name.split(".")[:2] == ["pycopy", "session"]]
    done = python(
        "import sys; before = set(sys.modules)\n"
        f"import {', '.join(names)}\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    assert done.stderr == ""
    assert not set(done.stdout.split()) & FORBIDDEN


def test_modules_say_what_they_are_for():
    for name in MODULES:
        source = Path(importlib.util.find_spec(name).origin)
        assert ast.get_docstring(ast.parse(source.read_text())), source


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tier_in_which_nothing_passed_is_a_failure(workers):
    if workers:
        pytest.importorskip("xdist")
    one = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/test_seq.py"]
    one += ["-n", str(workers), "--dist", "loadgroup"] if workers else []
    done = subprocess.run(one, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout
    done = subprocess.run(
        [*one, "--all-tiers"], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 1
    assert "FAILED: in the tier bpf nothing passed" in done.stdout
    assert "FAILED: in the tier lab nothing passed" in done.stdout
    assert "tier unit" not in done.stdout


def test_scripts_are_sound():
    setup, ci = ROOT / "contrib" / "setup", ROOT / ".ci" / "run"
    for script, shell in ((setup, "sh"), (ci, "bash"), (ROOT / "vagrant/provision.sh", "sh")):
        assert os.access(script, os.X_OK)
        subprocess.run([shell, "-n", script], check=True)
    # CI runs what README tells people to run.
    assert "./contrib/setup test" in ci.read_text()


def test_setup_explains_itself():
    setup = ROOT / "contrib" / "setup"
    done = subprocess.run([setup], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    done = subprocess.run([setup, "tset"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "unknown command 'tset'" in done.stderr
