"""Who can be measured: the descriptions in adapters/*.toml, and the builds they fit.

A description says which programs run on which host of the lab, in which order, how each
shows that it is ready and how it is ended; replayers.py does it. A replayer that somebody
builds himself may be there several times: ``--path NAME=DIRECTORY`` is one build, and the
replayer is then called ``adapter@NAME``. To measure another replayer, write such a file.
Knows nothing of labs and starts nothing but the question whether a build fits.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pycopy.errors import UsageError
from pycopy.lab.topology import environment

FOLDER = Path(__file__).with_name("adapters")
KINDS = ("baseline", "floor", "pycopy", "original", "other")
LOADED = ("online", "target", "both")
PARTS = ("replay", "intercept")
_READY = ("says", "listens", "connects", "")


@dataclass(frozen=True)
class Program:
    """One process: where it runs, and what must happen before the next one is started."""

    host: str
    part: str  #: whose column its costs go to
    argv: tuple[str, ...]  #: with {placeholders}
    ready: str = ""  #: "says WORD" on stderr, "listens PORT", "connects PORT"
    settle_s: float = 0.0  #: and then so long, for programs that do not say it
    stop: str = "TERM"
    ledger: bool = False  #: the last line on stdout is a JSON object with "balanced"


@dataclass(frozen=True)
class Adapter:
    """One file, or one variant in it."""

    name: str
    about: str
    kind: str
    programs: tuple[Program, ...] = ()
    requires: tuple[str, ...] = ()
    fits: dict[str, Any] = field(default_factory=dict)
    load_to: str = "online"
    route_through_assistant: bool = False


@dataclass(frozen=True)
class Replayer:
    """An adapter and the build that it is to run."""

    name: str
    adapter: Adapter
    path: str = ""  #: directory that goes before PATH

    @property
    def kind(self) -> str:
        return self.adapter.kind

    def command(self, argv: tuple[str, ...], words: dict[str, Any]) -> list[str]:
        """With placeholders filled in and the program's whole path."""
        filled = [part.format(**words) for part in argv]
        return [shutil.which(filled[0], path=self.search_path()) or filled[0], *filled[1:]]

    def search_path(self) -> str:
        return os.pathsep.join(part for part in (self.path, os.environ.get("PATH", "")) if part)

    def obstacle(self) -> str:
        """Why it cannot run here; "" when it can."""
        for command in self.adapter.requires:
            if shutil.which(command, path=self.path or self.search_path()) is None:
                return f"there is no {command} {f'in {self.path}' if self.path else 'on PATH'}"
        fits = self.adapter.fits
        if not fits:
            return ""
        asked = self.command(tuple(fits["argv"]), {"python": sys.executable})
        done = subprocess.run(
            asked, capture_output=True, text=True, timeout=20, env=environment(),
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        said = done.stdout + done.stderr
        if "shows" in fits and fits["shows"] not in said:
            return f"{' '.join(asked[-4:])} does not mention {fits['shows']!r}: not in this build"
        if "lacks" in fits and fits["lacks"] in said:
            return f"{' '.join(asked[-4:])} mentions {fits['lacks']!r}: another adapter's build"
        return ""


def read(folder: Path = FOLDER) -> dict[str, Adapter]:
    """Every adapter of the folder by its name."""
    found: dict[str, Adapter] = {}
    for path in sorted(folder.glob("*.toml")):
        for adapter in _parse(path):
            if adapter.name in found:
                raise UsageError(f"{path.name}: {adapter.name} is there twice", "rename one")
            found[adapter.name] = adapter
    return found


def _parse(path: Path) -> list[Adapter]:
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    variants = document.pop("variant", [])
    try:
        programs = tuple(_program(one) for one in document.pop("program", []))
        base = Adapter(programs=programs, requires=tuple(document.pop("requires", [])), **document)
        adapters = [base]
        for variant in variants:
            append = variant.pop("append", {})
            longer = tuple(
                replace(one, argv=(*one.argv, *append.get(one.part, ()))) for one in programs
            )
            adapters.append(replace(base, programs=longer, **variant))
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(f"{path.name}: {error}", "see the other files in this folder") from None
    for adapter in adapters:
        if adapter.kind not in KINDS:
            raise UsageError(f"{path.name}: kind {adapter.kind!r}", f"one of {', '.join(KINDS)}")
        if adapter.load_to not in LOADED:
            raise UsageError(f"{path.name}: load_to {adapter.load_to!r}", f"one of {LOADED}")
    return adapters


def _program(words: dict[str, Any]) -> Program:
    program = Program(**{**words, "argv": tuple(words["argv"])})
    if program.part not in PARTS:
        raise ValueError(f"part {program.part!r} is none of {', '.join(PARTS)}")
    if program.ready.partition(" ")[0] not in _READY:
        raise ValueError(f"ready {program.ready!r}")
    return program


def available(builds: dict[str, str]) -> tuple[dict[str, Replayer], dict[str, str]]:
    """Replayers that can run here, and of the others why not; builds are name to directory."""
    good: dict[str, Replayer] = {}
    bad: dict[str, str] = {}
    for adapter in read().values():
        replayers = [Replayer(adapter.name, adapter)]
        if adapter.requires:
            replayers += [
                Replayer(f"{adapter.name}@{name}", adapter, path) for name, path in builds.items()
            ]
        for replayer in replayers:
            obstacle = replayer.obstacle()
            if obstacle:
                bad[replayer.name] = obstacle
            else:
                good[replayer.name] = replayer
    return good, bad


def choose(names: str, builds: dict[str, str], options: list[str]) -> list[Replayer]:
    """What ``--replayers`` asks for, "" is all that can run; options are for pycopy replay."""
    good, bad = available(builds)
    if options:
        good = {name: _with_options(one, options) for name, one in good.items()}
    if not names:
        return list(good.values())
    chosen = []
    for name in names.split(","):
        if name in bad:
            raise UsageError(f"{name} cannot run: {bad[name]}", "install it, or leave it out")
        if name not in good:
            raise UsageError(f"there is no replayer {name}", f"there are: {', '.join(good)}")
        chosen.append(good[name])
    return chosen


def _with_options(replayer: Replayer, options: list[str]) -> Replayer:
    if replayer.kind != "pycopy":
        return replayer
    programs = tuple(
        replace(one, argv=(*one.argv, *options)) if one.part == "replay" else one
        for one in replayer.adapter.programs
    )
    return replace(replayer, adapter=replace(replayer.adapter, programs=programs))
