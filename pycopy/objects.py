"""Compiled programs, kept from one start to the next: clang needs seconds, the kernel milliseconds.

An object is what the compiler made of one text: instructions, and which map each of them
means. It is found by a digest of all that it was made of, and used only if the compiler's
own files are those of then. Where objects cannot be kept (a read-only disk, a directory
that others may write to) every start compiles; nothing depends on them.
"""

import base64
import contextlib
import hashlib
import json
import os
import stat
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pycopy import link

#: As of the Filesystem Hierarchy Standard; systemd names another one (CacheDirectory=).
_DIRECTORY = "/var/cache/pycopy"

#: Objects kept, about 100 KB each; those that were not used for longest go.
_KEPT = 128

#: Of the layout of the files.
_VERSION = 2

#: ``struct bpf_insn``: a load of a 64-bit constant, which is a map's descriptor.
_INSTRUCTION = struct.Struct("=BBhi")

_SCHED_CLS, _XDP = 3, 6


class MapShape(NamedTuple):
    """A map that the text defines: its name there, and how to make one like it."""

    name: str
    kind: int
    key_bytes: int
    value_bytes: int
    max_entries: int
    flags: int


class Program(NamedTuple):
    """``references``: pairs of the index of an instruction and the map that it means, one of
    the object's by its name, one made before by its index."""

    name: str
    code: bytes
    references: Sequence[Sequence[Any]]


class Object(NamedTuple):
    license: str
    programs: Sequence[Program]
    maps: Sequence[MapShape]


def digest(*parts: object, directory: Path) -> str:
    """What an object is known by: ``parts``, and every file of ``directory``."""
    uname = os.uname()
    hashed = hashlib.sha256(repr((_VERSION, uname.release, uname.machine, parts)).encode())
    for path in sorted(each for each in directory.rglob("*") if each.is_file()):
        content = path.read_bytes()
        hashed.update(f"\n{path.relative_to(directory)} {len(content)}\n".encode())
        hashed.update(content)
    return hashed.hexdigest()


def load(found: Object, xdp: bool, map_fds: Sequence[int]) -> tuple[list[str], list[int]]:
    """Make its maps, load its programs: the maps' names; descriptors, the programs' first.

    Raises OSError with nothing left open.
    """
    with contextlib.ExitStack() as opened:

        def hold(fd: int) -> int:
            opened.callback(os.close, fd)
            return fd

        maps = {
            each.name: hold(
                link.map_create(
                    each.kind, each.name, each.key_bytes, each.value_bytes, each.max_entries,
                    each.flags,
                )
            )
            for each in found.maps
        }  # fmt: skip
        programs = []
        for program in found.programs:
            code = bytearray(program.code)
            for index, which in program.references:
                fd = map_fds[which] if isinstance(which, int) else maps[which]
                at = index * _INSTRUCTION.size
                operation, registers, offset, _ = _INSTRUCTION.unpack_from(code, at)
                _INSTRUCTION.pack_into(code, at, operation, registers, offset, fd)
            kind = _XDP if xdp else _SCHED_CLS
            fd = link.program_load(kind, program.name, bytes(code), found.license)
            programs.append(hold(fd))
        opened.pop_all()
    return list(maps), [*programs, *maps.values()]


# -- on the disk ---------------------------------------------------------------------------


def find(key: str) -> Object | None:
    """The object kept under ``key``, if the compiler is the same that made it."""
    directory = _directory()
    if directory is None:
        return None
    path = directory / key
    try:
        content = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    check, _, text = content.partition(b"\n")
    if check != _check(text):
        return None
    kept = json.loads(text)
    if any(_identity(path) != identity for path, identity in kept["made_by"].items()):
        return None
    programs = [
        Program(each["name"], base64.b64decode(each["code"]), each["references"])
        for each in kept["programs"]
    ]
    return Object(kept["license"], programs, [MapShape(*each) for each in kept["maps"]])


def keep(
    key: str, made: Mapping[str, Any], maps: Mapping[str, int], made_by: Sequence[str]
) -> None:
    """Keep what pycopy.compiler has ``made`` under ``key``.

    ``maps``: descriptors of those it made, by name; ``made_by``: the files it consists of.
    """
    directory = _directory(make=True)
    if directory is None:
        return
    content = {
        **made,
        "made_by": {path: _identity(path) for path in made_by},
        "maps": [_shape(name, fd) for name, fd in maps.items()],
    }
    text = json.dumps(content).encode()
    # Whatever fails here, the next start compiles again.
    with contextlib.suppress(OSError):
        fd, temporary = tempfile.mkstemp(dir=directory)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(_check(text) + b"\n" + text)
            os.replace(temporary, directory / key)
        except BaseException:
            os.unlink(temporary)
            raise
        _prune(directory)


def _shape(name: str, fd: int) -> MapShape:
    info = link.map_info(fd)
    return MapShape(name, info.type, info.key_bytes, info.value_bytes, info.max_entries, info.flags)


def _check(text: bytes) -> bytes:
    """A disk that was full or is broken must not decide what the kernel runs."""
    return hashlib.sha256(text).hexdigest().encode()


def _identity(path: str) -> list[int]:
    try:
        found = os.stat(path)
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


def _directory(make: bool = False) -> Path | None:
    """Where objects are; None where somebody else could put one."""
    directory = Path(os.environ.get("CACHE_DIRECTORY", _DIRECTORY).partition(":")[0])
    try:
        if make:
            directory.mkdir(mode=0o700, exist_ok=True)
        found = os.lstat(directory)
    except OSError:
        return None
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return directory if ours and not found.st_mode & 0o022 else None


def _prune(directory: Path) -> None:
    paths = sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in paths[_KEPT:]:
        path.unlink()
