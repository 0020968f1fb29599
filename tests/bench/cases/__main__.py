"""``sudo python3 -m tests.bench.cases``: who copies everything, and whose sessions end?

Sets pycopy beside tcpcopy and intercept, when both of these are on PATH, on the same cases:
a bad network, odd targets, odd clients, real protocols. Every case gets, for each
replayer, a fresh lab of network namespaces, fresh servers and a fresh replayer. Prints a
table, and with --json writes the same and more. Progress and what went wrong go to stderr;
Ctrl-C takes everything down and still writes what there is. Times are no measurements of
speed: retransmission timers make them.
"""

import argparse
import fnmatch
import json
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from pycopy.errors import EXIT_INTERRUPTED, PycopyError
from pycopy.lab.copying import Placement
from pycopy.lab.topology import require_root

from .. import machine
from . import impaired, life, replayers
from .scene import Case, Row, measure

#: After the load's end; a segment lost five times running is repeated within 6 s.
LIMIT_S = 15.0

_COLUMNS = (
    ("requests online", 15), ("at the target", 13), ("lost", 6), ("surplus", 7),
    ("time to recover", 15), ("sessions left open", 18), ("ledger balanced", 15),
)  # fmt: skip


def _line(cells: Sequence[str]) -> str:
    case, replayer, *figures = cells
    widths = [width for _, width in _COLUMNS]
    return f"{case:<52}{replayer:<17}" + "".join(
        f"  {figure:>{width}}" for figure, width in zip(figures, widths, strict=True)
    )


def heading() -> str:
    return _line(["case", "replayer", *(name for name, _ in _COLUMNS)])


def text(row: Row) -> str:
    """One line of the table."""
    recovered = "never" if row.recovered_s is None else f"{row.recovered_s:.2f} s"
    balanced = {True: "yes", False: "NO", None: "-"}[row.balanced]
    figures = [str(each) for each in (row.online, row.target, row.lost, row.surplus)]
    cells = [row.case, row.replayer, *figures, recovered, str(row.left_open), balanced]
    return _line(cells) + (" *" if row.note else "")


def chosen(patterns: str) -> list[Case]:
    """The cases whose names match one of these: a part of the name, or a shell pattern."""
    wanted = [pattern.strip().lower() for pattern in patterns.split("|")]
    return [
        case
        for case in (*impaired.cases(), *life.cases())
        if any(fnmatch.fnmatchcase(case.name.lower(), f"*{pattern}*") for pattern in wanted)
    ]


def _names(given: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """The replayers asked for, as :func:`replayers.start` knows them."""
    names = []
    for name in given.replayers.split(","):
        if name == "pycopy":
            names += [f"pycopy-{placement}" for placement in given.placements.split(",")]
        elif name == "tcpcopy" and "tcpcopy" not in replayers.names():
            print("tcpcopy and intercept are not both on PATH: left out", file=sys.stderr)
        else:
            names.append(name)
    known = set(replayers.names()) - {"none"}
    for name in names:
        if name not in known:
            parser.error(f"no such replayer: {name}; there are: {', '.join(sorted(known))}")
    return names


def _run(
    cases: Iterable[Case], names: Sequence[str], given: argparse.Namespace, rows: list[Row]
) -> None:
    pairs = [
        (case, name)
        for case in cases
        for name in names
        if not case.pycopy_only or name.startswith("pycopy")
    ]
    for number, (case, name) in enumerate(pairs, 1):
        print(f"[{number}/{len(pairs)}] {case.name}: {name}", file=sys.stderr, flush=True)
        row = measure(
            case, name,
            limit_s=given.limit, lab_name=given.lab, options=tuple(given.options),
        )  # fmt: skip
        rows.append(row)
        if row.note:
            print(f"    * {row.note}", file=sys.stderr, flush=True)
        print(text(row), flush=True)


def _write(path: str, rows: Sequence[Row]) -> None:
    document = {
        "machine": machine.describe(),
        "command": sys.argv,
        "rows": [asdict(row) for row in rows],
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.write("\n")


def _parser() -> argparse.ArgumentParser:
    placements = ",".join(placement.value for placement in Placement)
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.bench.cases",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="lost: asked online and never at the target. surplus: at the target and never\n"
        "asked. time to recover: from the load's end until the target had everything.\n"
        "left open: connections at the target that are not over at the end of the wait.\n"
        "*: something else went wrong, told on stderr and in the JSON.",
    )
    parser.add_argument("--only", default="*", metavar="PATTERN",
                        help="in the name of a case; several: 'loss 1|redis'")  # fmt: skip
    parser.add_argument("--replayers", default="pycopy,tcpcopy", help="in this order")
    parser.add_argument("--placements", default=Placement.ASSISTANT.value,
                        help=f"of pycopy: {placements} (default: assistant)")  # fmt: skip
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS",
                        help="after the load's end, then it is never (default: 15)")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write all rows, with more detail")
    parser.add_argument("--lab", default="pycopy-cases", metavar="NAME",
                        help="name of the lab; two of one name cannot run at once")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="name the cases and do nothing")
    parser.add_argument("options", nargs="*", help="more options for pycopy replay, after --")
    return parser


def main() -> int:
    parser = _parser()
    given = parser.parse_args()
    cases = chosen(given.only)
    if given.list:
        print("\n".join(case.name for case in cases))
        return 0
    if not cases:
        parser.error(f"no case matches --only {given.only!r}; --list names them")
    names = _names(given, parser)
    try:
        require_root()
    except PycopyError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_status
    # A run that is cut short, as by timeout(1), takes its lab down as after Ctrl-C; and a
    # shell's background job, which is begun with SIGINT ignored, can be interrupted as well.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    rows: list[Row] = []
    status = 0
    print(machine.one_line(machine.describe()))
    print(heading(), flush=True)
    try:
        _run(cases, names, given, rows)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = EXIT_INTERRUPTED
    except PycopyError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        status = error.exit_status
    finally:
        if given.json:
            _write(given.json, rows)
    return status


if __name__ == "__main__":
    sys.exit(main())
