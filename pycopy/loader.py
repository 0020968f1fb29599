"""From an object's name to loaded BPF programs and their maps.

The instructions come from pycopy.kernel.objects, made ahead of time; no compiler is needed. What
goes wrong with the kernel becomes one of our errors here. Where the program is attached is
pycopy.kernel.attach's business.
"""

import contextlib
import errno
import os
import re
from collections.abc import Mapping
from typing import NoReturn

from pycopy.errors import HostUnfit, PycopyError
from pycopy.host import privileges
from pycopy.kernel import objects, shapes, syscall
from pycopy.kernel.abi import Constant
from pycopy.kernel.module import Module, lift_memory_limit, make_map, no_privileges
from pycopy.process.console import while_slow

#: What a kernel says of a helper that it does not have, and which those are that pycopy calls.
_UNKNOWN = re.compile(r"invalid func unknown#(\d+)")
_HELPERS = {
    188: ("bpf_xdp_get_buff_len", "5.18, for --hook xdp"),
    189: ("bpf_xdp_load_bytes", "5.18, for --hook xdp"),
    130: ("bpf_ringbuf_output", "5.8; --transport perf does without"),
}


def load(
    name: str, *, given: Mapping[str, int] | None = None,
    entries: Mapping[str, int] | None = None, constants: Mapping[Constant, int] | None = None,
    filter_code: bytes = b"", perf: bool = False,
) -> Module:  # fmt: skip
    """Load an object of the catalogue (pycopy.kernel.objects) with the maps that it needs.

    ``given``: descriptors of maps made before, by name; the others are made, with so many
    ``entries`` as said (of "segments": bytes). ``perf``: records leave by perf event output.
    Raises PycopyError with nothing left open.
    """
    privileges.check_privileges()
    made = objects.find(name)
    numbers = objects.map_numbers(made.programs.values())
    names = [each for each, number in shapes.NUMBERS.items() if number in numbers]
    given = {each: fd for each, fd in (given or {}).items() if each in names}
    values = {**objects.ANY_CONSTANTS, **(constants or {}), Constant.PERF: int(perf)}
    kind = syscall.XDP_PROGRAM if objects.CATALOGUE[name].xdp else syscall.SCHED_CLS_PROGRAM
    lift_memory_limit()
    with contextlib.ExitStack() as opened:
        fds = {}
        for each in names:
            if each not in given:
                fds[each] = make_map(each, (entries or {}).get(each, 0), perf)
                opened.callback(os.close, fds[each])
        by_number = {shapes.NUMBERS[each]: fd for each, fd in {**fds, **given}.items()}
        programs = {}
        for program in objects.CATALOGUE[name].programs:
            code = objects.link_code(made.programs[program], by_number, values, filter_code)
            with while_slow(f"loading {name}: this kernel's verifier takes its time"):
                programs[program] = _load_program(name, kind, program, code, made.license)
            opened.callback(os.close, programs[program])
        module = Module(name, programs, fds, given)
        opened.pop_all()
    return module


def _load_program(name: str, kind: int, program: str, code: bytes, license: str) -> int:
    try:
        return syscall.program_load(kind, program, code, license)
    except syscall.Rejected as error:
        _explain(name, error)
    except OSError as error:
        raise PycopyError(f"the kernel does not load {name}: {error.strerror}") from error


def _explain(name: str, error: syscall.Rejected) -> NoReturn:
    unknown = _UNKNOWN.search(error.log)
    if unknown:
        helper, since = _HELPERS.get(int(unknown[1]), (f"BPF helper {unknown[1]}", "a later one"))
        raise HostUnfit(
            f"this kernel has no {helper} (it came with Linux {since})",
            "use the other hook, or a newer kernel",
        ) from error
    if "prohibited for !root" in error.log or "!root" in error.log:
        raise HostUnfit(
            "the verifier takes pointer arithmetic only from who has CAP_PERFMON",
            privileges.cure(),
        ) from error
    if error.errno == errno.EPERM and not error.log:
        raise no_privileges(error) from error
    raise objects.rejected(name, error) from error
