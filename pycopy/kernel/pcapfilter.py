"""pcap-filter(7) expressions: to code for the BPF programs, and applied to a packet right here.

libpcap parses and optimises; what it makes (classic BPF) becomes one function of eBPF,
instruction for instruction, so the user's filter means what it means in tcpdump, and runs
in the kernel at the cost of the comparisons it makes. No compiler has a part in it.

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
from pycopy.kernel import bpfasm
from pycopy.kernel.bpfasm import Assembler, Label, Register

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

# Classic BPF, as in bpf(4): class, then size and mode, operation, or source. Sizes and
# operations have eBPF's numbers.
_LD, _LDX, _ST, _STX, _ALU, _JMP, _RET = range(7)
_IMM, _ABS, _IND, _MEM, _LEN, _MSH = 0x00, 0x20, 0x40, 0x60, 0x80, 0xA0
_SIZE_BYTES = {bpfasm.W: 4, bpfasm.H: 2, bpfasm.B: 1}
_JA = 0x00
_SOURCE_X = 0x08
_RET_A = 0x10
_TXA = 0x80
_WORD_BITS = 32

#: Without JSET, whose opposite is none.
_OPPOSITES = {bpfasm.JEQ: bpfasm.JNE, bpfasm.JGT: bpfasm.JLE, bpfasm.JGE: bpfasm.JLT}

#: bpf_skb_load_bytes() and bpf_xdp_load_bytes(), by ``hook_xdp`` (bpf-helpers(7)).
_LOAD_BYTES = {False: 26, True: 189}

# What the function keeps where: registers that calls leave alone, and its stack.
_CTX, _A, _X, _TAGS = Register.R6, Register.R7, Register.R8, Register.R9
_FRAME = Register.R10
_LEN_AT, _BUFFER_AT, _SLOTS_AT, _SLOT_BYTES = -4, -8, -12, 4


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


def filter_code(expression: str, l2_bytes: int, hook_xdp: bool) -> bytes:
    """eBPF instructions (struct bpf_insn) of a function filter(ctx, frame_bytes) -> 0 or 1.

    ``b""`` if the expression is empty: then every packet is wanted. ``l2_bytes``: 14, or 0 for
    bare IP. Raises UsageError for what libpcap or the kernel does not take. The function calls none
    but the hook's helper to read packets, refers to no map, and ends with its last instruction.
    """
    if not expression.strip():
        return b""
    program = _instructions(expression, l2_bytes)
    try:
        return _Translation(expression, program, bool(l2_bytes), hook_xdp).code()
    except bpfasm.TooFar as error:
        raise UsageError(
            f"filter '{expression[:60]}...': it is too long for the kernel",
            "name networks and port ranges (net, portrange) instead of single hosts and ports",
        ) from error


def _unsupported(expression: str, what: str) -> UsageError:
    return UsageError(f"filter '{expression}': {what} cannot be had in the kernel", "leave it out")


class _Translation:
    """The translation of one classic program, complete once the constructor is through.

    The verifier takes no unreachable instruction, so only what a jump or the instruction
    before leads to is translated. All jumps lead forward: by the time an instruction is
    come to, everything that leads there has been seen.
    """

    def __init__(
        self, expression: str, program: list[_Instruction], tagged: bool, hook_xdp: bool
    ) -> None:
        self._expression = expression
        self._program = program
        self._tagged = tagged
        self._helper = _LOAD_BYTES[hook_xdp]
        slots = sorted({slot for each in program if (slot := _scratch_slot(each)) is not None})
        self._slots = {slot: _SLOTS_AT - _SLOT_BYTES * at for at, slot in enumerate(slots)}
        self._asm = Assembler()
        self._labels = [Label() for _ in program]
        self._accept, self._reject = Label(), Label()
        self._begin()
        self._reached = {0}
        for index, instruction in enumerate(program):
            if index in self._reached:
                self._asm.place(self._labels[index])
                if self._translate(index, instruction):
                    self._reached.add(index + 1)
        self._end()

    def code(self) -> bytes:
        """May raise bpfasm.TooFar."""
        return self._asm.code()

    def _begin(self) -> None:
        asm = self._asm
        asm.alu64(bpfasm.MOV, _CTX, Register.R1)
        asm.store(bpfasm.W, _FRAME, _LEN_AT, Register.R2)
        asm.alu(bpfasm.MOV, _A, 0)
        asm.alu(bpfasm.MOV, _X, 0)
        for at in self._slots.values():
            asm.store(bpfasm.W, _FRAME, at, 0)
        if self._tagged:
            self._count_tags()

    def _count_tags(self) -> None:
        """The tag's protocol stands in front of it, where the EtherType of an untagged frame is."""
        asm, untagged = self._asm, Label()
        first, second = _VLAN_ETHERTYPES
        asm.alu(bpfasm.MOV, _TAGS, 0)
        for tags_bytes in range(0, _VLAN_TAGS * _VLAN_TAG_BYTES, _VLAN_TAG_BYTES):
            tag = Label()
            asm.alu(bpfasm.MOV, Register.R2, _ETHERTYPE_AT + tags_bytes)
            self._load_bytes(_BUFFER_AT, 2, untagged)
            self._fetch(bpfasm.H, Register.R0)
            asm.jump_if(bpfasm.JEQ, Register.R0, first, tag)
            asm.jump_if(bpfasm.JNE, Register.R0, second, untagged)
            asm.place(tag)
            asm.alu(bpfasm.MOV, _TAGS, tags_bytes + _VLAN_TAG_BYTES)
        asm.place(untagged)

    def _end(self) -> None:
        """Return 0 or 1, but in a way that tells the verifier no number: a frame has below 2^31
        bytes, which it does not know. On a branch by a known number that a function returned,
        kernels before 6.5 (fde2a3882bd0) begin to tell all states apart in which any number
        differs, and so may exceed their limit.
        """
        for label, verdict in ((self._reject, 0), (self._accept, 1)):
            if label.used:
                self._asm.place(label)
                self._asm.load(bpfasm.W, Register.R0, _FRAME, _LEN_AT)
                self._asm.alu(bpfasm.RSH, Register.R0, _WORD_BITS - 1)
                if verdict:
                    self._asm.alu(bpfasm.XOR, Register.R0, verdict)
                self._asm.exit()

    def _translate(self, index: int, instruction: _Instruction) -> bool:
        """Whether the instruction behind this one can be come to from here."""
        code, _, _, k = instruction
        kind = code & 7
        if kind in (_LD, _LDX):
            return self._load(instruction)
        if kind in (_ST, _STX):
            self._asm.store(bpfasm.W, _FRAME, self._slots[k], _A if kind == _ST else _X)
        elif kind == _ALU:
            self._alu(code, k)
        elif kind == _JMP:
            return self._jump(index, instruction)
        elif kind == _RET:
            return self._return(code, k)
        else:
            to, source = (_A, _X) if code & _TXA else (_X, _A)
            self._asm.alu(bpfasm.MOV, to, source)
        return True

    # -- loads ---------------------------------------------------------------------------------

    def _load(self, instruction: _Instruction) -> bool:
        code, k = instruction.code, instruction.k
        register = _A if code & 7 == _LD else _X
        mode = code & 0xE0
        if mode == _IMM:
            self._asm.alu(bpfasm.MOV, register, k)
        elif mode == _MEM:
            self._asm.load(bpfasm.W, register, _FRAME, self._slots[k])
        elif mode == _LEN:
            self._asm.load(bpfasm.W, register, _FRAME, _LEN_AT)
            if self._tagged:
                self._asm.alu(bpfasm.SUB, register, _TAGS)
        else:
            return self._load_packet(mode, code & 0x18, k)
        return True

    def _load_packet(self, mode: int, size: int, k: int) -> bool:
        """A load beyond the packet's end makes the filter reject, as libpcap has it."""
        if k >= _ANCILLARY:
            raise _unsupported(self._expression, "direction, interface or packet type")
        if k > _MAX_OFFSET:
            self._asm.jump(self._reject)
            return False
        if mode == _IND:
            # X may be anything that stood in the packet: no wrapping round to a small offset.
            self._asm.load(bpfasm.W, Register.R1, _FRAME, _LEN_AT)
            self._asm.jump_if(bpfasm.JGT, _X, Register.R1, self._reject)
        self._read(k, _SIZE_BYTES[size], by_x=mode == _IND)
        self._fetch(size, _X if mode == _MSH else _A)
        if mode == _MSH:
            self._asm.alu(bpfasm.AND, _X, 15)
            self._asm.alu(bpfasm.LSH, _X, 2)
        return True

    def _read(self, k: int, size_bytes: int, by_x: bool) -> None:
        """Bytes of the packet into the buffer; those on both sides of the tags one by one."""
        step = size_bytes
        if self._tagged and k < _ETHERTYPE_AT and (by_x or k + size_bytes > _ETHERTYPE_AT):
            step = 1
        for done in range(0, size_bytes, step):
            self._locate(k + done, by_x)
            self._load_bytes(_BUFFER_AT + done, step, self._reject)

    def _locate(self, at: int, by_x: bool) -> None:
        """R2: where ``at`` (+ X) of the untagged frame is: addresses come before the tags."""
        asm = self._asm
        if by_x:
            asm.alu(bpfasm.MOV, Register.R2, _X)
            asm.alu(bpfasm.ADD, Register.R2, at)
        else:
            asm.alu(bpfasm.MOV, Register.R2, at)
        if not self._tagged:
            return
        before = Label()
        if at < _ETHERTYPE_AT:
            if not by_x:
                return
            asm.jump_if(bpfasm.JLT, Register.R2, _ETHERTYPE_AT, before)
        asm.alu(bpfasm.ADD, Register.R2, _TAGS)
        asm.place(before)

    def _load_bytes(self, to: int, size_bytes: int, failed: Label) -> None:
        """``size_bytes`` of the packet at R2 to ``to`` on the stack."""
        asm = self._asm
        asm.alu64(bpfasm.MOV, Register.R1, _CTX)
        asm.alu64(bpfasm.MOV, Register.R3, _FRAME)
        asm.alu64(bpfasm.ADD, Register.R3, to)
        asm.alu(bpfasm.MOV, Register.R4, size_bytes)
        asm.call(self._helper)
        asm.jump_if(bpfasm.JNE, Register.R0, 0, failed)

    def _fetch(self, size: int, register: Register) -> None:
        self._asm.load(size, register, _FRAME, _BUFFER_AT)
        self._asm.to_network(size, register)

    # -- arithmetic, jumps ---------------------------------------------------------------------

    def _alu(self, code: int, k: int) -> None:
        asm = self._asm
        operation, by_x = code & 0xF0, code & _SOURCE_X
        if operation in (bpfasm.LSH, bpfasm.RSH):
            self._shift(operation, _X if by_x else k)
        elif operation == bpfasm.NEG:
            asm.alu(operation, _A, 0)
        else:
            if by_x and operation in (bpfasm.DIV, bpfasm.MOD):
                asm.jump_if(bpfasm.JEQ, _X, 0, self._reject)
            asm.alu(operation, _A, _X if by_x else k)

    def _shift(self, operation: int, amount: Register | int) -> None:
        """By a word's length and more everything is shifted out; eBPF would take it modulo."""
        asm = self._asm
        if isinstance(amount, Register):
            short = Label()
            asm.jump_if(bpfasm.JLT, amount, _WORD_BITS, short)
            asm.alu(bpfasm.MOV, _A, 0)
            asm.place(short)
            asm.alu(operation, _A, amount)
        elif amount < _WORD_BITS:
            asm.alu(operation, _A, amount)
        else:
            asm.alu(bpfasm.MOV, _A, 0)

    def _jump(self, index: int, instruction: _Instruction) -> bool:
        code, jt, jf, k = instruction
        following = index + 1
        operation = code & 0xF0
        if operation == _JA:
            if k >= 1 << 31:  # backwards: a loop along the packet's headers
                raise _unsupported(self._expression, "protochain")
            self._asm.jump(self._target(following + k))
            return False
        right: Register | int = _X if code & _SOURCE_X else k
        if right >= 1 << 31:  # a comparison is of 64 bits, and would extend the constant's sign
            right = Register.R1
            self._asm.alu(bpfasm.MOV, right, k)
        yes, no = self._target(following + jt), self._target(following + jf)
        if yes is self._labels[following] and operation in _OPPOSITES:
            operation, yes, no = _OPPOSITES[operation], no, yes
        self._asm.jump_if(operation, _A, right, yes)
        if no is not self._labels[following]:
            self._asm.jump(no)
        return False

    def _target(self, index: int) -> Label:
        """Where a jump to ``index`` goes: what is a verdict there is one at once."""
        code, _, _, k = self._program[index]
        if code & 7 == _RET and code & 0x18 != _RET_A:
            return self._accept if k else self._reject
        self._reached.add(index)
        return self._labels[index]

    def _return(self, code: int, k: int) -> bool:
        if code & 0x18 == _RET_A:
            self._asm.jump_if(bpfasm.JNE, _A, 0, self._accept)
            self._asm.jump(self._reject)
        else:
            self._asm.jump(self._accept if k else self._reject)
        return False


def _scratch_slot(instruction: _Instruction) -> int | None:
    kind, mode = instruction.code & 7, instruction.code & 0xE0
    if kind in (_ST, _STX) or (kind in (_LD, _LDX) and mode == _MEM):
        return instruction.k
    return None
