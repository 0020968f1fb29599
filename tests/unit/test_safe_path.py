"""Nothing is imported from the current directory: what root runs there may lie in anybody's."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pycopy.lab import topology

ROOT = Path(topology.__file__).parents[2]
PYTHON = "/usr/bin/python3"


@pytest.fixture
def poisoned(tmp_path):
    """A directory where every import that finds it says so."""
    folder = tmp_path / "poisoned"
    folder.mkdir()
    names = set(sys.stdlib_module_names) | {"pycopy", "tests", "bcc", "rich", "pyroute2", "pytest"}
    for name in names:
        (folder / f"{name}.py").write_text(
            f"import os\nos.write(2, b'taken: {name}')\nos._exit(99)"
        )
    return folder


def poison_works(folder):
    """Without a guard it is found, or the tests here would show nothing."""
    done = subprocess.run(
        [PYTHON, "-m", "pycopy"], cwd=folder, capture_output=True, text=True, timeout=20
    )
    return done.returncode == 99 and "taken" in done.stderr


#: In a mount namespace of its own, so that the host's launcher is not ours to replace.
INSTALL = """
mount -t tmpfs none /usr/local/bin && "$1/contrib/setup" install && cat /usr/local/bin/pycopy >&2
cd "$2" || exit
shift 2
exec /usr/local/bin/pycopy "$@"
"""


@pytest.mark.parametrize("path", [None, "", ":", "::/nowhere"])
def test_the_installed_command(root, poisoned, path):
    setup = (ROOT / "contrib" / "setup").read_text()
    dist = "/usr/lib/python3/dist-packages"
    if not all(Path(dist, name).is_dir() for name in ("bcc", "pyroute2", "rich")):
        pytest.skip("setup would install packages: sudo ./contrib/setup test")
    assert "LAUNCHER=/usr/local/bin/pycopy" in setup
    assert poison_works(poisoned)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = path
    for argv in (
        ["--version"],
        ["replay", "--help"],
        ["replay", "-x", "80-10.255.0.2:80", "-i", "!"],
    ):
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", INSTALL, "sh", ROOT, poisoned, *argv],
            env=environment, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert "taken" not in done.stderr
        assert done.returncode == (2 if "-x" in argv else 0), done.stderr
    assert "no such network device" in done.stderr


def test_a_checkout_of_any_name_can_be_installed(root, tmp_path):
    """The launcher names it in Python."""
    checkout = tmp_path / "it's a \\ $HOME: `checkout`"
    (checkout / "contrib").mkdir(parents=True)
    (checkout / "contrib" / "setup").write_bytes((ROOT / "contrib" / "setup").read_bytes())
    (checkout / "contrib" / "setup").chmod(0o755)
    (checkout / "pycopy").symlink_to(ROOT / "pycopy")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", INSTALL, "sh", checkout, tmp_path, "--version"],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stdout[:7]) == (0, "pycopy "), done.stderr


@pytest.mark.parametrize("path", [None, "", ":", ".:/nowhere:"])
def test_what_a_lab_runs(poisoned, monkeypatch, path):
    if path is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", path)
    environment = topology.environment()
    assert all(map(os.path.isabs, environment["PYTHONPATH"].split(os.pathsep)))
    for module in ("pycopy", "pycopy.lab.load"):
        done = subprocess.run(
            topology.python(module, "--help"),
            cwd=poisoned, env=environment, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), module
        assert "usage: " in done.stdout


def test_every_line_that_runs_a_module_of_ours_is_safe():
    """A new one is found here. What is typed in the checkout imports from it by design: see
    CONTRIBUTING.md; tests are run there."""
    unsafe = []
    for path in [
        *ROOT.glob("pycopy/**/*.py"),
        ROOT / "contrib/setup",
        ROOT / "vagrant/provision.sh",
    ]:
        text = path.read_text()
        for line in text.splitlines():
            runs = re.search(
                r'"-m", *("pycopy|module)|(?<!`)\bpython3? -m|PYTHON"? -m|_here -m', line
            )
            safe = '"-P", "-m"' in line or "run_from_here -m" in line or "PYTHONSAFEPATH" in text
            words = line.lstrip().startswith(('"""', "#")) or "prog=" in line
            if runs and not safe and not words:
                unsafe.append(f"{path.name}: {line.strip()}")
    assert unsafe == []
    assert 'exec "$PYTHON" -P' in (ROOT / "contrib/setup").read_text()
    for path in sorted(ROOT.glob("tests/bench/adapters/*.toml")):
        adapter = tomllib.loads(path.read_text())
        parts = [*adapter.get("program", []), *adapter.get("variant", [])]
        for argv in (each.get("argv") or each.get("fits", {}).get("argv", []) for each in parts):
            assert "{python}" not in argv or argv[argv.index("{python}") + 1] == "-P", path
