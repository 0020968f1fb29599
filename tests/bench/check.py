"""What the fast path has to reach, held against a run (``--check``).

Each line is one ratio with its limit, for each pycopy replayer that was measured; what was
not measured says so and is no pass. Reads cells and ceilings and nothing else.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .cell import Cell
from .report import Ceiling, Group, groups

MACHINE_RATIO = {"keepalive": 0.5, "short": 0.5, "answers20k": 0.5}
OWN_RATIO = {"keepalive": 0.15, "answers20k": 0.15, "short": 0.25}
KERNEL_SHARE = {"keepalive": 0.99, "short": 0.95}
CEILING_LOADS = ("keepalive", "short")
CEILING_RATIO = 2.0
#: Ceilings are found to 5 %: as close as that, the machine's own is reached.
CEILING_REACHED = 0.95
P99_RATIO = 1.1
LOSS_PERCENT = 1.0
ROUNDS = 5


@dataclass
class Line:
    """One requirement and what was measured; ``passed`` None is: not measured."""

    what: str
    measured: str
    limit: str
    passed: bool | None

    def __str__(self) -> str:
        word = {True: "pass", False: "FAIL", None: "----"}[self.passed]
        return f"{word}  {self.what}: {self.measured} ({self.limit})"


def check(cells: list[Cell], ceilings: list[Ceiling]) -> list[Line]:
    """Every line of the requirement, in its order."""
    grouped = groups(cells)
    cost = {
        (load, rate): group for (stage, load, rate), group in grouped.items() if stage == "cost"
    }
    lines: list[Line] = []
    for title, limits, figure in (
        ("machine time added per request, to the original's", MACHINE_RATIO,
         lambda group, name: group.ratio(name, group.added_us)),
        ("own CPU per request, to the original's", OWN_RATIO,
         lambda group, name: group.ratio(name, group.own_us)),
    ):  # fmt: skip
        lines += _at_most(cost, title, limits, figure)
    for load in CEILING_LOADS:
        lines += _ceiling(load, [one for one in ceilings if one.load == load])
    lines += _kernel_share(cost)
    half = {
        (load, rate): group for (stage, load, rate), group in grouped.items() if stage == "half"
    }
    lines += _at_most(
        half, "p99 at half the service's ceiling, to that without replay",
        dict.fromkeys(CEILING_LOADS, P99_RATIO), lambda group, name: group.p99_ratio(name),
    )  # fmt: skip
    return [*lines, *_losses(cells)]


def _rounds(count: int) -> str:
    return f"n={count}" if count >= ROUNDS else f"n={count}, {ROUNDS} are wanted"


def _at_most(
    measured: dict[tuple[str, int], Group], title: str, limits: dict[str, float],
    figure: Callable[[Group, str], float | None],
) -> Iterator[Line]:  # fmt: skip
    for load, limit in limits.items():
        found = False
        for (of, rate), group in measured.items():
            for name in group.of_kind("pycopy") if of == load else []:
                value = figure(group, name)
                if value is None:
                    continue
                found = True
                full = limits is MACHINE_RATIO and group.full(name)
                yield Line(
                    f"{title}, {load} {rate:,}/s, {name}",
                    f"{value:.3f}, {_rounds(len(group.cells(name)))}"
                    + (", but the machine was full" if full else ""),
                    f"at most {limit}",
                    value <= limit and not full and len(group.cells(name)) >= ROUNDS,
                )
        if not found:
            yield Line(f"{title}, {load}", "not measured", f"at most {limit}", None)


def _ceiling(load: str, found: list[Ceiling]) -> Iterator[Line]:
    title = f"highest rate without loss, {load}"
    limit = f"at least {CEILING_RATIO} x the best original's, or all that the servers do"

    def best(*kinds: str) -> dict[str, float]:
        names = dict.fromkeys(one.replayer for one in found if one.kind in kinds)
        return {
            name: statistics.median(one.rate for one in found if one.replayer == name)
            for name in names
        }

    mine, theirs, servers = best("pycopy"), best("original"), best("baseline", "floor")
    if not mine or not (theirs or servers):
        yield Line(title, "not measured", limit, None)
    for name, rate in mine.items():
        rounds = sum(one.replayer == name for one in found)
        said, passed = [f"{rate:,.0f}/s"], False
        if theirs:
            original = max(theirs.values())
            said.append(f"{rate / max(1, original):.2f} x the original's {original:,.0f}/s")
            passed = rate >= CEILING_RATIO * original
        if servers:
            which = min(servers, key=lambda one: servers[one])
            said.append(f"{rate / max(1, servers[which]):.2f} x {servers[which]:,.0f}/s ({which})")
            passed = passed or rate >= CEILING_REACHED * servers[which]
        said.append(_rounds(rounds))
        yield Line(f"{title}, {name}", ", ".join(said), limit, passed and rounds >= ROUNDS)


def _kernel_share(cost: dict[tuple[str, int], Group]) -> Iterator[Line]:
    for load, limit in KERNEL_SHARE.items():
        title, wanted = f"segments that stay in the kernel, {load}", f"at least {limit:.0%}"
        shares = {
            (name, rate): [cell.kernel_share for cell in group.cells(name)]
            for (of, rate), group in cost.items()
            if of == load
            for name in group.of_kind("pycopy")
        }
        for (name, rate), values in shares.items():
            known = [value for value in values if value is not None]
            said = f"{min(known):.2%}" if known else "no such section in the ledger"
            passed = min(known) >= limit if known else None
            yield Line(f"{title} {rate:,}/s, {name}", said, wanted, passed)
        if not shares:
            yield Line(title, "not measured", wanted, None)


def _losses(cells: list[Cell]) -> Iterator[Line]:
    """Searches for a ceiling lose on purpose: they are not asked."""
    mine = [cell for cell in cells if cell.kind == "pycopy" and cell.stage != "ceiling"]
    kinds = {
        "0 lost and the ledger balanced in every cell": [
            cell for cell in mine if not cell.loss_percent
        ],
        f"the same with {LOSS_PERCENT:g} % loss injected": [
            cell for cell in mine if cell.loss_percent >= LOSS_PERCENT
        ],
        "uploads of 1 MB back to back complete": [
            cell for cell in mine if cell.load == "uploads1m"
        ],
    }
    for title, those in kinds.items():
        for name in dict.fromkeys(cell.replayer for cell in those):
            of_it = [cell for cell in those if cell.replayer == name]
            bad = [cell for cell in of_it if not cell.good or not cell.balanced]
            said = f"{len(of_it)} cells, {sum(cell.lost for cell in of_it)} lost"
            if bad:
                where = {f"{cell.load} {cell.rate or 'max'}" for cell in bad}
                said += f", not good: {', '.join(sorted(where))}"
            yield Line(f"{title}, {name}", said, "all of them", not bad)
        if not those:
            yield Line(title, "not measured", "all of them", None)
