"""The userland of another Debian: another Python, another bcc, another clang, one kernel.

A debootstrap root in the cache directory, made once. What runs there sees the checkout at its
own path, and writes to a layer in memory, and where it is told to. All mounts are in a private
mount namespace, so that they go with the process, ``kill -9`` included.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys

from pycopy.errors import HostUnfit, PycopyError

from . import packages
from .guest import CHECKOUT, PYTHON, die_with_parent

#: What pycopy, its lab and its tests need; the packages of contrib/setup, without the databases.
PACKAGES = (
    "python3 python3-bpfcc python3-pyroute2 python3-rich libpcap0.8t64 iproute2 ethtool nginx"
    " python3-pytest python3-hypothesis python3-pytest-timeout python3-pytest-xdist"
    " python3-scapy procps tcpdump kmod curl"
).split()
#: What compiles BPF programs, and brings clang and LLVM along.
COMPILER = "python3-bpfcc"
#: Names that changed from one suite to the next.
_RENAMED = {"bookworm": {"libpcap0.8t64": "libpcap0.8"}}
_PYTHON = ["env", "PYTHONDONTWRITEBYTECODE=1", f"PYTHONPATH={CHECKOUT}", PYTHON]
TIERS = ("tests/unit", "tests/sessions", "tests/bpf")
#: What must not be in a root without a compiler.
_COMPILERS = ("libbcc*", "libLLVM*", "libclang*", "llvm-*", "bcc")

#: Where a command is run: $1 the root, $2 the checkout, $3 what it may write to ("" nothing).
_ENTER = """\
set -e
root=$1 checkout=$2 output=$3
shift 3
layer=$root.layer
mkdir -p "$layer"
mount -t tmpfs -o mode=755 layer "$layer"
mkdir "$layer/upper" "$layer/work" "$layer/root"
mount -t overlay -o "lowerdir=$root,upperdir=$layer/upper,workdir=$layer/work" o "$layer/root"
cd "$layer/root"
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs -o mode=755 run run
mkdir -p "$layer/checkout" "$layer/scratch" "./$checkout"
mount -t overlay -o "lowerdir=$checkout,upperdir=$layer/checkout,workdir=$layer/scratch" o \\
    "./$checkout"
if [ -n "$output" ]; then
    mkdir -p "./$output"
    mount --bind "$output" "./$output"
fi
exec chroot . /bin/sh -c 'cd "$0" && exec "$@"' "$checkout" "$@"
"""


def root(suite, say=print, *, compiler=True):
    """The root of that suite, made unless it is there; without ``compiler`` no bcc and no LLVM."""
    made = packages.directory() / (f"userland-{suite}" if compiler else f"userland-{suite}-bare")
    with packages.locked(f"{made.name}.lock"):
        if not (made / "complete").exists():
            say(f"making the {made.name} (one to two minutes)")
            _make(suite, made, compiler)
    return made


def _make(suite, made, compiler):
    if shutil.which("debootstrap") is None:
        raise HostUnfit("debootstrap is not installed", "run contrib/setup kernels")
    shutil.rmtree(made, ignore_errors=True)
    renamed = _RENAMED.get(suite, {})
    names = [renamed.get(name, name) for name in PACKAGES if compiler or name != COMPILER]
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(names)}"]
    command += [f"--keyring={packages.KEYRING}", suite, str(made), packages.mirrors()[0]]
    # In a namespace of its own, so that what it mounts there cannot stay.
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        said = "\n    ".join(done.stdout.strip().splitlines()[-8:])
        raise PycopyError(
            f"debootstrap of {suite}: status {done.returncode}:\n    {said}",
            "see what it says above, and debootstrap/debootstrap.log in the root",
        )
    for archive in made.glob("var/cache/apt/archives/*.deb"):
        archive.unlink()
    (made / "complete").touch()


def run(where, command, output=None, **options):
    """Run a command in that root, in the directory of the checkout; its CompletedProcess.

    ``output`` is a directory that it may write to. The command and all that it started end
    with this process: they have a process namespace of their own.
    """
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
    unshared = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation=private"]
    script = ["/bin/sh", "-c", _ENTER, "sh", str(where), str(CHECKOUT), str(output or "")]
    child = subprocess.Popen(
        [*unshared, *script, *command], env=environment, preexec_fn=die_with_parent, **options
    )
    try:
        out, err = child.communicate()
    except BaseException:
        child.send_signal(signal.SIGKILL)
        child.wait()
        raise
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def build_objects(suite, output, say=print):
    """The BPF objects as that suite's compiler makes them, into a directory; their count."""
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    where = root(suite, say)
    say(f"compiling the BPF objects by {suite}'s compiler")
    command = [PYTHON, "-P", "-m", "pycopy", "bpf", "build", "--output", str(output)]
    command = ["env", f"PYTHONPATH={CHECKOUT}", "PYTHONDONTWRITEBYTECODE=1", *command]
    done = run(where, command, output, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise PycopyError(f"in {suite}: {shlex.join(command)}: {done.stdout[-2000:]}")


def run_tests(suite, say):
    """The demonstration and the tiers that need no databases, there; 0 if all are well."""
    where = root(suite, say)
    workers = str(2 * (os.cpu_count() or 1))
    return _run_all(suite, where, say, (
        [*_PYTHON, "-m", "pycopy", "demo", "--requests", "2003", "--connections", "101"],
        [*_PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-n", workers,
         "--dist", "loadgroup", *TIERS],
    ))  # fmt: skip


def run_without_compiler(suite, say):
    """Every option, in a root that has neither bcc nor LLVM; 0 if all are well."""
    where = root(suite, say, compiler=False)
    found = [str(path) for name in _COMPILERS for path in where.glob(f"usr/lib/**/{name}")]
    if found:
        raise PycopyError(f"{where} has a compiler: {', '.join(found)}", "remove the directory")
    test = ["-m", "pytest", "-p", "no:cacheprovider", "tests/lab/test_no_compiler.py"]
    return _run_all(suite, where, say, ([*_PYTHON, *test],))


def _run_all(suite, where, say, commands):
    failed = []
    for command in commands:
        text = shlex.join(command[3:])
        say(f"{suite}: {text}")
        if run(where, command).returncode != 0:
            failed.append(text)
    for text in failed:
        print(f"{suite}: failed: {text}", file=sys.stderr)
    return 1 if failed else 0
