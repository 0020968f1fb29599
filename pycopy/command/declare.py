"""How an option is declared: a configuration's field that says all there is to say of it.

    sample_percent: int = option("-r, --sample PERCENT", 100, parse_percent, Group.COPIED,
                                 "share of the clients ({default})", was="...")

So a configuration is the table of its command's options, and its fields keep their static types:
the type checker holds default and parser to them. What may be typed, ``--help``, the defaults and
the page beside the original's letters are read from it (:func:`options_of`), as a man page or a
completion can be. Nothing here knows an option. Tests: tests/unit/test_declare.py; of the tables
themselves tests/unit/test_config.py.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, TypeVar

from pycopy.command.values import size_text

T = TypeVar("T")
#: From what is typed after an option, and the option's name for a sentence about it.
Parse = Callable[[str, str], T]

_SPEC = re.compile(r"(?:(-\w), )?(--[a-z-]+)(?: (\S+))?")
_KEY = "option"


class Group(Enum):
    """The headings of ``--help``, in order."""

    ALONE = "options"
    COPIED = "what is copied"
    TAKEN = "what is taken"
    RESPONSES = "where responses are taken"
    CHANNEL = "replay connects to"
    PACE = "pace and limits"
    PROCESS = "the process and its reports"


@dataclass(frozen=True, slots=True)
class Option:
    """One option of one command."""

    letter: str  #: "-r"; "" if it has none
    long: str  #: "--sample"; "" if the option is refused
    metavar: str  #: what follows it; "" if nothing does
    group: Group
    help: str  #: "{default}" and "{command}" stand for what they name
    was: str  #: what the letter means in the original; "" if it has no such letter
    parse: Parse[object] | None = None  #: None: the command itself reads it, or nothing follows
    repeated: bool = False  #: what follows it each time is added to the list
    instead: str = ""  #: not taken: what to do instead
    field: str = ""  #: of the configuration
    default: object = None

    @property
    def name(self) -> str:
        """As sentences call it."""
        return self.letter or self.long

    def help_text(self, command: str) -> str:
        """What ``--help`` of ``pycopy command`` says beside it."""
        return self.help.format(default=self.default_text(), command=command)

    def default_text(self) -> str:
        """The default as it would be typed."""
        if self.field.endswith("_bytes") and isinstance(self.default, int):
            return size_text(self.default)
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    def read(self, typed: Any) -> object:
        """The field's value. ``typed``: True for a flag, the text, or if the option is repeated
        all texts. :class:`UsageError` if the text is no such value."""
        if not self.metavar:
            return not self.default
        assert self.parse is not None
        if self.repeated:
            lists: list[Any] = [self.parse(text, self.name) for text in typed]
            return [item for items in lists for item in items]
        return self.parse(typed, self.name)


@dataclass
class Configuration:
    """A command's. Its options are its fields; its refused letters are beside them."""

    refused: ClassVar[Sequence[Option]] = ()


C = TypeVar("C", bound=Configuration)


def option(
    spec: str,
    default: T | Callable[[], T],
    parse: Parse[T] | None,
    group: Group,
    help: str,
    *,
    was: str = "",
    repeated: bool = False,
) -> T:
    """A field. ``spec``: as in ``--help``; ``default``: a value, or a function that makes it;
    ``parse``: None if the command reads the text itself, because it needs other options."""
    letter, long, metavar = _split(spec)
    row = Option(letter, long, metavar, group, help, was, parse, repeated)
    metadata = {_KEY: row}
    made: Any
    if isinstance(default, list):
        made = dataclasses.field(default_factory=default.copy, metadata=metadata)
    elif callable(default):
        made = dataclasses.field(default_factory=default, metadata=metadata)
    else:
        made = dataclasses.field(default=default, metadata=metadata)
    value: T = made  # dataclass() puts the default in its place
    return value


def flag(spec: str, group: Group, help: str, *, was: str = "", default: bool = False) -> bool:
    """A field that an option without a value turns into the opposite of its default."""
    return option(spec, default, None, group, help, was=was)


def refuse(letter: str, was: str, instead: str) -> Option:
    """A letter of the original that is understood and not taken."""
    return Option(letter, "", "", Group.ALONE, "", was, instead=instead)


#: Answered at once, by every command; they configure nothing.
HELP = Option("-h", "--help", "", Group.ALONE, "this text", was="the help")
VERSION = Option("-v", "--version", "", Group.ALONE, "the version", was="the version")


def options_of(config: type[Configuration]) -> list[Option]:
    """The options that are taken, but for HELP and VERSION, in the order of ``--help``."""
    rows = []
    for field in dataclasses.fields(config):
        if _KEY in field.metadata:
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            row = field.metadata[_KEY]
            rows.append(dataclasses.replace(row, field=field.name, default=default))
    order = list(Group)
    return sorted(rows, key=lambda row: order.index(row.group))


def fill(config: C, given: argparse.Namespace) -> C:
    """Set the fields whose options were typed; those that the command reads itself are left."""
    for row in options_of(type(config)):
        typed = getattr(given, row.field)
        if typed is not None and (row.parse is not None or not row.metavar):
            setattr(config, row.field, row.read(typed))
    return config


def _split(spec: str) -> tuple[str, str, str]:
    """``-r, --sample PERCENT``: the letter, the long name, the metavar."""
    match = _SPEC.fullmatch(spec)
    assert match is not None, spec
    return match[1] or "", match[2], match[3] or ""
