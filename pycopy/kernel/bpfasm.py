"""eBPF instructions by name, with labels in place of distances.

The instruction set is RFC 9669; of it only what every kernel from 4.14 on takes: the first
version, and the comparisons "less than" of the second. An instruction is 8 bytes, ``struct
bpf_insn``: opcode, two registers, a signed offset of 16 bits, a signed constant of 32.
"""

import struct
import sys
from enum import IntEnum

INSTRUCTION = struct.Struct("=BBhi")

#: Longest way a jump can go, in instructions.
_FARTHEST = 32767


class Register(IntEnum):
    """R0 is what is returned, R1 to R5 arguments, which a call leaves undefined; R10 the frame."""

    R0 = 0
    R1 = 1
    R2 = 2
    R3 = 3
    R4 = 4
    R5 = 5
    R6 = 6
    R7 = 7
    R8 = 8
    R9 = 9
    R10 = 10


# Arithmetic; the values are those of classic BPF, where that has the operation.
ADD, SUB, MUL, DIV, OR, AND, LSH, RSH, NEG, MOD, XOR, MOV = range(0x00, 0xC0, 0x10)

# Comparisons, all of them unsigned; the first four are classic BPF's.
JEQ, JGT, JGE, JSET, JNE, JLT, JLE = 0x10, 0x20, 0x30, 0x40, 0x50, 0xA0, 0xB0

# Sizes of loads and stores: 4, 2 and 1 bytes.
W, H, B = 0x00, 0x08, 0x10

_LDX, _ST, _STX, _ALU, _JMP, _ALU64 = 0x01, 0x02, 0x03, 0x04, 0x05, 0x07
_MEM, _BY_REGISTER = 0x60, 0x08
_END, _TO_BE = 0xD0, 0x08
_JA, _CALL, _EXIT = 0x00, 0x80, 0x90


class TooFar(Exception):
    """A jump goes farther than an instruction can say."""


class Label:
    """A place in the code, known once it is placed; ``used`` as soon as a jump goes there."""

    def __init__(self) -> None:
        self.used = False
        self.index = -1


class Assembler:
    """Instructions in the order in which they are asked for; code() is what they are as bytes."""

    def __init__(self) -> None:
        self._instructions: list[tuple[int, int, int, int]] = []
        self._jumps: list[tuple[int, Label]] = []

    def emit(
        self, opcode: int, target: int = 0, source: int = 0, offset: int = 0, constant: int = 0
    ) -> None:
        """Any instruction; ``constant`` may be given as the unsigned number of the same bits."""
        registers = source << 4 | target if sys.byteorder == "little" else target << 4 | source
        signed = constant - (1 << 32) if constant >> 31 == 1 else constant
        self._instructions.append((opcode, registers, offset, signed))

    def alu(self, operation: int, target: Register, source: Register | int) -> None:
        """An operation of 32 bits; the other half of ``target`` becomes 0."""
        self._operate(_ALU | operation, target, source)

    def alu64(self, operation: int, target: Register, source: Register | int) -> None:
        """An operation of 64 bits, to which the sign of a constant is extended."""
        self._operate(_ALU64 | operation, target, source)

    def _operate(
        self, opcode: int, target: Register, source: Register | int, offset: int = 0
    ) -> None:
        if isinstance(source, Register):
            self.emit(opcode | _BY_REGISTER, target, source, offset)
        else:
            self.emit(opcode, target, 0, offset, source)

    def to_network(self, size: int, target: Register) -> None:
        """Between network and host byte order (the same thing); the rest becomes 0."""
        if size != B:
            self.emit(_ALU | _END | _TO_BE, target, constant=32 if size == W else 16)

    def load(self, size: int, target: Register, base: Register, offset: int) -> None:
        """``target`` = ``size`` bytes (B, H or W) of memory at ``base`` + ``offset``."""
        self.emit(_LDX | _MEM | size, target, base, offset)

    def store(self, size: int, base: Register, offset: int, source: Register | int) -> None:
        """``size`` bytes of memory at ``base`` + ``offset`` = a register or a constant."""
        if isinstance(source, Register):
            self.emit(_STX | _MEM | size, base, source, offset)
        else:
            self.emit(_ST | _MEM | size, base, 0, offset, source)

    def call(self, helper: int) -> None:
        """Call a helper by its number in ``enum bpf_func_id`` (linux/bpf.h)."""
        self.emit(_JMP | _CALL, constant=helper)

    def exit(self) -> None:
        """Return register 0."""
        self.emit(_JMP | _EXIT)

    def jump(self, label: Label) -> None:
        """Go to ``label`` in any case."""
        self._go(label)
        self.emit(_JMP | _JA)

    def jump_if(
        self, comparison: int, left: Register, right: Register | int, label: Label
    ) -> None:  # fmt: skip
        """A comparison of 64 bits; a constant is below 2^31, as its sign would be extended."""
        self._go(label)
        self._operate(_JMP | comparison, left, right)

    def _go(self, label: Label) -> None:
        label.used = True
        self._jumps.append((len(self._instructions), label))

    def place(self, label: Label) -> None:
        """The next instruction is where jumps to ``label`` go."""
        label.index = len(self._instructions)

    def code(self) -> bytes:
        """All of it, with the jumps' distances filled in; may raise TooFar."""
        instructions = list(self._instructions)
        for index, label in self._jumps:
            opcode, registers, _, constant = instructions[index]
            distance = label.index - (index + 1)
            if abs(distance) > _FARTHEST:
                raise TooFar(distance)
            instructions[index] = opcode, registers, distance, constant
        return b"".join(INSTRUCTION.pack(*each) for each in instructions)
