"""What capabilities are really needed: as nobody with exactly those, and with one less.

The verifier takes some of what the programs do only from who has CAP_PERFMON, on kernels before
6.8 more than on later ones; so these run on old kernels, too (tests/kernels).
"""

import subprocess
from pathlib import Path

import pytest

from pycopy.host import privileges
from pycopy.lab import copying as copying_module
from pycopy.lab.copying import Placement
from pycopy.lab.topology import python

ROOT = Path(__file__).resolve().parents[2]
NAMES = {
    command: [name.removeprefix("CAP_").lower() for name in needed]
    for command, needed in (("replay", privileges.SENDING), ("intercept", privileges.LOADING))
}


def as_nobody(names):
    given = ",".join(f"+{name}" for name in names)
    return [
        "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs",
        f"--inh-caps={given}", f"--ambient-caps={given}", f"--bounding-set=-all,{given}",
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def _readable():
    if any(not directory.stat().st_mode & 0o1 for directory in (ROOT, *ROOT.parents)):
        pytest.skip(f"other users may not read {ROOT}")


@pytest.mark.parametrize("fast", [True, False], ids=["fast path", "user space"])
@pytest.mark.parametrize("placement", list(Placement), ids=lambda one: one.value)
def test_these_are_enough(scenario, monkeypatch, placement, fast):
    def restricted(*words):
        name = words[1] if words[0] == "pycopy" else ""
        return [*as_nobody(NAMES[name]), *python(*words)] if name in NAMES else python(*words)

    monkeypatch.setattr(copying_module, "python", restricted)
    options = () if fast else ("--no-fastpath",)
    run = scenario(placement, 4, replay_arguments=options).start()
    run.load(211, 23, short=11)
    run.finish()


@pytest.mark.parametrize(
    ("command", "missing"), [(command, name) for command in NAMES for name in NAMES[command]]
)
def test_without_one_of_them_it_is_named(lab, missing, command):
    given = [name for name in NAMES[command] if name != missing]
    service = f"80-{lab.address('target', 4)}:8080"
    words = {"replay": ["-x", service], "intercept": ["-F", "src port 80"]}[command]
    child = lab.popen(
        "online", [*as_nobody(given), *python("pycopy", command, *words)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    _, said = child.communicate(timeout=30)
    assert child.returncode == 3, said
    assert f"CAP_{missing.upper()} missing" in said.decode()
    assert b"Traceback" not in said
