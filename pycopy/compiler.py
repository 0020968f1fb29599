"""The child that compiles: ``python3 -m pycopy.compiler FD``, started by pycopy.loader.

bcc brings clang, some 100 MB, into whoever imports it. So it is imported here only: the
request comes over the socket FD as JSON, the descriptors of the loaded program and of its
maps go back over it (SCM_RIGHTS), and the process ends. Whatever clang and the verifier
have to say is on stdout and stderr; the loader reads it there.

Must run under any Python 3 that has bcc, and needs no other module of pycopy.
"""

import base64
import ctypes
import json
import os
import socket
import struct
import sys
from typing import Any

#: ``struct bpf_insn``, BPF_LD | BPF_IMM | BPF_DW, and BPF_PSEUDO_MAP_FD as its source register
#: (the upper half of the byte on little-endian machines).
_INSTRUCTION = struct.Struct("=BBhi")
_LOAD_CONSTANT, _PSEUDO_MAP = 0x18, 1


def _receive(channel: socket.socket) -> dict[str, Any]:
    parts = []
    while part := channel.recv(1 << 16):
        parts.append(part)
    request: dict[str, Any] = json.loads(b"".join(parts))
    return request


def _compile(request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The reply and the descriptors that go with it: the programs', then each map's."""
    os.environ["BCC_KERNEL_SOURCE"] = request["stub"]
    try:
        from bcc import BPF, lib
    except ImportError as error:
        return {"failed": "import", "text": str(error)}, []
    lib.bpf_table_name.restype = ctypes.c_char_p
    lib.bpf_table_name.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    lib.bpf_module_license.restype = ctypes.c_char_p
    lib.bpf_module_license.argtypes = [ctypes.c_void_p]
    try:
        module = BPF(text=request["text"], cflags=request["cflags"])
    except Exception as error:  # bcc raises nothing more precise
        return {"failed": "compile", "text": str(error)}, []
    programs = []
    for name in request["programs"]:
        if not lib.bpf_function_start(module.module, name.encode()):
            return {"failed": "compile", "text": f"no function {name}"}, []
        try:
            kind = BPF.XDP if request["xdp"] else BPF.SCHED_CLS
            programs.append(module.load_func(name, kind).fd)
        except Exception as error:
            return {"failed": "load", "text": str(error)}, []
    count = lib.bpf_num_tables(module.module)
    names = [lib.bpf_table_name(module.module, index).decode() for index in range(count)]
    fds = [lib.bpf_table_fd(module.module, name.encode()) for name in names]
    known = {fd: index for index, fd in enumerate(request["map_fds"])}
    known |= dict(zip(fds, names, strict=True))
    made = {
        "license": lib.bpf_module_license(module.module).decode(),
        "programs": [_describe(lib, module.module, name, known) for name in request["programs"]],
    }
    return {"maps": names, "object": made, "made_by": _own_files()}, [*programs, *fds]


def _describe(lib: Any, module: Any, name: str, known: dict[int, Any]) -> dict[str, Any]:
    """The instructions of a function, and which of them means which map (of ``known``)."""
    start = lib.bpf_function_start(module, name.encode())
    code = ctypes.string_at(start, lib.bpf_function_size(module, name.encode()))
    references = []
    for index in range(len(code) // _INSTRUCTION.size):
        operation, registers, _, constant = _INSTRUCTION.unpack_from(
            code, index * _INSTRUCTION.size
        )
        if operation == _LOAD_CONSTANT and registers >> 4 == _PSEUDO_MAP:
            references.append((index, known[constant]))
    return {"name": name, "code": base64.b64encode(code).decode(), "references": references}


def _own_files() -> list[str]:
    """The libraries that make up the compiler: with another one the object may be another."""
    with open("/proc/self/maps", encoding="utf-8") as file:
        paths = {line.split(None, 5)[5].strip() for line in file if line.count("/")}
    return sorted(path for path in paths if any(word in path for word in ("bcc", "clang", "LLVM")))


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    reply, fds = _compile(_receive(channel))
    socket.send_fds(channel, [json.dumps(reply).encode()], fds)
    # Straight out: unwinding clang costs time and can only go wrong.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
