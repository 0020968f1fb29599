#!/usr/bin/python3
"""Write the options beside the originals' letters, from the tables: docs/make_options.py

Writes docs/options.md from the configurations in pycopy/command/config.py. A test compares the
committed file with what this gives, so that the page cannot go stale.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from pycopy.command.config import InterceptConfig, ReplayConfig
from pycopy.command.declare import HELP, VERSION, options_of

PAGE = """\
# Options, beside tcpcopy's and intercept's letters

Written by `docs/make_options.py` from the tables in `pycopy/command/config.py`; do not edit.

Command lines of tcpcopy and intercept carry over: pycopy has their letters, with the same meaning
unless the table says otherwise. A letter that it does not take is answered with the reason and
with what to do instead. tcpcopy and intercept have some letters in some builds only; here are
those of all builds.

{commands}"""

COMMAND = """\
## pycopy {name}

| letter | in {original} | in pycopy |
|---|---|---|
{rows}
"""


def rows(name, config):
    """Taken, refused, and pycopy's own, each in the order of the table."""
    taken = [*options_of(config), HELP, VERSION]
    for row in taken:
        if row.was:
            yield f"`{row.letter}`", row.was, _taken(row, name)
    for row in config.refused:
        yield f"`{row.letter}`", row.was, f"not taken; {row.instead}"
    for row in taken:
        if not row.was:
            yield f"`{row.letter}`" if row.letter else "", "", _taken(row, name)


def _taken(row, name):
    return f"`{row.long} {row.metavar}".rstrip() + f"`: {row.help_text(name)}"


def _line(cells):
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def page():
    commands = [("replay", "tcpcopy", ReplayConfig), ("intercept", "intercept", InterceptConfig)]
    return PAGE.format(
        commands="\n".join(
            COMMAND.format(
                name=name, original=original, rows="\n".join(map(_line, rows(name, config)))
            )
            for name, original, config in commands
        )
    )


if __name__ == "__main__":
    Path(__file__).with_name("options.md").write_text(page())
