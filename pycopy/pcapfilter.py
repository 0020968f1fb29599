"""pcap-filter(7) expressions: to C for the BPF programs, and applied to a packet right here.

libpcap parses and optimises; what it makes (classic BPF) becomes one C function,
instruction for instruction, so the user's filter means what it means in tcpdump, and runs
in the kernel at the cost of the comparisons it makes.

The one difference: a filter sees packets without their VLAN tags. At TC the kernel has
taken the outer tag off before any program runs, some network cards do so for XDP too;
inner tags are skipped here. So one expression selects the same packets at every hook.
"""

import contextlib
import ctypes
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from pycopy.errors import HostUnfit, UsageError

_DLT_EN10MB, _DLT_RAW = 1, 12
_SNAPSHOT_BYTES = 262144

#: No IP packet but a jumbogram is longer; nothing of a header is there.
_MAX_OFFSET = 65535
_NETMASK_UNKNOWN = 0xFFFFFFFF
_OPTIMIZE = 1

#: Loads from here on are not of the packet but of what a capture socket knows about it.
_ANCILLARY = 0xFFFFF000

_ETHERTYPE_AT = 12
_VLAN_ETHERTYPES = (0x8100, 0x88A8)
_VLAN_TAG_BYTES = 4
_VLAN_TAGS = 2

#: ``vlan`` as a word of its own, not part of a host's name.
_VLAN_WORD = re.compile(r"(?<![\w.-])vlan(?![\w.-])")

# Classic BPF, as in bpf(4): class, then size and mode, operation, or source.
_LD, _LDX, _ST, _STX, _ALU, _JMP, _RET = range(7)
_IMM, _ABS, _IND, _MEM, _LEN, _MSH = 0x00, 0x20, 0x40, 0x60, 0x80, 0xA0
_SIZES = {0x00: 4, 0x08: 2, 0x10: 1}
_DIV, _LSH, _RSH, _NEG, _MOD = 0x30, 0x60, 0x70, 0x80, 0x90
_ALU_OPERATORS = {0x00: "+", 0x10: "-", 0x20: "*", _DIV: "/", 0x40: "|", 0x50: "&", _LSH: "<<"}
_ALU_OPERATORS |= {_RSH: ">>", _MOD: "%", 0xA0: "^"}
_JA = 0x00
_JUMP_OPERATORS = {0x10: "==", 0x20: ">", 0x30: ">=", 0x40: "&"}
_SOURCE_X = 0x08
_RET_A = 0x10
_TXA = 0x80

_TYPES = {4: "u32", 2: "u16", 1: "u8"}
_TO_HOST = {4: "ntohl(v)", 2: "ntohs(v)", 1: "v"}


class _Instruction(NamedTuple):
    code: int
    jt: int
    jf: int
    k: int


class _CInstruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("jt", ctypes.c_ubyte),
        ("jf", ctypes.c_ubyte),
        ("k", ctypes.c_uint),
    )


class _CProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint), ("instructions", ctypes.POINTER(_CInstruction)))


def _libpcap() -> Any:
    try:
        library = ctypes.CDLL("libpcap.so.0.8")
    except OSError as error:
        raise HostUnfit(
            "libpcap, which reads filter expressions, is missing", "apt-get install libpcap0.8"
        ) from error
    program = ctypes.POINTER(_CProgram)
    library.pcap_open_dead.argtypes = [ctypes.c_int, ctypes.c_int]
    library.pcap_open_dead.restype = ctypes.c_void_p
    library.pcap_compile.argtypes = [
        ctypes.c_void_p, program, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint
    ]  # fmt: skip
    library.pcap_geterr.argtypes = [ctypes.c_void_p]
    library.pcap_geterr.restype = ctypes.c_char_p
    library.pcap_freecode.argtypes = [program]
    library.pcap_freecode.restype = None
    library.pcap_close.argtypes = [ctypes.c_void_p]
    library.pcap_close.restype = None
    library.bpf_filter.argtypes = [
        ctypes.POINTER(_CInstruction), ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint
    ]  # fmt: skip
    library.bpf_filter.restype = ctypes.c_uint
    return library


@contextlib.contextmanager
def _compiled(library: Any, expression: str, l2_bytes: int) -> Iterator[_CProgram]:
    """The expression as libpcap's program; UsageError with libpcap's words if it is wrong."""
    if _VLAN_WORD.search(expression):
        raise UsageError(
            f"filter '{expression}': a filter sees packets without their VLAN tags",
            "leave `vlan` out, and name the VLAN's own interface with -i",
        )
    handle = library.pcap_open_dead(_DLT_EN10MB if l2_bytes else _DLT_RAW, _SNAPSHOT_BYTES)
    program = _CProgram()
    try:
        text = expression.encode()
        if library.pcap_compile(handle, program, text, _OPTIMIZE, _NETMASK_UNKNOWN):
            reason = library.pcap_geterr(handle).decode("utf-8", "replace")
            raise UsageError(f"filter '{expression}': {reason}", "the syntax is in pcap-filter(7)")
        try:
            yield program
        finally:
            library.pcap_freecode(program)
    finally:
        library.pcap_close(handle)


def _instructions(expression: str, l2_bytes: int) -> list[_Instruction]:
    with _compiled(_libpcap(), expression, l2_bytes) as program:
        return [
            _Instruction(each.code, each.jt, each.jf, each.k)
            for each in program.instructions[: program.length]
        ]


def matches(expression: str, packet: bytes, l2_bytes: int) -> bool:
    """What libpcap's own interpreter says of ``packet``, a frame or (l2_bytes 0) a datagram."""
    if not expression.strip():
        return True
    if l2_bytes:
        packet = _without_tags(packet)
    library = _libpcap()
    with _compiled(library, expression, l2_bytes) as program:
        verdict = library.bpf_filter(program.instructions, packet, len(packet), len(packet))
    return bool(verdict)


def _without_tags(frame: bytes) -> bytes:
    end = _ETHERTYPE_AT
    for _ in range(_VLAN_TAGS):
        if int.from_bytes(frame[end : end + 2], "big") in _VLAN_ETHERTYPES:
            end += _VLAN_TAG_BYTES
    return frame[:_ETHERTYPE_AT] + frame[end:]


def compile_filter(expression: str, l2_bytes: int) -> str:
    """C text of ``pycopy_filter()``; every packet is wanted if the expression is empty."""
    head = "static inline int pycopy_filter(PYCOPY_CTX *ctx, void *data, void *data_end, u32 len)"
    if not expression.strip():
        return f"{head}\n{{\n\treturn 1;\n}}\n"
    instructions = _instructions(expression, l2_bytes)
    slots = sorted({slot for each in instructions if (slot := _scratch_slot(each)) is not None})
    variables = ["A = 0", "X = 0", "tags = 0", *(f"M{slot} = 0" for slot in slots)]
    body = [f"\tu32 {', '.join(variables)};"]
    if l2_bytes:
        body.append(_SKIP_TAGS)
    targets: set[int] = set()
    statements = []
    for index, instruction in enumerate(instructions):
        statements.append(_statement(expression, instruction, index, targets))
    for index, statement in enumerate(statements):
        body.append(f"L{index}:\t{statement}" if index in targets else f"\t{statement}")
    text = "\n".join(body)
    return f"/* {' '.join(expression.split())} */\n{head}\n{{\n{text}\n}}\n"


#: The tag's protocol stands in front of it, where the EtherType of an untagged frame is.
_SKIP_TAGS = f"""\
	u16 ethertype;
#pragma clang loop unroll(full)
	for (int i = 0; i < {_VLAN_TAGS}; i++) {{
		if (PYCOPY_LOAD_BYTES(ctx, {_ETHERTYPE_AT} + tags, &ethertype, 2))
			break;
		if ({" && ".join(f"ethertype != htons(0x{value:x})" for value in _VLAN_ETHERTYPES)})
			break;
		tags += {_VLAN_TAG_BYTES};
	}}"""


def _scratch_slot(instruction: _Instruction) -> int | None:
    kind, mode = instruction.code & 7, instruction.code & 0xE0
    if kind in (_ST, _STX) or (kind in (_LD, _LDX) and mode == _MEM):
        return instruction.k
    return None


def _unsupported(expression: str, what: str) -> UsageError:
    return UsageError(f"filter '{expression}': {what} cannot be had in the kernel", "leave it out")


def _statement(expression: str, instruction: _Instruction, index: int, targets: set[int]) -> str:
    """One instruction in C; jumps add to ``targets`` the indexes that need a label."""
    code, _, _, k = instruction
    kind = code & 7
    if kind in (_LD, _LDX):
        return _load(expression, instruction)
    if kind in (_ST, _STX):
        return f"M{k} = {'A' if kind == _ST else 'X'};"
    if kind == _ALU:
        return _alu(code, k)
    if kind == _JMP:
        return _jump(expression, instruction, index, targets)
    if kind == _RET:
        return "return A != 0;" if code & 0x18 == _RET_A else f"return {int(k != 0)};"
    return "A = X;" if code & _TXA else "X = A;"


def _load(expression: str, instruction: _Instruction) -> str:
    """A load beyond the packet's end makes the filter reject, as libpcap has it."""
    code, k = instruction.code, instruction.k
    register = "A" if code & 7 == _LD else "X"
    mode, size = code & 0xE0, _SIZES.get(code & 0x18, 0)
    if mode == _IMM:
        return f"{register} = {k}U;"
    if mode == _MEM:
        return f"{register} = M{k};"
    if mode == _LEN:
        return f"{register} = len - tags;"
    if k >= _ANCILLARY:
        raise _unsupported(expression, "direction, interface or packet type")
    if k > _MAX_OFFSET:
        return "return 0;"
    # Addresses come before the tags, everything else behind them.
    at = f"{k} + tags" if k >= _ETHERTYPE_AT else f"{k}"
    if mode == _ABS:
        load = f"PYCOPY_LOAD_BYTES(ctx, {at}, &v, {size})"
        return f"{{ {_TYPES[size]} v; if ({load}) return 0; {register} = {_TO_HOST[size]}; }}"
    if mode == _MSH:
        load = f"PYCOPY_LOAD_BYTES(ctx, {at}, &v, 1)"
        return f"{{ u8 v; if ({load}) return 0; X = (v & 15) << 2; }}"
    # X may be anything that stood in the packet: no wrapping round to a small offset.
    load = f"PYCOPY_LOAD_BYTES(ctx, X + {at}, &v, {size})"
    return (
        f"{{ {_TYPES[size]} v; if (X > len || {load}) return 0; {register} = {_TO_HOST[size]}; }}"
    )


def _alu(code: int, k: int) -> str:
    operation, by_x = code & 0xF0, code & _SOURCE_X
    if operation == _NEG:
        return "A = -A;"
    operator = _ALU_OPERATORS[operation]
    if operation in (_LSH, _RSH):
        amount = "X" if by_x else f"{k}U"
        return f"A = {amount} < 32 ? A {operator} {amount} : 0;"
    if operation in (_DIV, _MOD) and by_x:
        return f"if (!X) return 0; A {operator}= X;"
    return f"A {operator}= {'X' if by_x else f'{k}U'};"


def _jump(expression: str, instruction: _Instruction, index: int, targets: set[int]) -> str:
    code, jt, jf, k = instruction
    following = index + 1
    operation = code & 0xF0
    if operation == _JA:
        if k >= 1 << 31:  # backwards: a loop along the packet's headers
            raise _unsupported(expression, "protochain")
        targets.add(following + k)
        return f"goto L{following + k};"
    condition = f"A {_JUMP_OPERATORS[operation]} {'X' if code & _SOURCE_X else f'{k}U'}"
    targets.add(following + jt)
    targets.add(following + jf)
    return f"if ({condition}) goto L{following + jt}; else goto L{following + jf};"
