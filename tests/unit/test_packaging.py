"""The package as a whole: what is shipped, what may import what, and the scripts around it."""

import ast
import importlib.util
import os
import pkgutil
import re
import shutil
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


def test_the_sdist_is_made_of_all_that_is_in_the_repository():
    """What its own tests read included; ``contrib/check sdist`` builds one and looks."""
    included = set(PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"])
    for path in included:
        assert (ROOT / path.lstrip("/")).exists(), path
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a checkout, or no git")
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files"],
        cwd=ROOT, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip(f"git does not list this checkout: {listed.stderr}")
    tops = {"/" + name.partition("/")[0] for name in listed.stdout.splitlines()}
    # hatchling adds these by itself.
    assert tops - included == {"/.gitignore", "/LICENSE", "/README.md", "/pyproject.toml"}, tops


def test_the_wheel_says_that_it_has_types_and_carries_no_test_code():
    assert (ROOT / "pycopy/py.typed").is_file()
    for path in (ROOT / "pycopy").rglob("*.py"):
        assert not path.name.startswith("test_") and "tests" not in path.parts, path
    for module in MODULES:
        assert not any(name.split(".")[0] == "tests" for name in imports_of(module)), module


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


def test_what_may_be_typed_knows_no_driver():
    drivers = ("replay", "intercept", "workers", "lab", "cli")
    for name in MODULES:
        if name.startswith("pycopy.command."):
            rooms = {each.split(".")[1] for each in imports_of(name) if each.startswith("pycopy.")}
            assert not rooms.intersection(drivers), name


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
    one += ["--even-if-busy"]
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
    check = ROOT / "contrib" / "check"
    assert os.access(check, os.X_OK)
    compile(check.read_text(), check, "exec")
    # CI runs what README tells people to run, and before it what needs no minutes.
    assert "./contrib/setup check" in ci.read_text().partition("./contrib/setup test")[0]
    assert "./contrib/setup test" in ci.read_text()


def test_the_versions_of_the_checks_are_pinned():
    """Or a tool's new version would fail a commit in which nothing is wrong."""
    for pin in PROJECT["project"]["optional-dependencies"]["dev"]:
        assert re.fullmatch(r"[a-z-]+==[0-9.]+", pin), pin


def test_mutmut_runs_tests_that_exist():
    """It says nothing of a file that has been renamed, and more mutants survive."""
    for path in PROJECT["tool"]["mutmut"]["pytest_add_cli_args_test_selection"]:
        assert (ROOT / path).is_file(), path


def test_check_explains_itself(tmp_path):
    """Before anything is installed; and what cannot be is said with its cure."""
    check = [sys.executable, ROOT / "contrib" / "check"]
    done = subprocess.run([*check, "tset"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "no such step: tset; there are ruff," in done.stderr
    (tmp_path / "file").touch()
    env = {**os.environ, "PYCOPY_CHECK_CACHE": str(tmp_path / "file" / "cache")}
    done = subprocess.run([*check, "ruff"], capture_output=True, text=True, timeout=30, env=env)
    assert done.returncode == 3 and "set PYCOPY_CHECK_CACHE" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_setup_explains_itself():
    setup = ROOT / "contrib" / "setup"
    done = subprocess.run([setup], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    done = subprocess.run([setup, "tset"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "unknown command 'tset'" in done.stderr
