"""A host without bcc and LLVM runs every option: a filter, thousands of services, workers, XDP."""

import glob
import subprocess

import pytest

from pycopy.lab import copying as copying_module
from pycopy.lab.copying import Placement
from pycopy.lab.topology import python

#: What bcc and LLVM consist of: hidden, each by an empty directory or an unreadable file.
HIDDEN = (
    "/usr/lib/python3/dist-packages/bcc", "/usr/lib/*/libbcc*", "/usr/lib/*/libLLVM*",
    "/usr/lib/*/libclang*", "/usr/lib/llvm-*", "/usr/bin/clang*", "/usr/bin/gcc*",
)  # fmt: skip
SERVICES = 4000


def without_compiler(*words):
    """The command in a mount namespace of its own where nobody can compile."""
    lines = ["mkdir -p /run/pycopy-empty"]
    for pattern in HIDDEN:
        for path in glob.glob(pattern):
            lines.append(
                f"if [ -d {path} ]; then mount --bind /run/pycopy-empty {path}; "
                f"else mount --bind /dev/null {path}; fi"
            )
    script = " && ".join([*lines, 'exec "$@"'])
    return ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh", *words]


@pytest.fixture(autouse=True)
def _bare(monkeypatch):
    monkeypatch.setattr(copying_module, "python", lambda *words: without_compiler(*python(*words)))


def test_it_is_really_hidden():
    check = "import importlib.util, sys; sys.exit(importlib.util.find_spec('bcc.libbcc') is None)"
    done = subprocess.run(without_compiler("/usr/bin/python3", "-c", check), check=False,
                          capture_output=True)  # fmt: skip
    assert done.returncode != 0


@pytest.mark.parametrize(
    ("placement", "options"),
    [
        (Placement.SELF, ("-F", "tcp and not port 9", "--workers", "2")),
        (Placement.TARGET, ("-F", "tcp and not port 9")),
        (Placement.ASSISTANT, ("--workers", "2")),
        (Placement.SELF, ("--hook", "xdp", "-F", "tcp and not port 9")),
        (Placement.TARGET, ("--transport", "perf")),
    ],
    ids=["filter and workers", "filter", "workers", "xdp and filter", "perf"],
)
def test_every_option(scenario, placement, options):
    run = scenario(placement, 4, replay_arguments=options)
    service = run.copying.replays[0].arguments
    at = service.index("-x") + 1
    target = run.lab.address("target", 4)
    service[at] += f",20000-{20000 + SERVICES - 2}-{target}:20000"
    run.start()
    run.load(1009, 101, short=53, rate=1000, answers=(1, 1009))
    run.finish()


def test_an_intercept_by_xdp(scenario):
    run = scenario(Placement.ASSISTANT, 4, intercept_arguments=("--hook", "xdp")).start()
    run.load(1009, 101, short=53, rate=1000, answers=(1, 1009))
    run.finish()
