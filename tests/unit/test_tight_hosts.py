"""Whatever a host denies, its user reads cause and cure, never a traceback: real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pycopy
from pycopy import errors

ROOT = Path(pycopy.__file__).parents[1]
COMMANDS = ["replay", "intercept", "lab", "demo", "detach"]
REPLAY = ["replay", "-x", "80-10.255.0.2:8080", "-i", "lo"]
INTERCEPT = ["intercept", "-F", "tcp and src port 8080", "-i", "lo"]


def run(prefix, argv, cwd="/", **options):
    """``pycopy argv`` behind the words of ``prefix``, which make its world tight."""
    words = [*prefix, sys.executable, "-P", "-m", "pycopy", *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    done = subprocess.run(words, cwd=cwd, env=environment, timeout=30, text=True, **options)
    for said in (done.stdout or "", done.stderr or ""):
        assert "Traceback" not in said, said
        assert "Exception ignored" not in said, said
        assert "this is a bug" not in said, said
    return done


def is_explained(done, status, *words):
    """The last two lines are a cause and its cure."""
    assert done.returncode == status, done.stderr
    cause, cure = done.stderr.splitlines()[-2:]
    assert cause.startswith("pycopy: error: ")
    assert cure.startswith("  ")
    for word in words:
        assert word in done.stderr


def shell(script):
    """A prefix: ``script`` first, then the command."""
    return ["sh", "-c", f'{script}\nexec "$@"', "sh"]


def mounted(script):
    """The same with a root file system and a network of its own."""
    return ["unshare", "-m", "-n", *shell(f"set -e\nip link set lo up\n{script}")]


def redirected(how):
    return ["sh", "-c", f'"$@" {how}', "sh"]


# -- the streams ---------------------------------------------------------------------------


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["help"], *([name, "--help"] for name in COMMANDS)]
)
def test_a_full_stdout(argv, unbuffered):
    done = run(redirected(">/dev/full"), argv, env={"PYTHONUNBUFFERED": unbuffered})
    is_explained(done, 1, "cannot write to stdout: No space left on device")


@pytest.mark.parametrize("how", ["2>/dev/full", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>&1"])
def test_nobody_hears_but_the_status_says_it(how):
    full = ">/dev/full" in how and "2>&1" in how
    assert run(redirected(how), ["--version"]).returncode == (1 if full else 0)
    for argv, status in (
        (["replay", "-x", "80"], 2),
        ([], 2),
        (["replay", "-x", "80-127.0.0.1:80"], 4),
    ):
        done = run(redirected(how), argv)
        assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_streams_are_closed_and_there_is_no_dev_null(root):
    prefix = [*mounted("mount -t tmpfs none /dev"), *redirected("<&- 2>&-")]
    assert run(prefix, ["--version"]).stdout == f"pycopy {pycopy.__version__}\n"
    log = [*REPLAY, "-l", "/dev/log", "-P", "/dev/pid", "-d"]
    done = run(mounted("mount -t tmpfs none /dev"), log)
    is_explained(done, 3, "/dev/null", "mknod")


# -- limits --------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [5, 6, 7, 8, 9])
def test_few_open_files(root, files):
    """Below 5 Python itself does not start, and says so."""
    for argv in (REPLAY, INTERCEPT):
        prefix = [*mounted("true"), "prlimit", f"--nofile={files}"]
        done = run(prefix, argv)
        assert done.returncode in (1, 3)
        assert done.stderr.splitlines()[-2].startswith("pycopy: error: ")
    assert run(["prlimit", f"--nofile={files}"], ["--version"]).returncode == 0


def test_little_memory():
    """From the least with which Python runs a module at all."""
    megabytes = 8
    while True:
        limit = ["prlimit", f"--as={megabytes << 20}"]
        least = [*limit, sys.executable, "-I", "-m", "typing"]
        if subprocess.run(least, capture_output=True, timeout=30).returncode == 0:
            break
        megabytes += 1
    statuses = set()
    for more_kb in range(0, 12 << 10, 700):
        limit = ["prlimit", f"--as={(megabytes << 20) + (more_kb << 10)}"]
        statuses.add(run(limit, ["--version"]).returncode)
    assert statuses <= {0, 1, 3}
    assert 0 in statuses


CAPABILITIES = "+net_admin,+net_raw,+bpf,+perfmon"
NOBODY = [
    "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
    f"--inh-caps={CAPABILITIES}", f"--ambient-caps={CAPABILITIES}",
]  # fmt: skip


def test_no_thread_and_no_process_can_be_started(root, tmp_path):
    none = ["prlimit", "--nproc=0", *NOBODY]
    is_explained(run(none, ["replay", "-x", "80"]), 2, "there is no '-'")
    # nobody may read neither this directory nor, perhaps, the package: both are brought along.
    prefix = mounted(f"mount --bind {ROOT} /mnt; mount --bind {tmp_path} /srv; chmod 777 /srv")
    argv = [*INTERCEPT, "-d", "-l", "/srv/log", "-P", "/srv/pid"]
    done = run([*prefix, *none], argv, env={"PYTHONPATH": "/mnt"})
    is_explained(done, 1, "more processes and threads")
    assert [each.name for each in tmp_path.iterdir()] == ["log"]


# -- what is not there ---------------------------------------------------------------------


@pytest.mark.parametrize("argv", [REPLAY, INTERCEPT, ["detach"], ["lab", "up"], ["demo"]])
def test_no_proc(root, argv):
    done = run(mounted("mount -t tmpfs none /proc"), argv)
    is_explained(done, 3, "/proc/self/status", "mount it")


def test_a_read_only_file_system(root, tmp_path):
    read_only = mounted("mount -t tmpfs none /run; mount -o remount,ro /run")
    is_explained(run(read_only, ["lab", "up"]), 1, "/run/pycopy-lab", "Read-only file system")
    for option in ("-l", "-P"):
        done = run(read_only, [*REPLAY, option, "/run/file"])
        is_explained(done, 1, "/run/file: Read-only file system", f"{option} FILE")


def test_a_working_directory_that_is_gone(tmp_path):
    gone = tmp_path / "gone"
    prefix = shell(f"mkdir {gone}; cd {gone}; rmdir {gone}")
    assert run(prefix, ["--version"]).returncode == 0
    for argv in (["-l", "log"], ["-P", "pid"]):
        program = (
            "import sys; from pycopy import cli; from pycopy.process import daemon\n"
            "cli._COMMANDS['test'] = lambda argv: daemon.run(\n"
            "    lambda: 0, detach=False, log_path=argv[1] if argv[0] == '-l' else '',\n"
            "    pid_path=argv[1] if argv[0] == '-P' else '')\n"
            "sys.exit(cli.main(sys.argv[1:]))"
        )
        done = subprocess.run(
            [*prefix, sys.executable, "-P", "-c", program, "test", *argv],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        is_explained(done, 1, "No such file or directory", f"{argv[0]} FILE")


def test_a_plain_locale_and_no_home():
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LANG": "C"}
    prefix = ["env", "-u", "HOME", "-u", "TERM"]
    for name in COMMANDS:
        assert run(prefix, [name, "--help"], env=plain).returncode == 0
    done = run(prefix, ["replay", "-x", b"80-\xc3\xa4\xff:80"], env=plain)
    is_explained(done, 2, "not an address")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("argparse", "a part of Python is missing: argparse"),
        ("pycopy.command.options", "a part of pycopy is missing: pycopy.command.options"),
        ("pycopy.errors", "cannot start"),
    ],
)
def test_a_missing_module_is_named(module, words):
    program = (
        f"import sys; sys.modules[{module!r}] = None; sys.path.insert(0, sys.argv.pop(1))\n"
        "from pycopy.__main__ import script; script()"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, ROOT, "--version"],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    is_explained(done, 3, words)


def test_a_missing_package_is_named_with_its_cure():
    for name in ("pyroute2", "rich"):
        known = errors.explain(ModuleNotFoundError(f"No module named {name!r}", name=name))
        assert (known.exit_status, known.cure) == (3, f"apt install python3-{name}")


def test_a_bug_is_no_fault_of_the_host():
    for error in (ValueError("x"), KeyError("x"), RuntimeError("x"), ZeroDivisionError()):
        assert errors.explain(error) is None
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from pycopy import cli\n"
        "def crash(argv): raise ZeroDivisionError('x')\n"
        "cli._COMMANDS['replay'] = crash\n"
        "cli.script()"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, ROOT, "replay"],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 1
    assert "ZeroDivisionError: x" in done.stderr
    assert "please report it" in done.stderr.splitlines()[-1]
