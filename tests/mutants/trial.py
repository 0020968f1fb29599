"""One changed text, compiled as ever, and the tests that should notice.

Everything happens in a copy of the checkout, so that the objects of the real one stay what they
are, and a run that is killed leaves nothing but a directory of the system's temporary ones.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from tests.mutants.operators import Mutant

ROOT = Path(__file__).resolve().parents[2]

#: In this order, since a change is done with at the first test that fails. Those first that fail
#: most.
TESTS = (
    "tests/bpf/test_conformance.py",
    "tests/bpf/test_conversations.py",
    "tests/bpf/test_fastpath_emit.py",
    "tests/bpf/test_fastpath_wire.py",
    "tests/bpf/test_fastpath_log.py",
    "tests/bpf/test_fastpath_addresses.py",
    "tests/bpf/test_fastpath_slots.py",
    "tests/bpf/test_fastpath_hostile.py",
    "tests/bpf/test_progress.py",
)

#: All of the tests together take a minute on an idle machine.
LIMIT_S = 900

_COPIED = ("bpf", "pycopy", "tests", "pyproject.toml")

#: Makes the objects that have the fast path; the others have none of the text that is changed. No
#: test of ours runs those for links without a header: there the fast path is compiled out.
_BUILD = """
from pycopy.kernel import objects
directory, names = objects.objects_dir(), objects.CATALOGUE
chosen = [(name, spec.defines) for name, spec in names.items()]
fast = [name for name, each in chosen if each["PYCOPY_FASTPATH"] and each["PYCOPY_L2_BYTES"]]
kept = {name: objects.read(directory, name) for name in names if name not in fast}
made, compiler = objects.compile_all(fast)
same = all(objects.read(directory, name) == made[name] for name in fast)
objects.write(directory, {**kept, **made}, compiler)
print("same" if same else "changed")
"""


class Outcome(Enum):
    """What became of a change."""

    KILLED = "killed"  # a test failed
    REJECTED = "rejected"  # no program was loaded: every start fails
    TIMEOUT = "timeout"  # the tests did not end
    SURVIVED = "survived"
    SAME = "same code"  # the compiler made the same of it
    INVALID = "invalid"  # no C any more

    @property
    def was_noticed(self) -> bool:
        return self in (Outcome.KILLED, Outcome.REJECTED, Outcome.TIMEOUT)

    @property
    def counts(self) -> bool:
        """Whether it was a change at all."""
        return self not in (Outcome.SAME, Outcome.INVALID)


class Workshop:
    """A copy of the checkout, for one change after the other."""

    def __init__(self, directory: Path, tests: Sequence[str] = TESTS) -> None:
        self._root = directory / "checkout"
        for name in _COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, self._root / name, **_ignored(ROOT / name))
        self._objects = directory / "objects"
        shutil.copytree(self._root / "bpf" / "objects", self._objects)
        self._tests = [each for each in tests if (self._root / each.split("::")[0]).exists()]

    def try_nothing(self) -> str:
        """The tests with nothing changed: what failed, empty if nothing did."""
        outcome, words = self._test()
        return "" if outcome is Outcome.SURVIVED else words or outcome.value

    def try_one(self, mutant: Mutant) -> tuple[Outcome, str]:
        """What became of the change, and by which test, or in which words."""
        path = self._root / "bpf" / mutant.file
        text = path.read_text()
        path.write_text(mutant.apply(text))
        try:
            built = self._run("-c", _BUILD, limit_s=LIMIT_S)
            if built.returncode:
                return Outcome.INVALID, _last_line(built.stderr)
            if built.stdout.split()[-1] == "same":
                return Outcome.SAME, ""
            return self._test()
        finally:
            path.write_text(text)
            shutil.copytree(self._objects, self._root / "bpf" / "objects", dirs_exist_ok=True)

    def _test(self) -> tuple[Outcome, str]:
        words = [
            "-m",
            "pytest",
            "-q",
            "-x",
            "--tb=line",
            "-p",
            "no:xdist",
            "-p",
            "no:cacheprovider",
        ]
        try:
            done = self._run(*words, *self._tests, limit_s=LIMIT_S)
        except subprocess.TimeoutExpired:
            return Outcome.TIMEOUT, f"{LIMIT_S} s"
        if not done.returncode:
            return Outcome.SURVIVED, ""
        failed = [each for each in done.stdout.splitlines() if each.startswith(("FAILED", "ERROR"))]
        if "verifier rejects" in done.stdout or "Rejected" in done.stdout:
            return Outcome.REJECTED, "the verifier"
        if done.returncode != 1 or not failed:
            raise RuntimeError(f"the tests could not be run:\n{done.stdout}{done.stderr}")
        return Outcome.KILLED, failed[0].split(" - ")[0]

    def _run(self, *words: str, limit_s: int) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(self._root), "PYTHONDONTWRITEBYTECODE": "1"}
        argv = [sys.executable, "-P", *words]
        with subprocess.Popen(
            argv, cwd=self._root, env=environment, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0,
        ) as child:  # fmt: skip
            try:
                out, err = child.communicate(timeout=limit_s)
            except BaseException:  # Ctrl-C as well: nothing may go on without us
                os.killpg(child.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(argv, child.returncode, out, err)


def _ignored(path: Path) -> dict:
    return {"ignore": shutil.ignore_patterns("__pycache__")} if path.is_dir() else {}


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if "error:" in line] or text.splitlines()
    return lines[0] if lines else ""
