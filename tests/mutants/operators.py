"""What is changed: generic operators on C text, one place at a time.

No parser of C: comments and strings are blanked out, and the operators look for what is written
in one way all over bpf/. A change that makes no sense does not compile, and is not counted.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

_NO_CODE = re.compile(r"/\*.*?\*/|//[^\n]*|\"[^\"\n]*\"", re.S)
_COMPARISON = re.compile(r"(?<= )(<=|>=|==|!=|<|>)(?= )")
_LOGIC = re.compile(r"(?<= )(&&|\|\|)(?=\s)")
_SUM = re.compile(r"(?<= )(\+=|-=|\+|-)(?= )|\+\+|--")
_CONSTANT = re.compile(r"(?<![\w.#])(?:0x[0-9a-f]+|\d+)(?=[uUlL]*\b)")
_CONDITION = re.compile(r"\b(?:if|while) \(")
_RETURNED = re.compile(r"\breturn (?=[^;]*(?:&&|\|\|))")
_KEYWORD = (
    r"(?:[us](?:8|16|32|64)|__\w+|int|long|void|struct|const|static|unsigned|enum|else|case|break|"
    r"goto|if|for|while|do|switch|default)\b"
)
#: Where a statement may begin: at the start of a line, behind another one's end. Declarations and
#: what has statements of its own are none.
_STATEMENT = re.compile(rf"(?<=[;{{}})e:])(\s*\n\t+)(?!{_KEYWORD})((?:[a-z_(*]|\+\+|--)[^;{{}}]*;)")

FLIPPED = {"<=": "<", "<": "<=", ">=": ">", ">": ">=", "==": "!=", "!=": "=="}
SWAPPED = {"&&": "||", "||": "&&", "+": "-", "-": "+", "+=": "-=", "-=": "+=", "++": "--",
           "--": "++"}  # fmt: skip


class Mutant(NamedTuple):
    """One change: ``text[start:end]`` of a file becomes ``new``."""

    file: str
    line: int
    operator: str
    start: int
    end: int
    old: str
    new: str
    #: The line as it was, without its indentation, and which of the same change on such lines.
    context: str
    number: int

    @property
    def key(self) -> str:
        """The same for as long as the line is, wherever in the file it stands."""
        words = self.file, self.operator, self.context, self.old, self.new, str(self.number)
        return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]

    def apply(self, text: str) -> str:
        return text[: self.start] + self.new + text[self.end :]

    def __str__(self) -> str:
        old, new = (" ".join(each.split()) for each in (self.old, self.new))
        return f"{self.file}:{self.line} {self.operator}: {old!r} -> {new!r} in: {self.context}"


#: (start, end, what it becomes)
_Change = tuple[int, int, str]


def blank(text: str) -> str:
    """The text with spaces where a comment or a string is, every place where it was."""
    return _NO_CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def _flip(code: str) -> Iterator[_Change]:
    for found in _COMPARISON.finditer(code):
        yield found.start(), found.end(), FLIPPED[found[0]]


def _swap_logic(code: str) -> Iterator[_Change]:
    for found in _LOGIC.finditer(code):
        yield found.start(), found.end(), SWAPPED[found[0]]


def _swap_sum(code: str) -> Iterator[_Change]:
    for found in _SUM.finditer(code):
        yield found.start(), found.end(), SWAPPED[found[0]]


def _off_by_one(code: str) -> Iterator[_Change]:
    for found in _CONSTANT.finditer(code):
        value = int(found[0], 0)
        for other in (value + 1, value - 1) if value else (1,):
            yield found.start(), found.end(), str(other)


def _delete(code: str) -> Iterator[_Change]:
    for found in _STATEMENT.finditer(code):
        ends_function = found[2].startswith("return") and found[1].endswith("\n\t")
        if not ends_function:
            yield found.start(2), found.end(2), ";"


def _closing(code: str, at: int) -> int:
    """Where the parenthesis that is open before ``at`` is closed."""
    depth = 1
    while depth:
        depth += {"(": 1, ")": -1}.get(code[at], 0)
        at += 1
    return at - 1


def _operands(code: str, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Of && and || in an expression, in parentheses as well: (start, end) of the operand, and of
    what goes with it when it is dropped."""
    depth, cuts = 0, []
    for at in range(start, end):
        if code[at] == "(":
            if not depth:
                yield from _operands(code, at + 1, _closing(code, at + 1))
            depth += 1
        elif code[at] == ")":
            depth -= 1
        elif not depth and code[at : at + 2] in ("&&", "||"):
            cuts.append(at)
    if not cuts:
        return
    edges = [start, *cuts, end]
    for index, (left, right) in enumerate(pairwise(edges)):
        first = left if not index else left + 2
        yield first, right, left, right + 2 if not index else right


def _drop_operand(code: str) -> Iterator[_Change]:
    for found in (*_CONDITION.finditer(code), *_RETURNED.finditer(code)):
        start = found.end()
        end = code.index(";", start) if found[0].startswith("return") else _closing(code, start)
        for _, _, left, right in _operands(code, start, end):
            yield left, right, " "


def _decide(code: str) -> Iterator[_Change]:
    """A condition that always holds, and one that never does."""
    for found in _CONDITION.finditer(code):
        end = _closing(code, found.end())
        for constant in ("1", "0"):
            if code[found.end() : end] != constant and not found[0].startswith("while"):
                yield found.end(), end, constant


OPERATORS: dict[str, Callable[[str], Iterator[_Change]]] = {
    "comparison": _flip,
    "logic": _swap_logic,
    "sum": _swap_sum,
    "constant": _off_by_one,
    "statement": _delete,
    "operand": _drop_operand,
    "condition": _decide,
}


def mutants_of(file: str, text: str) -> list[Mutant]:
    """All changes of one file, in the order of their places."""
    code = blank(text)
    starts_with_hash = re.compile(r"#\s*(?!define)")
    lines = text.splitlines()
    found, numbers = [], dict[tuple[str, ...], int]()
    for operator, changes in OPERATORS.items():
        for start, end, new in changes(code):
            line = code.count("\n", 0, start)
            if starts_with_hash.match(lines[line]):
                continue
            context, old = lines[line].strip(), text[start:end]
            same = operator, context, old, new
            numbers[same] = numbers.get(same, -1) + 1
            found.append(
                Mutant(file, line + 1, operator, start, end, old, new, context, numbers[same])
            )
    return sorted(found, key=lambda each: (each.start, each.end, each.operator, each.new))
