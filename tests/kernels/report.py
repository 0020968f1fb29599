"""The tables of the kernel matrix, as text and as Markdown. Pure: rows in, lines out.

A row is a dictionary as :mod:`tests.kernels.inside` writes it, with the name of the kernel.
"""

from collections import defaultdict

#: kind of row: heading of its table, and the names of its columns.
TABLES = {
    "object": (
        "Objects: verified instructions of the largest program",
        ("kernel", "compiler", "object", "instructions"),
    ),
    "copy": (
        "Copying",
        ("kernel", "placement", "family", "requests", "lost", "in the kernel", "seconds"),
    ),
    "kill -9": ("kill -9", ("kernel", "placement", "nothing left")),
    "netem": (
        "Impaired legs between replay and target",
        ("kernel", "impairment", "leg", "requests", "lost", "in the kernel", "seconds"),
    ),
}
END = "end"


def cells(row):
    """The columns of one row but for the kernel."""
    match row["kind"]:
        case "object":
            count = row.get("instructions")
            return row["compiler"], row["object"], "REFUSED" if count is None else f"{count:,}"
        case "kill -9":
            way = f"after detach: {row['detach']}" if row.get("detach") else "by itself"
            return row["placement"], way if row["good"] else "NO"
        case "copy":
            return (row["placement"], f"IPv{row['family']}", *_copied(row))
        case _:
            return (row["impairment"], row["leg"], *_copied(row))


def _copied(row):
    lost = f"{row.get('lost', 0):,}"
    if row.get("surplus"):
        lost += f" (+{row['surplus']:,} unasked)"
    share = f"{row.get('kernel_percent', 0):.1f} %"
    return f"{row.get('requests', 0):,}", lost, share, f"{row['seconds']:.0f}"


def problems(rows, kernels):
    """Everything that is not green; a kernel that did not come to its end is one, too."""
    found = [
        (row["kernel"], " ".join((row["kind"], *cells(row))) if row["kind"] in TABLES else
         row["kind"], row["problem"])
        for row in rows
        if not row["good"]
    ]  # fmt: skip
    for kernel in kernels:
        own = [row for row in rows if row["kernel"] == kernel]
        if not any(row["kind"] == END for row in own) and all(row["good"] for row in own):
            found.append((kernel, "all", "it did not come to its end"))
    return found


def tables(rows):
    """(heading, columns, lines) of each kind of which there are rows."""
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    for kind, (heading, columns) in TABLES.items():
        if kind == "object" and by_kind[kind]:
            yield (heading, *_objects(by_kind[kind]))
        elif by_kind[kind]:
            lines = [(row["kernel"], *cells(row), _verdict(row)) for row in by_kind[kind]]
            yield heading, (*columns, ""), lines


def _objects(rows):
    """One line an object and compiler, one column a kernel."""
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    lines = {}
    for row in rows:
        line = lines.setdefault((row["compiler"], row["object"]), dict.fromkeys(kernels, "-"))
        text = cells(row)[2]
        line[row["kernel"]] = text if row["good"] or text == "REFUSED" else f"{text} TOO MANY"
    columns = ("compiler", "object", *kernels)
    return columns, [(*key, *line.values()) for key, line in lines.items()]


def _verdict(row):
    return "ok" if row["good"] else "FAILED"


def text(rows, kernels):
    """All tables and what is wrong, for a terminal or a log."""
    lines = []
    for heading, columns, body in tables(rows):
        widths = [max(map(len, column)) for column in zip(columns, *body, strict=True)]
        lines += ["", heading]
        for line in (columns, *body):
            row = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            lines.append(f"  {row}".rstrip())
    wrong = problems(rows, kernels)
    lines += ["", f"{len(wrong)} not green" if wrong else "all green"]
    lines += [f"  {kernel}: {what}: {problem}" for kernel, what, problem in wrong]
    return "\n".join(lines)


def markdown(rows, kernels, heading):
    """The same as a page of docs/; ``heading`` are lines of its beginning."""
    lines = ["# Kernels", "", *heading]
    for title, columns, body in tables(rows):
        lines += ["", f"## {title}", "", _piped(columns), _piped(["---"] * len(columns))]
        lines += [_piped(line) for line in body]
    wrong = problems(rows, kernels)
    lines += ["", "Everything is green." if not wrong else "Not green:"]
    lines += [f"* {kernel}: {what}: {problem.splitlines()[0]}" for kernel, what, problem in wrong]
    return "\n".join(lines) + "\n"


def _piped(line):
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
