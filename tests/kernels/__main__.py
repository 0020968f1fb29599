"""``sudo python3 -m tests.kernels [KERNEL...]``: pycopy on stock kernels, and one table.

Each kernel is fetched (:mod:`.packages`), booted (:mod:`.guest`), and made to load all objects
and to copy real traffic (:mod:`.inside`). The exit status is 1 unless all is green.
"""

import argparse
import contextlib
import datetime
import functools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pycopy.errors import EXIT_INTERRUPTED, HostUnfit, PycopyError
from pycopy.lab.copying import Placement
from pycopy.lab.demo import interrupted_by_sigterm

from . import inside, packages, report, userlands
from .guest import CHECKOUT, EXCHANGE, PYTHON, Guest, follow

REQUESTS, QUICK_REQUESTS = 503, 101
QUICK_KERNELS = ("6.1", "6.12")
#: Only here are the legs impaired, since that takes as long as all else.
NETEM_KERNEL = "6.12"
HERE = "this host"
LIMIT_S = 1800
SECOND_COMPILER = "trixie"

_begin_s = time.monotonic()


def say(text):
    print(f"{time.monotonic() - _begin_s:6.0f} s  {text}", file=sys.stderr, flush=True)


def parse():
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.kernels", description=__doc__.partition(":")[0]
    )
    add = parser.add_argument
    add("kernels", nargs="*", metavar="KERNEL",
        help=f"a series such as 6.1 or 7.x, or IMAGE:MODULES ({' '.join(packages.DEFAULT_KERNELS)};"
        f" with --quick {' '.join(QUICK_KERNELS)})")  # fmt: skip
    add("--quick", action="store_true", help="as in CI: fewer requests, one family, one compiler")
    add("--here", action="store_true", help="on the running kernel, without a guest")
    add("--netem", action="store_true", help=f"impair the legs, too (on {NETEM_KERNEL} and --here)")
    add("--steps", default="objects,copies,kills", help="which of them (%(default)s)")
    add("--objects", action="append", default=[], metavar="DIR",
        help="more objects to load, made by 'pycopy bpf build --output DIR'")  # fmt: skip
    add("--compiler", metavar="SUITE", help="more objects to load, made by the compiler of"
        f" another Debian ({SECOND_COMPILER}; with --quick none)")  # fmt: skip
    add("--docs", type=Path, metavar="FILE", help="write the tables as Markdown, too")
    add("--refresh", action="store_true", help="look for newer packages of kernels that are there")
    add(
        "--jobs",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="guests at a time (%(default)s)",
    )
    add(
        "--limit",
        type=float,
        default=LIMIT_S,
        metavar="SECONDS",
        help="for each guest (%(default)s)",
    )
    add("--userland", metavar="SUITE", help="run demo and tests in that Debian's userland instead")
    add("--bare", action="store_true", help="with it: one without bcc and LLVM, every option")
    return parser.parse_args()


def plan_for(kernel, given, sets):
    """What is done on one kernel, as :mod:`.inside` reads it."""
    steps = given.steps.split(",")
    placements = [placement.value for placement in Placement]
    families = [4] if given.quick else [4, 6]
    impairments = [(each, leg) for each in inside.IMPAIRMENTS for leg in inside.LEGS]
    copies = [(placement, family) for placement in placements for family in families]
    return {
        "requests": QUICK_REQUESTS if given.quick else REQUESTS,
        "objects": sets if "objects" in steps else {},
        "copies": copies if "copies" in steps else [],
        "kills": ["self", "target"] if "kills" in steps else [],
        "netem": impairments if given.netem and kernel in (NETEM_KERNEL, HERE) else [],
    }


def object_sets(given, stack):
    """Compiler: directory, of the objects in the checkout and of all others that are asked for."""
    from pycopy.kernel import objects

    directories = [objects.objects_dir(), *map(Path, given.objects)]
    suite = given.compiler or ("" if given.quick else SECOND_COMPILER)
    if suite and "objects" in given.steps:
        made = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pycopy-objects-")))
        userlands.build_objects(suite, made, say)
        directories.append(made)
    sets = {}
    for directory in directories:
        manifest = objects.manifest(directory)
        if not manifest:
            raise PycopyError(f"no objects in {directory}", "make them: pycopy bpf build")
        sets[f"clang {manifest['compiler'].get('clang', '?')}"] = str(directory.resolve())
    return sets


def run_here(given, sets, exchange):
    say(f"{HERE}: {os.uname().release}")
    (exchange / "plan").write_text(json.dumps(plan_for(HERE, given, sets)))
    command = [PYTHON, "-P", "-m", "tests.kernels.inside"]
    command += [str(exchange / "plan"), str(exchange / "results")]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, check=False)
    return rows_of(HERE, exchange)


def run_guests(given, kernels, sets, exchange):
    """All kernels, some at a time; the rows of all, in the order of the kernels."""
    rows = {kernel.name: [] for kernel in kernels}

    def start(kernel):
        there = exchange / kernel.name
        there.mkdir()
        (there / "plan").write_text(json.dumps(plan_for(kernel.name, given, sets)))
        command = [PYTHON, "-P", "-m", "tests.kernels.inside"]
        command += [f"{EXCHANGE}/plan", f"{EXCHANGE}/results"]
        say(f"{kernel.name}: booting {kernel.release} ({kernel.version})")
        return Guest(kernel, command, there, limit_s=given.limit)

    def done(guest, error):
        name = guest.kernel.name
        rows[name] = rows_of(name, guest.exchange)
        say(f"{name}: {'ended' if error is None else error} after {guest.elapsed_s:.0f} s")
        if error is not None:
            rows[name].append(failed(name, "guest", str(error)))

    starters = [functools.partial(start, kernel) for kernel in kernels]
    follow(starters, given.jobs, lambda guest, line: say(f"{guest.kernel.name}: {line}"), done)
    return [row for kernel in kernels for row in rows[kernel.name]]


def rows_of(name, exchange):
    path = exchange / "results"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [{**json.loads(line), "kernel": name} for line in lines]


def failed(name, kind, problem):
    return {"kernel": name, "kind": kind, "good": False, "problem": problem, "seconds": 0.0}


def fetched(names, refresh):
    """The kernels that could be had, and a row for each that could not."""
    kernels, rows = [], []
    for name in names:
        say(f"{name}: fetching, unless it is there")
        try:
            kernels.append(packages.kernel(name, refresh))
        except PycopyError as error:
            say(f"{name}: {error}")
            rows.append(failed(name, "package", str(error)))
    return kernels, rows


def heading(kernels, sets):
    """The beginning of the page: what was run, when, on what."""
    command = shlex.join(["python3", "-m", "tests.kernels", *sys.argv[1:]])
    lines = [
        "Written by the command that CONTRIBUTING.md describes; not to be edited.",
        "",
        f"* Date: {datetime.date.today().isoformat()}",
        f"* Command: `sudo {command}`",
        f"* Compilers: {', '.join(sets)}",
    ]
    lines += [f"* {each.name}: {each.release}, package {each.version}" for each in kernels]
    return [
        *lines,
        "",
        "Kernels run emulated (qemu, TCG): the seconds say nothing of a real machine.",
    ]


def run(given):
    if os.geteuid() != 0:
        raise HostUnfit("the matrix needs root, as pycopy does", "run it with sudo")
    if given.userland:
        test = userlands.run_without_compiler if given.bare else userlands.run_tests
        return test(given.userland, say)
    names = given.kernels or (QUICK_KERNELS if given.quick else packages.DEFAULT_KERNELS)
    with contextlib.ExitStack() as stack:
        exchange = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pycopy-kernels-")))
        sets = object_sets(given, stack)
        if given.here:
            kernels, names = [], [HERE]
            rows = run_here(given, sets, exchange)
        else:
            kernels, rows = fetched(names, given.refresh)
            rows += run_guests(given, kernels, sets, exchange)
            names = list(
                dict.fromkeys([*(row["kernel"] for row in rows), *(k.name for k in kernels)])
            )
    print(report.text(rows, names))
    if given.docs:
        given.docs.write_text(report.markdown(rows, names, heading(kernels, sets)))
    return 1 if report.problems(rows, names) else 0


def main():
    given = parse()
    try:
        with interrupted_by_sigterm():
            return run(given)
    except PycopyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
