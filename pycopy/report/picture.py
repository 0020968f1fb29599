"""What comes first when there is little room: the picture of the live view, the interval line.

Pure functions of a snapshot (see view.py): what went wrong is found by its counter's name,
stands before everything else, and nothing is ever wider or higher than it may be.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

Value = int | float | str
Snapshot = Mapping[str, Mapping[str, Value]]
Line = tuple[str, str]  #: text and rich style

FAMILIAR = "familiar"
BALANCED = "balanced"

#: tcpcopy's counters by which its users tell that a copying is alive.
_FAMILIAR_FIRST = ("all clt", "syn cnt", "conns", "resp", "send", "active")
#: An interval line with its time stamp, and ", ... N more", is no longer than 160 columns.
_LINE_COLUMNS = 124

_TROUBLE_PREFIXES = ("dropped_", "refused_", "lost_", "error_")
_RING_FULL, _LAPSED = "ring_full", "lapsed"

#: Label, section and counter of what is shown with its rate, and of what is a number now.
_RATES = (
    ("captured", "segments", "captured"),
    ("sent", "sending", "segments"),
    ("matched", "kernel", "matched"),
    ("responses", "responses", "read"),
    ("sent to replay", "copies", "sent"),
)
_GAUGES = (
    ("active", "sessions", "active"),
    ("established", "sessions", "established"),
    ("held", "segments", "held"),
    ("replays", "connections", "replays"),
)
_COLUMN = 38
_GAP = 2


class Trouble(NamedTuple):
    """A counter of something that did not reach where it should have."""

    section: str
    key: str
    value: int

    def name(self, among: list["Trouble"]) -> str:
        """The counter's own name, with its section where another one has the same."""
        shared = sum(other.key == self.key for other in among) > 1
        return f"{self.section} {self.key}" if shared else self.key


def troubles(snapshot: Snapshot) -> list[Trouble]:
    """Everything lost, dropped, refused or failed, in the snapshot's order."""
    found = [
        Trouble(name, key, value)
        for name, section in snapshot.items()
        if name != FAMILIAR
        for key, value in section.items()
        if isinstance(value, int) and value and _is_trouble(key)
    ]
    if any((each.section, each.key) == ("kernel", _RING_FULL) for each in found):
        # ``ring_full`` counts these segments already; this is their name in the ledger's equation.
        found = [each for each in found if each.key != "lost_in_ring"]
    return found


def familiar_line(snapshot: Snapshot) -> str:
    """tcpcopy's names that are not zero, what went wrong, and what waits, on one line."""
    section = dict(snapshot[FAMILIAR])
    first = [(key, section.pop(key)) for key in _FAMILIAR_FIRST if key in section]
    wrong = troubles(snapshot)
    items = [f"{key}:{value}" for key, value in first if value]
    items += [f"{each.name(wrong)}:{each.value}" for each in wrong]
    if held := snapshot.get("segments", {}).get("held"):
        items.append(f"held:{held}")
    items += [f"{key}:{value}" for key, value in section.items() if value]
    line = ""
    for number, item in enumerate(items):
        longer = f"{line}, {item}" if line else item
        if len(longer) > _LINE_COLUMNS:
            return f"{line}, ... {len(items) - number} more"
        line = longer
    return line or "nothing yet"


def picture(
    title: str, elapsed_s: float, now: Snapshot, before: Snapshot, span_s: float,
    columns: int, rows: int,
) -> list[Line]:  # fmt: skip
    """At most ``rows`` lines of at most ``columns``; ``before`` is ``span_s`` older."""
    lines = [(_title(title, elapsed_s, columns), "bold")]
    lines += _trouble_lines(now, before, span_s, max(rows // 3, 1))
    for label, section, key in _RATES:
        if (value := now.get(section, {}).get(key)) is not None:
            lines.append((_row(label, value, _rate(now, before, section, key, span_s)), ""))
    gauges = [
        f"{label} {value}"
        for label, section, key in _GAUGES
        if (value := now.get(section, {}).get(key)) is not None
    ]
    if gauges:
        lines.append((", ".join(gauges), ""))
    if "fastpath" in now:
        lines.append(_carrier(now["fastpath"]))
    lines += _rest(now, columns, rows - len(lines) - 1)
    return [(text[:columns], style) for text, style in lines[:rows]]


def _carrier(section: Mapping[str, Value]) -> Line:
    """Who does the work; the whole cause where it is not the kernel."""
    state = " ".join(str(section.get("state", "")).split())
    share = section.get("kernel_percent")
    text = f"fast path {state}"
    return (f"{text}, {share} % of all segments so far" if share else text), (
        "" if state == "on" else "yellow"
    )


def _is_trouble(key: str) -> bool:
    return key in (_RING_FULL, _LAPSED) or key.startswith(_TROUBLE_PREFIXES)


def _title(title: str, elapsed_s: float, columns: int) -> str:
    minutes, seconds = divmod(int(elapsed_s), 60)
    right = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}  Ctrl-C ends"
    room = columns - len(right) - 2
    if len(title) > room:
        title = title[: max(room - 3, 0)] + "..." if room > 3 else ""
    return f"{title}{' ' * (columns - len(title) - len(right))}{right}"


def _trouble_lines(now: Snapshot, before: Snapshot, span_s: float, most: int) -> Iterator[Line]:
    if any(section.get(BALANCED) in (0, "no") for section in now.values()):
        yield "the ledger does not balance", "red"
    wrong = troubles(now)
    if not wrong:
        yield "nothing lost", ""
        return
    yield "lost and refused", "red"
    shown = wrong if len(wrong) <= most else wrong[: most - 1]
    for each in shown:
        rate = _rate(now, before, each.section, each.key, span_s)
        yield _row(f"  {each.name(wrong)}", each.value, rate), "red"
    if len(shown) < len(wrong):
        yield f"  and {len(wrong) - len(shown)} more", "red"


def _rest(now: Snapshot, columns: int, rows: int) -> Iterator[Line]:
    """All other counters that are not zero, as many as there is room for."""
    known = {(section, key) for _, section, key in (*_RATES, *_GAUGES)}
    cells = [
        f"{f'{name} {key}'[: _COLUMN - 10]:<{_COLUMN - 10}}{value:>10}"
        for name, section in now.items()
        if name != FAMILIAR
        for key, value in section.items()
        if type(value) is int and value and key != BALANCED
        if (name, key) not in known and not _is_trouble(key)
    ]
    across = max((columns + _GAP) // (_COLUMN + _GAP), 1)
    down = min(max(rows, 0), -(-len(cells) // across))
    if down:
        yield "", ""
    for row in range(down):
        # Down first, then across, so that a section stays together.
        yield (" " * _GAP).join(cells[row : down * across : down]), "dim"


def _row(label: str, value: Value, rate: str) -> str:
    return f"{label:<26}{value:>12}{rate:>12}"


def _rate(now: Snapshot, before: Snapshot, section: str, key: str, span_s: float) -> str:
    value, earlier = now[section][key], before.get(section, {}).get(key, 0)
    if type(value) is not int or type(earlier) is not int or span_s <= 0:
        return ""
    return f"{(value - earlier) / span_s:.0f}/s"
