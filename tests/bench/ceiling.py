"""The highest constant rate without loss, by doubling and bisection.

A rate is good when nothing was lost and the load was kept: answered, all of it, and in
time. A bad rate gets a second chance, for a hiccup of the machine is no ceiling.
"""

from collections.abc import Callable, Iterable

from .catalogue import Replayer
from .cell import Bench, Cell
from .loads import LOADS
from .report import Ceiling

LOWEST, HIGHEST = 100, 400_000
PRECISION = 0.05
_FIRST_STEP, _LATER_STEP = 2.0, 1.2


def search(trial: Callable[[int], str], start: int, step: float = 2.0) -> tuple[int, str]:
    """The highest rate for which ``trial`` says nothing, and what it says above that."""

    def verdict(rate: int) -> str:
        return trial(rate) and trial(rate)

    good, bad, reason = 0, 0, ""
    rate = start
    while not (good and bad):
        said = verdict(rate)
        if said:
            bad, reason = rate, said
            rate = int(rate / step)
        else:
            good = rate
            rate = int(rate * step)
        if rate < LOWEST or rate > HIGHEST:
            return good, reason or "the search ends here"
    while bad > good * (1 + PRECISION):
        rate = (good + bad) // 2
        said = verdict(rate)
        if said:
            bad, reason = rate, said
        else:
            good = rate
    return good, f"{bad:,}: {reason}"


def verdict(cell: Cell) -> str:
    """What is wrong with a cell, all of it; "" when nothing is."""
    wrong = [problem.partition("; it said")[0] for problem in cell.problems]
    if cell.kind != "floor" and cell.lost:
        why = ", ".join(f"{name} {count:,}" for name, count in cell.fates.items())
        wrong.append(f"{cell.lost:,} of {cell.requests:,} lost" + (f" ({why})" if why else ""))
    if cell.balanced is False:
        wrong.append("the ledger does not balance")
    if cell.errors:
        wrong.append("the service failed: " + ", ".join(cell.errors))
    if not cell.kept:
        wrong.append(f"the service fell behind by {cell.behind_s:.2f} s")
    if not cell.copies_kept:
        wrong.append(f"the copies fell behind by {cell.copies_behind_s:.2f} s")
    return "; ".join(wrong)


def ceilings(
    bench: Bench, replayers: Iterable[Replayer], load: str, rounds: int,
    measured: Callable[[Cell], Cell],
) -> list[Ceiling]:  # fmt: skip
    """Of each replayer, ``rounds`` times; every trial passes through ``measured``."""
    names = list(replayers)
    found: list[Ceiling] = []
    starts: dict[str, int] = {}
    for number in range(rounds):
        for replayer in names if number % 2 == 0 else reversed(names):

            def trial(rate: int, replayer: Replayer = replayer, number: int = number) -> str:
                cell = bench.measure(replayer, LOADS[load], rate, "ceiling", number)
                return verdict(measured(cell))

            known = starts.get(replayer.name, 0)
            rate, limit = search(
                trial, known or 2 * LOADS[load].rate, _LATER_STEP if known else _FIRST_STEP
            )
            starts[replayer.name] = rate
            found.append(Ceiling(replayer.name, replayer.kind, load, number, rate, limit))
    return found
