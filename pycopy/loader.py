"""From C text to a loaded BPF program: what the rest of pycopy sees of compiling.

bcc works in a child process (pycopy.compiler) and hands back descriptors, so this process
never imports it and stays small. What goes wrong in there becomes one of our errors. What it
made is kept (objects.py), and the next start needs neither child nor compiler.
Where the program is attached is pycopy.attach's business; its names are here too.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pycopy import guards, link, objects
from pycopy.attach import Attachment, Hook, attach, detach_leftovers
from pycopy.errors import HostUnfit, PycopyError

__all__ = ["Attachment", "Hook", "Map", "Module", "attach", "detach_leftovers", "load"]

_PRIVILEGES_CURE = "run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_NET_RAW"

#: A cold compile takes below a second; an emulated machine was seen to need 47 s.
_COMPILE_LIMIT_S = 180

#: For clang.
_FLAGS = ("-DNDEBUG", "-Werror=implicit-function-declaration")

#: Lines of clang's or the verifier's text that a user gets to see.
_SHOWN_LINES = 30

#: The interpreter that distributions package bcc for.
_SYSTEM_PYTHON = "/usr/bin/python3"

#: Longest list of descriptors one message may carry (SCM_MAX_FD).
_MAX_FDS = 253

#: What bpf/ and generated filter functions need to know about the hook.
_HOOK_PRELUDE = """\
#if PYCOPY_HOOK_XDP
#define PYCOPY_CTX struct xdp_md
#define PYCOPY_LOAD_BYTES bpf_xdp_load_bytes
#else
#define PYCOPY_CTX struct __sk_buff
#define PYCOPY_LOAD_BYTES bpf_skb_load_bytes
#endif
"""


class Map:
    """One map of a loaded program, by its descriptor; keys and values are raw bytes."""

    def __init__(self, fd: int) -> None:
        info = link.map_info(fd)
        self.fd = fd
        self.key_bytes = info.key_bytes
        self.max_entries = info.max_entries
        self.value_bytes = info.value_bytes
        self._lookup_bytes = info.value_bytes
        if info.type in link.PERCPU_MAP_TYPES:
            self._lookup_bytes = (info.value_bytes + 7 & ~7) * link.possible_cpus()

    def lookup(self, key: bytes) -> bytes | None:
        """The value, all CPUs' values (each padded to 8 bytes) one after the other, or None."""
        return link.map_lookup(self.fd, key, self._lookup_bytes)

    def update(self, key: bytes, value: bytes) -> None:
        link.map_update(self.fd, key, value)

    def delete(self, key: bytes) -> bool:
        """Whether there was an entry to delete."""
        return link.map_delete(self.fd, key)

    def sum_percpu(self, index: int) -> int:
        """The u64 at ``index`` of a per-CPU array, summed over the CPUs."""
        value = self.lookup(index.to_bytes(4, sys.byteorder))
        if value is None:
            raise IndexError(index)
        return sum(memoryview(value).cast("Q"))


class Module:
    """Programs and their maps; they live in the kernel until closed here and detached.

    ``program_fd`` is the first of ``program_fds``, by name: nearly always the only one.
    """

    def __init__(
        self, programs: Sequence[str], hook_xdp: bool, fds: list[int], maps: list[str]
    ) -> None:
        self.program_name = programs[0]
        self.hook_xdp = hook_xdp
        self.program_fds = dict(zip(programs, fds, strict=False))
        self.program_fd = fds[0]
        map_fds = fds[len(programs) :]
        self.maps = {name: Map(fd) for name, fd in zip(maps, map_fds, strict=True)}

    def close(self) -> None:
        """Close the descriptors. An attached program runs on until its attachment is closed."""
        for fd in (*self.program_fds.values(), *(each.fd for each in self.maps.values())):
            os.close(fd)
        self.program_fd = -1
        self.program_fds = {}
        self.maps = {}


def bpf_dir() -> Path:
    """Where the C text is: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "bpf", package.parent / "bpf"):
        if (candidate / "pycopy.h").is_file():
            return candidate
    raise HostUnfit(
        "the BPF sources (bpf/pycopy.h) are not where pycopy was installed",
        f"install pycopy again; looked beside and in {package}",
    )


def load(
    source: str,
    *,
    defines: Mapping[str, int | str],
    prelude: str = "",
    programs: Sequence[str] = (),
    map_fds: Sequence[int] = (),
) -> Module:
    """Compile ``source`` (a file of bpf/, or a path) unless that has been done before, load its
    program, return it with its maps.

    ``defines`` must say PYCOPY_HOOK_XDP; ``prelude`` is generated C put before the file.
    ``programs`` are the names of entry functions: ``pycopy_`` and the file's name unless given.
    ``map_fds``: maps made before, which ``defines`` name PYCOPY_MAP_*, by their descriptors.
    """
    # Before clang runs; what a container denies beyond that shows at load time.
    guards.check_privileges()
    directory = bpf_dir()
    path = directory / source
    programs = programs or (f"pycopy_{path.stem}",)
    hook_xdp = bool(int(defines["PYCOPY_HOOK_XDP"]))
    text = f'{_HOOK_PRELUDE}{prelude}\n#line 1 "{path.name}"\n{path.read_text("utf-8")}'
    key = objects.digest(
        _FLAGS, programs, _with_indices(defines, map_fds), text, directory=directory
    )
    if (found := objects.find(key)) is not None:
        # What the verifier or a limit refuses is compiled again: then it is said why.
        with contextlib.suppress(OSError):
            maps, fds = objects.load(found, hook_xdp, map_fds)
            return Module(programs, hook_xdp, fds, maps)
    macros = "".join(f"#define {name} {value}\n" for name, value in defines.items())
    request = {
        "text": macros + text,
        "cflags": ["-I", str(directory), *_FLAGS],
        "stub": str(directory / "stub"),
        "programs": list(programs),
        "xdp": hook_xdp,
        "map_fds": list(map_fds),
    }
    reply, fds = _ask_child(request, path.name, map_fds)
    module = Module(programs, hook_xdp, fds, reply["maps"])
    named = {name: each.fd for name, each in module.maps.items()}
    objects.keep(key, reply["object"], named, reply["made_by"])
    return module


def _with_indices(defines: Mapping[str, int | str], map_fds: Sequence[int]) -> list[object]:
    """``defines`` in words that are the same in every process: descriptors are not."""
    return [
        (name, "map", map_fds.index(int(value)))
        if name.startswith("PYCOPY_MAP_")
        else (name, value)
        for name, value in defines.items()
    ]


def _ask_child(
    request: dict[str, Any], source: str, map_fds: Sequence[int]
) -> tuple[dict[str, Any], list[int]]:
    """Have ``request`` compiled; the child's reply, and descriptors: the programs', the maps'."""
    ours, theirs = socket.socketpair()
    with ours, tempfile.TemporaryFile() as output:
        with theirs:
            child = subprocess.Popen(
                [_interpreter(), "-m", "pycopy.compiler", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_child_environment(),
                pass_fds=[theirs.fileno(), *map_fds],
                process_group=0,  # Ctrl-C is ours to answer, not clang's
            )
        try:
            ours.settimeout(_COMPILE_LIMIT_S)
            # A child that dies early breaks the pipe; its status below says why.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                ours.sendall(json.dumps(request).encode())
                ours.shutdown(socket.SHUT_WR)
            try:
                reply, fds = _receive(ours)
                child.wait(_COMPILE_LIMIT_S)
            except (TimeoutError, subprocess.TimeoutExpired) as error:
                raise PycopyError(
                    f"compiling {source} took longer than {_COMPILE_LIMIT_S} s",
                    "see whether the host is overloaded, and try again",
                ) from error
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        output.seek(0)
        said = output.read().decode("utf-8", "replace")
    if reply and "failed" not in reply:
        return reply, fds
    for fd in fds:
        os.close(fd)
    _fail(reply, said, source, child.returncode)


def _receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The child's one reply; an empty one if it died before it could say anything."""
    parts: list[bytes] = []
    fds: list[int] = []
    while True:
        try:
            part, more, _, _ = socket.recv_fds(channel, 1 << 16, _MAX_FDS)
        except ConnectionResetError:
            break
        if not part:
            break
        parts.append(part)
        fds += more
    return (json.loads(b"".join(parts)) if parts else {}), fds


def _fail(reply: dict[str, Any], said: str, source: str, status: int) -> NoReturn:
    """Turn what the child reported, or how it died, into an error for the user."""
    lines = said.strip().splitlines()
    tail = "\n".join(lines[-_SHOWN_LINES:])
    match reply.get("failed"):
        case "import":
            raise HostUnfit(
                f"the BPF compiler collection's Python module is missing ({reply['text']})",
                "apt-get install python3-bpfcc",
            )
        case _ if "Operation not permitted" in said or "super-user" in reply.get("text", ""):
            raise HostUnfit(f"the kernel refuses bpf(2) here:\n{tail}", _PRIVILEGES_CURE)
        case "compile" if "Cannot allocate memory" in said:
            raise HostUnfit(
                f"there is no memory for the maps of {source}:\n{tail}",
                "give it a smaller --ring, or the service or container more memory",
            )
        case "compile":
            # clang's first error counts, what follows is mostly its consequence.
            head = "\n".join(lines[:_SHOWN_LINES]) or reply["text"]
            raise PycopyError(f"{source} does not compile:\n{head}")
        case "load":
            raise PycopyError(f"the kernel's verifier rejects {source}: {reply['text']}\n{tail}")
        case _ if status < 0:
            name = signal.Signals(-status).name
            raise PycopyError(f"the compiler was killed by {name} on {source}:\n{tail}")
        case _:
            raise PycopyError(f"the compiler exited with status {status} on {source}:\n{tail}")


def _interpreter() -> str:
    """A Python that has bcc: this one, else the distribution's, whose package bcc is."""
    if sys.executable == _SYSTEM_PYTHON or not os.access(_SYSTEM_PYTHON, os.X_OK):
        return sys.executable
    for python in (sys.executable, _SYSTEM_PYTHON):
        probe = [python, "-c", "import importlib.util as u, sys; sys.exit(not u.find_spec('bcc'))"]
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
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONSAFEPATH"] = "1"
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    return environment
