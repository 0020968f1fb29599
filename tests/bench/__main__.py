"""``sudo python3 -m tests.bench``: rates, losses and costs of replayers, side by side.

For each load and rate every replayer in turn gets a fresh lab and the same open-loop load
(requests are due whatever the answers do); the order alternates from round to round, so
that a drift of the machine hits all alike. Prints a table and, with --json, every cell with
the machine described. Nothing else should run on the machine. docs/performance.md says how
to read the figures.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pycopy.errors import PycopyError, UsageError
from pycopy.lab.topology import require_root

from . import catalogue, ceiling, check, machine, report
from .catalogue import Replayer
from .cell import Bench, Cell
from .loads import LOADS, compiled
from .report import Ceiling

#: Of the machine, before the first cell.
_NOISY_SHARE = 0.05
_IDLE_CLOCK_ERROR = 0.1


@dataclass
class Run:
    """What was asked for, and what has been measured so far."""

    bench: Bench
    replayers: list[Replayer]
    rounds: int
    json_path: str
    document: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)
    ceilings: list[Ceiling] = field(default_factory=list)
    #: Of the service without replay, the online host on CPUs of its own.
    alone: list[Ceiling] = field(default_factory=list)

    def of_kinds(self, *kinds: str) -> list[Replayer]:
        return [one for one in self.replayers if one.kind in kinds]

    def keep(self, cell: Cell) -> Cell:
        """Say how it went, and write everything down: a long run may be cut short."""
        self.cells.append(cell)
        fate = ceiling.verdict(cell) or "good"
        _say(
            f"{cell.stage} {cell.load} {cell.rate or 'max'} round {cell.round + 1} "
            f"{cell.replayer}: {fate}"
        )
        self.save()
        return cell

    def measure(
        self, replayers: list[Replayer], load: str, rate: int, stage: str, *,
        rounds: int, loss_percent: float = 0.0,
    ) -> None:  # fmt: skip
        """One row of every replayer."""
        for number in range(rounds):
            for replayer in replayers if number % 2 == 0 else reversed(replayers):
                self.keep(self._cell(replayer, load, rate, stage, number, loss_percent))

    def _cell(
        self, replayer: Replayer, load: str, rate: int, stage: str, number: int,
        loss_percent: float,
    ) -> Cell:  # fmt: skip
        try:
            return self.bench.measure(replayer, LOADS[load], rate, stage, number, loss_percent)
        except PycopyError as error:  # one replayer that does not start is no end of the rest
            cell = Cell(replayer.name, replayer.kind, load, rate, stage, number, loss_percent)
            cell.problems.append(str(error))
            return cell

    def find_ceilings(self, load: str) -> None:
        replayers = self.of_kinds("baseline", "floor", "pycopy", "original", "other")
        self.ceilings += ceiling.ceilings(self.bench, replayers, load, self.rounds, self.keep)
        self.save()

    def measure_at_half(self, load: str) -> None:
        """Latency at half of what the service keeps alone, the online host on its own CPUs."""
        apart = replace(self, bench=replace(self.bench, cpus=machine.apart()))
        baseline = self.of_kinds("baseline")
        found = ceiling.ceilings(apart.bench, baseline, load, self.rounds, apart.keep)
        self.alone += found
        if found:
            half = statistics.median_low(one.rate for one in found) // 2
            replayers = self.of_kinds("baseline", "floor", "pycopy", "original")
            apart.measure(replayers, load, half, "half", rounds=self.rounds)

    def save(self) -> None:
        if not self.json_path:
            return
        document = {
            **self.document,
            "ceilings": [asdict(one) for one in self.ceilings],
            "alone": [asdict(one) for one in self.alone],
            "cells": [asdict(one) for one in self.cells],
        }
        text = json.dumps(document, indent=1)
        Path(self.json_path).write_text(text + "\n", encoding="utf-8")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="loads: " + "; ".join(f"{one.name}, {one.about}" for one in LOADS.values()),
    )  # fmt: skip
    parser.add_argument("--replayers", default="", help="comma separated (all that can run)")
    parser.add_argument(
        "--path", action="append", default=[], metavar="NAME=DIR",
        help="a build of tcpcopy and intercept: they become replayers ...@NAME; repeatable",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="say which replayers can run, and end")
    parser.add_argument("--loads", default="keepalive,short,answers20k")
    parser.add_argument(
        "--rates", default="", metavar="N,...|LOAD=N,...",
        help="requests per second, for every load or by name (each load's own)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, help="paired runs of each cell (1; --check: 5)")
    parser.add_argument("--seconds", type=float, default=5, help="of load in each cell (5)")
    parser.add_argument(
        "--loss", type=float, default=0.0, metavar="PERCENT",
        help="of the segments towards the target; offloads are off then",
    )  # fmt: skip
    parser.add_argument(
        "--ceiling", action="store_true", help="search the highest rate without loss instead"
    )
    parser.add_argument(
        "--half", action="store_true",
        help="latency at half the rate that the service keeps without replay, instead of fixed"
        " rates; the online host on one half of the CPUs, everything else on the other",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true",
        help="costs, ceilings, latency at half the ceiling, loss and uploads, held against"
        " the requirement of the fast path; takes two or three hours with all replayers",
    )  # fmt: skip
    parser.add_argument("--json", default="", metavar="FILE", help="write every cell here")
    parser.add_argument(
        "--from", default="", dest="read", metavar="FILE",
        help="measure nothing: tables, and with --check the verdicts, of an earlier --json",
    )  # fmt: skip
    parser.add_argument(
        "--no-bpf-stats", action="store_true",
        help="do not time BPF programs, which costs about 0.05 us each time one runs",
    )  # fmt: skip
    parser.add_argument("options", nargs="*", help="more options for pycopy replay, after --")
    return parser


def _plan(loads: str, rates: str) -> Iterator[tuple[str, int]]:
    """Load and rate of each row."""
    named: dict[str, list[int]] = {}
    for item in filter(None, rates.split(",")):
        load, equals, number = item.rpartition("=")
        if not number.isdigit() or (equals and load not in LOADS):
            raise UsageError(f"--rates {item}: not a rate", "write 4000, or keepalive=4000")
        named.setdefault(load, []).append(int(number))
    for load in loads.split(","):
        if load not in LOADS:
            raise UsageError(f"there is no load {load}", f"one of {', '.join(LOADS)}")
        fixed = LOADS[load].rate
        for rate in (named.get(load) or named.get("") or [fixed]) if fixed else [0]:
            yield load, rate


def _measure(run: Run, given: argparse.Namespace) -> None:
    plan = list(_plan(given.loads, given.rates))
    if (given.ceiling or given.half) and not given.check:
        for load in dict.fromkeys(load for load, _ in plan):
            if given.ceiling:
                run.find_ceilings(load)
            if given.half:
                run.measure_at_half(load)
        return
    for load, rate in plan:
        run.measure(run.replayers, load, rate, "loss" if given.loss else "cost",
                    rounds=run.rounds, loss_percent=given.loss)  # fmt: skip
    if not given.check:
        return
    for load in check.CEILING_LOADS:
        run.find_ceilings(load)
        run.measure_at_half(load)
    mine = run.of_kinds("pycopy")
    for load, rate in plan:
        run.measure(mine, load, rate, "loss", rounds=1, loss_percent=check.LOSS_PERCENT)
    for load in ("uploads100k", "uploads1m"):
        run.measure(run.of_kinds("baseline", "pycopy", "original"), load, LOADS[load].rate,
                    "uploads", rounds=1)  # fmt: skip


def _print(cells: list[Cell], ceilings: list[Ceiling], checked: bool) -> bool:
    """The tables; whether every line of --check passed."""
    rows = [cell for cell in cells if cell.stage != "ceiling"]
    if rows:
        print(report.table(rows), end=f"\n\n{report.LEGEND}\n")
    if ceilings:
        print(f"\n{report.ceilings_table(ceilings)}")
    for problem in dict.fromkeys(text for cell in rows for text in cell.problems):
        print(f"\nproblem: {problem}")
    if not checked:
        return True
    lines = check.check(cells, ceilings)
    print("\n" + "\n".join(map(str, lines)))
    return all(line.passed for line in lines)


def _document(builds: dict[str, str], replayers: list[Replayer]) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "-c", "safe.directory=*", "describe", "--always", "--dirty"],
        capture_output=True, text=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    background = machine.background()
    return {
        "machine": machine.describe(),
        "background": round(background, 4),
        "idle_clock_error": round(machine.idle_clock_error(background), 4),
        "command": ["python3", "-m", "tests.bench", *sys.argv[1:]],
        "pycopy": commit.stdout.strip(),
        "builds": builds,
        "replayers": {one.name: one.adapter.about for one in replayers},
    }


def _run(given: argparse.Namespace) -> int:
    if given.read:
        document = json.loads(Path(given.read).read_text(encoding="utf-8"))
        print(machine.one_line(document["machine"]), end="\n\n")
        cells = [Cell(**one) for one in document["cells"]]
        ceilings = [Ceiling(**one) for one in document["ceilings"]]
        return 0 if _print(cells, ceilings, given.check) else 1
    builds = {}
    for item in given.path:
        name, equals, folder = item.partition("=")
        if not equals or not Path(folder).is_dir():
            raise UsageError(f"--path {item}: not NAME=DIRECTORY", "--path single=/opt/single/sbin")
        builds[name] = folder
    if given.list:
        good, bad = catalogue.available(builds)
        for name, one in good.items():
            print(f"{name:<28}{one.adapter.about}")
        for name, why in bad.items():
            print(f"{name:<28}cannot run: {why}")
        return 0
    require_root()
    replayers = catalogue.choose(given.replayers, builds, given.options)
    list(_plan(given.loads, given.rates))  # what is wrong with it is said before the first cell
    document = _document(builds, replayers)
    print(machine.one_line(document["machine"]), flush=True)
    if document["background"] > _NOISY_SHARE:
        _say(
            f"warning: {document['background']:.0%} of the machine is busy with something else:"
            " the figures are not to be trusted"
        )
    elif abs(document["idle_clock_error"]) > _IDLE_CLOCK_ERROR:
        _say(
            f"warning: idle time is off by {document['idle_clock_error']:.0%} for short work:"
            " figures of the machine are not to be trusted, those of processes are"
        )
    with compiled() as program:
        bench = Bench(program, given.seconds, not given.no_bpf_stats)
        rounds = given.rounds or (check.ROUNDS if given.check else 1)
        run = Run(bench, replayers, rounds, given.json, document)
        try:
            _measure(run, given)
        except KeyboardInterrupt:
            _say("interrupted: this is what was measured until then")
    print()
    return 0 if _print(run.cells, run.ceilings, given.check) else 1


def main() -> int:
    given = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        return _run(given)
    except PycopyError as error:
        _say(f"bench: {error}")
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
