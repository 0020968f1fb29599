"""The child that compiles: ``python3 -P -m pycopy.kernel.compiler FD``, started by objects.py.

bcc brings clang, some 100 MB, into whoever imports it. So it is imported here only: the
request comes over the socket FD as JSON, the instructions go back the same way, and the
process ends. Nothing is loaded into the kernel. What clang has to say is on stdout and stderr,
where whoever started us reads it.

Must run under any Python 3 that has bcc, and needs no other module of pycopy.

Tests: tests/bpf/test_objects.py
"""

import base64
import ctypes
import json
import os
import socket
import struct
import sys
from typing import Any

#: ``struct bpf_insn``.
_INSTRUCTION = struct.Struct("=BBhi")
_VERSION = "int compiled_by(void *ctx) { return __clang_major__ << 16 | __clang_minor__ << 8 |"
_VERSION += " __clang_patchlevel__; }"


def _receive(channel: socket.socket) -> dict[str, Any]:
    parts = []
    while part := channel.recv(1 << 16):
        parts.append(part)
    request: dict[str, Any] = json.loads(b"".join(parts))
    return request


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    """The reply: for each text its programs, or whose fault it is that there are none."""
    os.environ["BCC_KERNEL_SOURCE"] = request["stub"]
    try:
        import bcc
    except ImportError as error:
        return {"failed": "import", "text": str(error)}
    bcc.lib.bpf_module_license.restype = ctypes.c_char_p
    bcc.lib.bpf_module_license.argtypes = [ctypes.c_void_p]
    objects = {}
    for name, each in request["objects"].items():
        try:
            objects[name] = _object(bcc, each)
        except Exception as error:  # bcc raises nothing more precise
            return {"failed": "compile", "of": name, "text": str(error)}
    return {"objects": objects, "compiler": {"bcc": bcc.__version__, "clang": _clang(bcc)}}


def _object(bcc: Any, each: dict[str, Any]) -> dict[str, Any]:
    module = bcc.BPF(text=each["text"], cflags=each["cflags"])
    programs = {name: _code(bcc, module, name) for name in each["programs"]}
    return {
        "license": bcc.lib.bpf_module_license(module.module).decode(),
        "programs": {name: base64.b64encode(code).decode() for name, code in programs.items()},
    }


def _code(bcc: Any, module: Any, name: str) -> bytes:
    start = bcc.lib.bpf_function_start(module.module, name.encode())
    if not start:
        raise RuntimeError(f"no function {name}")
    return ctypes.string_at(start, bcc.lib.bpf_function_size(module.module, name.encode()))


def _clang(bcc: Any) -> str:
    """Its version, which bcc does not tell: as it says it itself."""
    code = _code(bcc, bcc.BPF(text=_VERSION), "compiled_by")
    version: int = _INSTRUCTION.unpack_from(code)[3]
    return f"{version >> 16}.{version >> 8 & 255}.{version & 255}"


def main() -> None:
    """The child: one job in by the socket that argv names, its result out as JSON."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    reply = _compile(_receive(channel))
    channel.sendall(json.dumps(reply).encode())
    # Straight out: unwinding clang costs time and can only go wrong.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
