"""``pycopy demo``: copy real traffic between real servers, and count what arrived.

Builds a lab, starts nginx online and nginx as target, and for every placement and address
family drives real HTTP load against the online server while pycopy copies it. Ends with a
table; the exit status is non-zero if one request was lost or a ledger did not balance.
Knows pycopy only from outside, by its command lines.
"""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from pycopy.errors import EXIT_FAILED, EXIT_OK, HostUnfit, PycopyError
from pycopy.lab.copying import Copying, LoadRun, Placement, wait_settled
from pycopy.lab.servers import Nginx, Server, nginx_binary
from pycopy.lab.topology import Lab, require_root

NAME = "pycopy-demo"
#: Requests per second: well inside what one core copies, so that the table shows losses of
#: pycopy's making, not those of a machine that has no time for it.
RATE = 2_000
#: Sizes of the answers, in turn; nginx serves them as files.
ANSWERS = (1, 211, 1009, 10007, 100003)


@dataclass
class Row:
    """One line of the table."""

    placement: str
    family: int
    online: int = 0
    target: int = 0
    lost: int = 0
    surplus: int = 0
    kernel_percent: float = 0.0
    balanced: bool = False
    seconds: float = 0.0
    problem: str = ""

    @property
    def good(self) -> bool:
        """Everything asked online was asked at the target, once, and all is accounted for."""
        copied = self.online > 0 and not self.lost and not self.surplus
        return copied and self.balanced and not self.problem

    def cells(self) -> tuple[str, ...]:
        """One text for each of HEADINGS."""
        lost = f"{self.lost:,}" + (f" (+{self.surplus:,} unasked)" if self.surplus else "")
        return (
            self.placement,
            f"IPv{self.family}",
            f"{self.online:,}",
            f"{self.target:,}",
            lost,
            f"{self.kernel_percent:.1f} %",
            "yes" if self.balanced else "NO",
            f"{self.seconds:.1f}",
        )


HEADINGS = (
    "placement", "family", "online", "at target", "lost", "in kernel", "ledger balanced", "seconds",
)  # fmt: skip
#: Less than that of healthy traffic, and something is wrong with the fast path.
KERNEL_PERCENT = 95


def run(
    placements: Sequence[str],
    families: Sequence[int],
    requests: int,
    connections: int,
    as_json: bool = False,
) -> int:
    """The whole demonstration; the exit status. Ctrl-C and SIGTERM take everything down.

    Raises PycopyError if the host is unfit.
    """
    require_root()
    nginx_binary()
    rows: list[Row] = []
    try:
        _run_rows(rows, placements, families, requests, connections)
    except OSError as error:
        if Lab(NAME).is_built():
            raise
        raise PycopyError(f"the lab went away meanwhile: {error}", "run it again") from None
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        _print_table(rows)
    if all(row.good for row in rows):
        _say(f"\n{sum(row.online for row in rows):,} requests copied, 0 lost, ledgers balanced")
        return EXIT_OK
    _say("\nnot all is well: see the table and the messages above it")
    return EXIT_FAILED


def _run_rows(
    rows: list[Row],
    placements: Sequence[str],
    families: Sequence[int],
    requests: int,
    connections: int,
) -> None:
    """Everything that needs the lab; a row is in ``rows`` as soon as it has begun."""
    with (
        interrupted_by_sigterm(),
        Lab(NAME) as lab,
        Nginx(lab, "online", 80, ANSWERS) as online,
        Nginx(lab, "target", 8080, ANSWERS) as target,
    ):
        _say("nginx on port 80 of the host online, and on port 8080 of the host target")
        _say("the same hosts, to repeat this by hand: pycopy lab up; pycopy lab shell ROLE")
        for placement in placements:
            for family in families:
                _say(f"\n{placement}, IPv{family}")
                row = Row(placement, family)
                rows.append(row)
                _copy(lab, online, target, row, requests, connections)
                _say(f"  {row.problem or f'{row.target:,} requests at the target'}")


def _copy(
    lab: Lab, online: Server, target: Server, row: Row, requests: int, connections: int
) -> None:
    """One placement and family: fill ``row``. Only an unfit host ends the demonstration."""
    mark = f"id={row.placement}{row.family}-"
    begin_s = time.monotonic()
    before = target.count()
    try:
        copying = Copying(lab, Placement(row.placement), row.family)
        for role, line in copying.commands():
            _say(f"  {role}# {line}")
        with copying:
            arguments = _load_arguments(requests, connections, mark)
            load = LoadRun(lab, row.family, "online", 80, *arguments)
            _follow(load, lambda: target.count() - before, requests)
            result = load.result()
            wait_settled(lambda: target.count() - before, requests)
            outcome = copying.stop()
        row.balanced, row.kernel_percent = outcome.balanced, outcome.kernel_percent
        if outcome.fastpath != "on":
            row.problem = f"the fast path was {outcome.fastpath}"
        elif row.kernel_percent < KERNEL_PERCENT:
            row.problem = f"only {row.kernel_percent} % of the segments stayed in the kernel"
        if not result["ok"]:
            row.problem = f"the online service failed: {result['errors']}"
    except HostUnfit:
        raise
    except PycopyError as error:
        row.problem = str(error)
    asked, copied = online.served().matching(mark), target.served().matching(mark)
    row.online, row.target = asked.count, copied.count
    row.lost, row.surplus = asked.lost(copied).total(), asked.surplus(copied).total()
    row.seconds = round(time.monotonic() - begin_s, 1)


def _load_arguments(requests: int, connections: int, mark: str) -> list[str]:
    # A third are short connections, the others share the rest and are kept alive.
    short = connections // 3 if requests > connections else connections
    return [
        *("--requests", str(requests), "--connections", str(connections), "--short", str(short)),
        *("--answers", ",".join(str(size) for size in ANSWERS), "--rate", str(RATE)),
        *("--id", mark.removeprefix("id="), "--time-limit", str(requests / RATE * 2 + 30)),
    ]


def _follow(load: LoadRun, arrived: Callable[[], int], requests: int) -> None:
    """Show the copies arriving while the load runs: one redrawn line, on a terminal only."""
    live = sys.stderr.isatty()
    while load.running:
        if live:
            sys.stderr.write(f"\r  {arrived():,} of {requests:,} at the target")
            sys.stderr.flush()
        time.sleep(0.1)
    if live:
        sys.stderr.write("\r\033[K")


def _print_table(rows: list[Row]) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*HEADINGS)
        for row in rows:
            table.add_row(*row.cells(), style="" if row.good else "red")
        Console().print(table)
        return
    lines = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join(cells).rstrip())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that what was built is taken down either way."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
