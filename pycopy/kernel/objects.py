"""Compiled BPF programs, the same for everybody: what there is, and how one is made and linked.

The catalogue is finite: a source of bpf/ for a hook, for a kind of link, with the fast path or
without. Objects are compiled by bcc ahead of time, kept beside their sources (bpf/objects/,
with a manifest of digests) and shipped; a host that runs them needs neither bcc nor LLVM. Where
the sources are not the ones the objects were made of, they are compiled at the start.

What differs from run to run is filled in by :func:`link_code`: descriptors of maps, constants,
the user's filter. What a map is for, or where a program is attached, is not known here.
"""

import base64
import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pycopy.errors import HostUnfit, PycopyError
from pycopy.kernel import abi, shapes, syscall
from pycopy.kernel.abi import Constant
from pycopy.process.console import while_slow

#: ``struct bpf_insn``; the upper half of ``registers`` is the source register.
_INSTRUCTION = struct.Struct("<BBhi")
_INSTRUCTION_BYTES = _INSTRUCTION.size
# linux/bpf.h: a load of a 64-bit constant (two instructions) and what its source register makes
# of it; a call, of a function of the same program instead of a helper; a move to r0.
_LOAD_CONSTANT, _PSEUDO_MAP = 0x18, 1
_CALL, _PSEUDO_CALL = 0x85, 1
_MOVE = 0xB7

_MANIFEST = "manifest.json"
_FLAGS = ("-DNDEBUG", "-Werror=implicit-function-declaration")

#: One object takes below a second; an emulated machine was seen to need 47 s.
_COMPILE_LIMIT_S = 180

#: Lines of clang's text that a user gets to see.
_SHOWN_LINES = 30

#: The interpreter that distributions package bcc for.
_SYSTEM_PYTHON = "/usr/bin/python3"


class Spec(NamedTuple):
    """What an object is made of: a file of bpf/, its entry functions, what is defined for it."""

    source: str
    programs: tuple[str, ...]
    xdp: bool
    defines: Mapping[str, int]


class Object(NamedTuple):
    """``programs``: instructions by the name of the function, not linked yet."""

    license: str
    programs: Mapping[str, bytes]


def name_of(role: str, *, xdp: bool = False, l2_bytes: int = 14, fastpath: bool = False) -> str:
    """The object of a role (capture, intercept, self, progress, fastpath) in the catalogue."""
    words = [role, "xdp" if xdp else "tc", "ether" if l2_bytes else "ip"]
    return "-".join([*words, "fast"] if fastpath else words)


def _spec(role: str, xdp: bool, l2_bytes: int, fastpath: bool) -> Spec:
    source = "intercept" if role == "self" else role
    programs = ("pycopy_timer", "pycopy_control") if role == "fastpath" else (f"pycopy_{source}",)
    defines = {
        "PYCOPY_HOOK_XDP": int(xdp), "PYCOPY_L2_BYTES": l2_bytes,
        "PYCOPY_FASTPATH": int(fastpath), "PYCOPY_SELF": int(role == "self"),
    }  # fmt: skip
    return Spec(f"{source}.c", programs, xdp, defines)


def _catalogue() -> dict[str, Spec]:
    wanted = [("fastpath", False, 14, True)]
    for l2_bytes in (14, 0):
        wanted += [("capture", False, l2_bytes, fast) for fast in (True, False)]
        wanted += [("self", False, l2_bytes, fast) for fast in (True, False)]
        wanted += [("capture", True, l2_bytes, False)]
        wanted += [("intercept", False, l2_bytes, False), ("progress", False, l2_bytes, True)]
    wanted.append(("intercept", True, 14, False))
    return {
        name_of(role, xdp=xdp, l2_bytes=l2_bytes, fastpath=fast): _spec(role, xdp, l2_bytes, fast)
        for role, xdp, l2_bytes, fast in wanted
    }


#: Every object there is.
CATALOGUE: dict[str, Spec] = _catalogue()


def bpf_dir() -> Path:
    """Where the C text and the objects are: in the installed package, or beside it; HostUnfit."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "bpf", package.parent / "bpf"):
        if (candidate / "pycopy.h").is_file():
            return candidate
    raise HostUnfit(
        "the BPF sources (bpf/pycopy.h) are not where pycopy was installed",
        f"install pycopy again; looked beside and in {package}",
    )


def objects_dir() -> Path:
    """Where the compiled programs and their manifest are; raises HostUnfit as bpf_dir()."""
    return bpf_dir() / "objects"


def source_digest() -> str:
    """The SHA-256 of everything that objects are made of, but for the compiler."""
    directory = bpf_dir()
    hashed = hashlib.sha256(repr((_FLAGS, sorted(CATALOGUE.items()))).encode())
    paths = [*directory.glob("*.[ch]"), *(directory / "stub").rglob("*.h")]
    for path in sorted(paths):
        content = path.read_bytes()
        hashed.update(f"\n{path.relative_to(directory)} {len(content)}\n".encode())
        hashed.update(content)
    return hashed.hexdigest()


# -- made ahead of time, on the disk ---------------------------------------------------------------


def manifest(directory: Path) -> dict[str, Any]:
    """What is said of the objects of a directory; empty if nothing is, or nothing sensible."""
    try:
        said = json.loads((directory / _MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def read(directory: Path, name: str) -> Object:
    """An object of a directory; raises PycopyError if it is not the one that the manifest says."""
    cure = "install pycopy again, or make them anew with 'pycopy bpf build'"
    try:
        said = manifest(directory)["objects"][name]
        code = (directory / f"{name}.bpf").read_bytes()
        sizes = [(str(each), int(size)) for each, size in sorted(said["programs"].items())]
        digest, license = said["sha256"], str(said["license"])
    except OSError as error:
        raise PycopyError(f"the BPF object {name} cannot be read: {error.strerror}", cure) from None
    except (KeyError, TypeError, ValueError, AttributeError):
        text = f"the BPF object {name} is not among those in {directory}"
        raise PycopyError(text, cure) from None
    if hashlib.sha256(code).hexdigest() != digest or sum(size for _, size in sizes) != len(code):
        raise PycopyError(f"the BPF object {name} in {directory} is damaged", cure)
    programs, at = {}, 0
    for each, size in sizes:
        programs[each] = code[at : at + size]
        at += size
    return Object(license, programs)


def write(directory: Path, objects: Mapping[str, Object], compiler: Mapping[str, str]) -> None:
    """Put objects and their manifest into a directory. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    said = {}
    for name, each in sorted(objects.items()):
        code = b"".join(part for _, part in sorted(each.programs.items()))
        (directory / f"{name}.bpf").write_bytes(code)
        said[name] = {
            "license": each.license,
            "programs": {program: len(part) for program, part in each.programs.items()},
            "sha256": hashlib.sha256(code).hexdigest(),
        }
    content = {"compiler": dict(compiler), "objects": said, "sources": source_digest()}
    (directory / _MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def find(name: str) -> Object:
    """The object called ``name``: made ahead of time, or, where bpf/ has changed since, now."""
    directory = objects_dir()
    if manifest(directory).get("sources") == source_digest():
        return read(directory, name)
    with while_slow(f"compiling {name}, since bpf/ is not what the objects were made of"):
        return compile_all([name])[0][name]


# -- made now --------------------------------------------------------------------------------------


def compile_all(
    names: Iterable[str], progress: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, Object], dict[str, str]]:
    """Have bcc compile objects of the catalogue: them by name, and the versions of bcc and clang.

    Raises PycopyError.

    Each in a child of its own: what one text makes of clang's memory is nothing to the next.
    """
    made: dict[str, Object] = {}
    compiler: dict[str, str] = {}
    for name in names:
        progress(name)
        reply = _ask_child(name, _request(name))
        compiler = reply["compiler"]
        each = reply["objects"][name]
        code = {program: base64.b64decode(text) for program, text in each["programs"].items()}
        made[name] = Object(each["license"], code)
    return made, compiler


def _request(name: str) -> dict[str, Any]:
    directory, spec = bpf_dir(), CATALOGUE[name]
    text = (directory / spec.source).read_text("utf-8")
    defines = [f"-D{macro}={value}" for macro, value in spec.defines.items()]
    each = {
        "text": f'#line 1 "{spec.source}"\n{text}',
        "cflags": ["-I", str(directory), *_FLAGS, *defines],
        "programs": list(spec.programs),
    }
    return {"stub": str(directory / "stub"), "objects": {name: each}}


def _ask_child(name: str, request: dict[str, Any]) -> dict[str, Any]:
    ours, theirs = socket.socketpair()
    # In memory: it may be a host without a place for files.
    with ours, os.fdopen(os.memfd_create("compiler"), "w+b") as output:
        with theirs:
            child = subprocess.Popen(
                [_interpreter(), "-P", "-m", "pycopy.kernel.compiler", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_child_environment(),
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C is ours to answer, not clang's
            )
        try:
            reply = _talk(ours, request)
            child.wait(_COMPILE_LIMIT_S)
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            raise PycopyError(
                f"compiling {name} took longer than {_COMPILE_LIMIT_S} s",
                "see whether the host is overloaded, and try again",
            ) from error
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        output.seek(0)
        said = output.read().decode("utf-8", "replace")
    if reply and "failed" not in reply:
        return reply
    _fail(reply, said, name, child.returncode)


def _talk(channel: socket.socket, request: dict[str, Any]) -> dict[str, Any]:
    """The child's one reply; an empty one if it died before it could say anything."""
    channel.settimeout(_COMPILE_LIMIT_S)
    parts = []
    try:
        channel.sendall(json.dumps(request).encode())
        channel.shutdown(socket.SHUT_WR)
        while part := channel.recv(1 << 16):
            parts.append(part)
    except (BrokenPipeError, ConnectionResetError):
        pass  # its exit status says why
    return json.loads(b"".join(parts)) if parts else {}


def _fail(reply: dict[str, Any], said: str, name: str, status: int) -> NoReturn:
    """Turn what the child reported, or how it died, into an error for the user."""
    source = CATALOGUE[name].source if name in CATALOGUE else name
    lines = said.strip().splitlines()
    # The first of clang's errors counts; what follows is mostly its consequence.
    words = "\n".join(lines[:_SHOWN_LINES])
    match reply.get("failed"):
        case "import":
            raise HostUnfit(
                "the BPF sources have changed since they were compiled, and the BPF compiler"
                f" collection's Python module is missing ({reply['text']})",
                "apt-get install python3-bpfcc, or install pycopy again",
            )
        case "compile":
            raise PycopyError(f"{source} does not compile ({name}):\n{words or reply['text']}")
        case _ if status < 0:
            by = signal.Signals(-status).name
            raise PycopyError(f"the compiler was killed by {by} on {source} ({name}):\n{words}")
        case _:
            raise PycopyError(
                f"the compiler exited with status {status} on {source} ({name}):\n{words}"
            )


def _interpreter() -> str:
    """A Python that has bcc: this one, else the distribution's, whose package bcc is."""
    if sys.executable == _SYSTEM_PYTHON or not os.access(_SYSTEM_PYTHON, os.X_OK):
        return sys.executable
    for python in (sys.executable, _SYSTEM_PYTHON):
        probe = [python, "-P", "-c"]
        probe += ["import importlib.util as u, sys; sys.exit(not u.find_spec('bcc'))"]
        done = subprocess.run(
            probe, check=False, stdin=subprocess.DEVNULL, env=_child_environment(),
            process_group=0,
        )  # fmt: skip
        if done.returncode == 0:
            return python
    return sys.executable


def _child_environment() -> dict[str, str]:
    """Ours, without what would lead bcc elsewhere, and with the way to this very package."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("ARCH", "BCC_LINUX_VERSION_CODE", "BCC_KERNEL_MODULES_SUFFIX")
    }
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    return environment


# -- linked ----------------------------------------------------------------------------------------


def map_numbers(programs: Iterable[bytes]) -> set[int]:
    """Numbers of the maps (``enum pycopy_map``) that programs use."""
    found = set()
    for code in programs:
        for operation, registers, _, constant in _INSTRUCTION.iter_unpack(code):
            if operation == _LOAD_CONSTANT and registers >> 4 == _PSEUDO_MAP:
                found.add(constant)
    return found


def link_code(
    code: bytes, maps: Mapping[int, int], constants: Mapping[Constant, int], filter_code: bytes
) -> bytes:
    """A program with descriptors for the numbers of ``maps``, its constants, and the filter.

    ``code`` and what is returned are instructions (``struct bpf_insn``), 8 bytes each.

    ``filter_code``: a function (pcapfilter.filter_code), empty for one that takes everything.
    """
    linked = bytearray(code)
    end = len(code) // _INSTRUCTION_BYTES
    calls_filter = False
    for index, (operation, registers, _, constant) in enumerate(_INSTRUCTION.iter_unpack(code)):
        at = index * _INSTRUCTION_BYTES
        source = registers >> 4
        if operation == _LOAD_CONSTANT and source == _PSEUDO_MAP:
            _INSTRUCTION.pack_into(linked, at, operation, registers, 0, maps[constant])
        elif operation == _LOAD_CONSTANT and source == abi.LINK_CONSTANT:
            value = constants[Constant(constant)]
            _INSTRUCTION.pack_into(linked, at, operation, registers & 15, 0, value)
        elif operation == _CALL and not source and constant == abi.LINK_FILTER:
            if filter_code:
                calls_filter = True
                _INSTRUCTION.pack_into(linked, at, _CALL, _PSEUDO_CALL << 4, 0, end - (index + 1))
            else:
                _INSTRUCTION.pack_into(linked, at, _MOVE, 0, 0, 1)
    return bytes(linked) + filter_code if calls_filter else bytes(linked)


#: Constants where nothing depends on their values.
ANY_CONSTANTS = {Constant.PERF: 0, Constant.LOG_MASK: (1 << 20) - 1, Constant.SLOTS: 64}


def try_load(
    directory: Path, name: str, *, filter_code: bytes = b"", perf: bool = False
) -> dict[str, int]:
    """Load an object of a directory and unload it: what each of its programs cost the verifier.

    Counted in instructions that it went through. Raises PycopyError with its words.
    """
    made, spec = read(directory, name), CATALOGUE[name]
    constants = {**ANY_CONSTANTS, Constant.PERF: int(perf)}
    kind = syscall.XDP_PROGRAM if spec.xdp else syscall.SCHED_CLS_PROGRAM
    fds: dict[int, int] = {}
    costs = {}
    try:
        for map_name, number in shapes.NUMBERS.items():
            if number in map_numbers(made.programs.values()):
                fds[number] = _any_map(map_name, perf)
        for program, code in made.programs.items():
            linked = link_code(code, fds, constants, filter_code)
            costs[program] = syscall.program_cost(kind, program, linked, made.license)
    except syscall.Rejected as error:
        raise rejected(name, error) from None
    except OSError as error:
        raise PycopyError(f"{name}: {error.strerror}") from None
    finally:
        for fd in fds.values():
            os.close(fd)
    return costs


def _any_map(name: str, perf: bool) -> int:
    if name == "log":
        log_bytes = ANY_CONSTANTS[Constant.LOG_MASK] + 1
        return shapes.make(name, value_bytes=abi.LOG_HEAD.size + log_bytes + abi.LOG_ROOM)
    return shapes.make(name, perf=perf)


def rejected(name: str, error: syscall.Rejected) -> PycopyError:
    """What the verifier said, for a user: the reason is in its last lines."""
    lines = [line for line in error.log.strip().splitlines() if line.strip()]
    tail = "\n".join(lines[-_SHOWN_LINES:])
    return PycopyError(f"the kernel's verifier rejects {name} ({error.strerror}):\n{tail}")
