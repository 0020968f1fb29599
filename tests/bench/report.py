"""Cells to tables: medians, and ratios taken pair by pair within a round.

The machine drifts; two runs a minute apart share its mood, their medians do not. So what a
replayer adds is computed within each round, against the cell without replay of that round,
and so is the ratio of two replayers; the median is taken last. Pure arithmetic on cells.
"""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .cell import Cell

#: With so little idle time what is added shows in latencies and not in time.
FULL_SHARE = 0.03
Key = tuple[str, str, int]  #: stage, load, rate


@dataclass
class Ceiling:
    """The highest rate without loss that was found, and what came above it."""

    replayer: str
    kind: str
    load: str
    round: int
    rate: int
    limit: str


class Group:
    """All cells of one stage, load and rate."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        self.by_replayer: dict[str, dict[int, Cell]] = {}
        for cell in cells:
            if cell.answered:  # else it never began, and says so
                self.by_replayer.setdefault(cell.replayer, {})[cell.round] = cell

    def of_kind(self, kind: str) -> list[str]:
        return [
            name
            for name, rounds in self.by_replayer.items()
            if next(iter(rounds.values())).kind == kind
        ]

    def cells(self, name: str) -> list[Cell]:
        return list(self.by_replayer.get(name, {}).values())

    def _pairs(self, name: str, other: str) -> list[tuple[Cell, Cell]]:
        mine, theirs = self.by_replayer.get(name, {}), self.by_replayer.get(other, {})
        return [(mine[number], theirs[number]) for number in sorted(mine.keys() & theirs.keys())]

    def baseline(self) -> str:
        return next(iter(self.of_kind("baseline")), "")

    def added_us(self, name: str) -> dict[int, float]:
        """By round: the machine's time per request beyond the same load without replay."""
        pairs = self._pairs(name, self.baseline())
        return {cell.round: cell.machine_us - alone.machine_us for cell, alone in pairs}

    def floor_us(self) -> float | None:
        """The target's own work: what the machine does more when it gets the load as well.

        Without the load programs' own time, in which on veth the receiving host's softirq
        is contained: a little less than what no replay can do without.
        """
        pairs = self._pairs("both", self.baseline())
        return _median(
            (cell.machine_us - cell.load_us) - (alone.machine_us - alone.load_us)
            for cell, alone in pairs
        )

    def full(self, name: str) -> bool:
        """The machine had no time left in one of its rounds."""
        return any(cell.idle_share < FULL_SHARE for cell in self.cells(name))

    def own_us(self, name: str) -> dict[int, float]:
        return {cell.round: cell.own_us for cell in self.cells(name)}

    def cheapest(self, cost: Callable[[str], dict[int, float]]) -> str:
        """The build of the original with the lowest median of ``cost``."""
        medians = {name: _median(cost(name).values()) for name in self.of_kind("original")}
        known = {name: value for name, value in medians.items() if value is not None}
        return min(known, key=lambda name: known[name]) if known else ""

    def ratio(self, name: str, cost: Callable[[str], dict[int, float]]) -> float | None:
        """Median over the rounds of this replayer's cost to the cheapest original's."""
        mine, theirs = cost(name), cost(self.cheapest(cost))
        return _median(
            mine[number] / theirs[number]
            for number in sorted(mine.keys() & theirs.keys())
            if theirs[number] > 0
        )

    def p99_ratio(self, name: str) -> float | None:
        """Of the online service's p99 to that without replay."""
        pairs = self._pairs(name, self.baseline())
        return _median(cell.p99_us / alone.p99_us for cell, alone in pairs if alone.p99_us)


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.median(known) if known else None


def groups(cells: Iterable[Cell]) -> dict[Key, Group]:
    """In the order of their first cells."""
    sorted_out: dict[Key, list[Cell]] = {}
    for cell in cells:
        sorted_out.setdefault((cell.stage, cell.load, cell.rate), []).append(cell)
    return {key: Group(mine) for key, mine in sorted_out.items()}


HEADINGS = (
    "stage", "load", "rate", "replayer", "n", "asked", "lost", "machine", "+machine", "ratio",
    "replay", "intercept", "bpf", "ratio", "p50", "p99", "p99/none", "MB", "in kernel",
    "ledger",
)  # fmt: skip
LEGEND = (
    "CPU and latencies in us, CPU per request; medians of n rounds, lost: the worst of them. "
    "+machine: beyond the same load without replay. The ratios are to the cheapest original "
    "of that row's load: of +machine, and of replay + intercept + bpf. MB: replay + intercept "
    "at their peak. ~: the load or the servers did not keep the rate. !: the machine was full, "
    "so that what is added cannot be seen."
)


def rows(key: Key, group: Group) -> list[tuple[str, ...]]:
    stage, load, rate = key
    lines = []
    for name, by_round in group.by_replayer.items():
        cells = list(by_round.values())
        replays = cells[0].kind not in ("baseline", "floor")
        lines.append(
            (
                stage, load, f"{rate or 'max'}{'' if all(one.kept for one in cells) else '~'}",
                name, str(len(cells)), _number(_mid(cells, "requests")),
                str(max(cell.lost for cell in cells)),
                _number(_mid(cells, "machine_us")),
                _number(_median(group.added_us(name).values()) if replays else None)
                + ("!" if group.added_us(name) and replays and group.full(name) else ""),
                _ratio(group.ratio(name, group.added_us) if replays else None),
                *(
                    _number(_mid(cells, part) if replays else None)
                    for part in ("replay_us", "intercept_us", "bpf_us")
                ),
                _ratio(group.ratio(name, group.own_us) if replays else None),
                _number(_mid(cells, "p50_us")), _number(_mid(cells, "p99_us")),
                _ratio(group.p99_ratio(name) if replays else None),
                _number(_memory_mb(cells) if replays else None),
                _share(cells), _balanced(cells),
            )
        )  # fmt: skip
    floor_us = group.floor_us()
    if floor_us is not None:
        note = (stage, load, str(rate or "max"), "(target's own work)", "", "", "", "")
        lines.append((*note, _number(floor_us), *("",) * (len(HEADINGS) - len(note) - 1)))
    return lines


def table(cells: Iterable[Cell]) -> str:
    lines: list[tuple[str, ...]] = [HEADINGS]
    for key, group in groups(cells).items():
        lines += rows(key, group)
    return _align(lines)


def ceilings_table(ceilings: Iterable[Ceiling]) -> str:
    found: dict[tuple[str, str], list[Ceiling]] = {}
    for one in ceilings:
        found.setdefault((one.load, one.replayer), []).append(one)
    lines: list[tuple[str, ...]] = [
        ("load", "replayer", "n", "highest rate without loss", "above it")
    ]
    for (load, name), mine in found.items():
        middle = statistics.median(one.rate for one in mine)
        lines.append((load, name, str(len(mine)), f"{middle:,.0f}", mine[-1].limit))
    return _align(lines)


def _align(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _mid(cells: list[Cell], name: str) -> float:
    return float(statistics.median(getattr(cell, name) for cell in cells))


def _memory_mb(cells: list[Cell]) -> float:
    return (_mid(cells, "replay_peak_kb") + _mid(cells, "intercept_peak_kb")) / 1024


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _share(cells: list[Cell]) -> str:
    known = [cell.kernel_share for cell in cells if cell.kernel_share is not None]
    return f"{min(known):.1%}" if known else "-"


def _balanced(cells: list[Cell]) -> str:
    if any(cell.problems for cell in cells):
        return "PROBLEM"
    known = [cell.balanced for cell in cells if cell.balanced is not None]
    return ("yes" if all(known) else "NO") if known else "-"
