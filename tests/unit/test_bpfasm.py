"""Instructions against those of the kernel's documentation, byte for byte."""

import sys

import pytest

from pycopy.kernel import bpfasm
from pycopy.kernel.bpfasm import Assembler, Label, Register, TooFar

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="bytes of little-endian hosts")


@pytest.fixture
def asm():
    return Assembler()


def test_instructions(asm):
    asm.alu64(bpfasm.MOV, Register.R6, Register.R1)
    asm.alu(bpfasm.ADD, Register.R7, 0xFFFFFFFF)
    asm.alu64(bpfasm.ADD, Register.R3, -8)
    asm.load(bpfasm.H, Register.R0, Register.R10, -8)
    asm.store(bpfasm.W, Register.R10, -4, Register.R2)
    asm.store(bpfasm.B, Register.R10, -4, 5)
    asm.to_network(bpfasm.W, Register.R7)
    asm.to_network(bpfasm.B, Register.R7)  # a byte has no order
    asm.call(26)
    asm.exit()
    expected = """
        bf16000000000000 04070000ffffffff 07030000f8ffffff 69a0f8ff00000000 632afcff00000000
        720afcff05000000 dc07000020000000 850000001a000000 9500000000000000
    """
    assert asm.code() == bytes.fromhex(expected)


def test_jumps_go_to_their_labels(asm):
    start, end = Label(), Label()
    asm.place(start)
    asm.jump_if(bpfasm.JEQ, Register.R7, 0x800, end)
    asm.jump_if(bpfasm.JGT, Register.R8, Register.R1, end)
    asm.jump(start)
    asm.place(end)
    asm.exit()
    expected = "1507020000080000 2d18010000000000 0500fdff00000000 9500000000000000"
    assert asm.code() == bytes.fromhex(expected)
    assert start.used and end.used and not Label().used


@pytest.mark.parametrize("between", [32767, 32768])
def test_a_jump_that_does_not_fit(asm, between):
    end = Label()
    asm.jump(end)
    for _ in range(between):
        asm.alu(bpfasm.MOV, Register.R0, 0)
    asm.place(end)
    asm.exit()
    if between == 32767:
        assert asm.code()[:8] == bytes.fromhex("0500ff7f00000000")
    else:
        with pytest.raises(TooFar):
            asm.code()
