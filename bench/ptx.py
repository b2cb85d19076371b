"""Inline PTX on numpy arrays: the instructions that the kernels use, so that the text that is compiled is tested.

A register is a uint32 array with one element per lane.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Register = NDArray[np.uint32]


def run(text: str, registers: dict[str, Register], lanes: int) -> dict[str, Register]:
    """The registers after a piece of PTX.

    Args:
        text: Statements, each ended by ``;``; operands are registers or immediate numbers.
        registers: Inputs by name (``$1``), each [lanes].
        lanes: Number of lanes.

    Raises:
        NotImplementedError: An instruction that is not in ``INSTRUCTIONS``.
    """
    registers = dict(registers)
    for statement in re.split(r"[;\n]", re.sub(r"//.*|[{}]", " ", text)):
        statement = statement.strip()
        if not statement or statement.startswith(".reg"):
            continue
        name, rest = statement.split(None, 1)
        target, *operands = (operand.strip() for operand in rest.split(","))
        if name not in INSTRUCTIONS:
            raise NotImplementedError(f"inline PTX: {name} is not among {', '.join(INSTRUCTIONS)}")
        for operand in {*operands} - {*registers}:
            registers[operand] = np.full(lanes, int(operand, 0) & 0xFFFFFFFF, np.uint32)
        registers[target] = INSTRUCTIONS[name](*(registers[o] for o in operands)).astype(np.uint32, copy=False)
    return registers


def _lop3(a: Register, b: Register, c: Register, table: Register) -> Register:
    out = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def _prmt(a: Register, b: Register, selector: Register) -> Register:
    sources = np.concatenate([np.ascontiguousarray(r).view(np.uint8).reshape(-1, 4) for r in (a, b)], axis=1)
    lanes = np.arange(len(sources))
    out = np.zeros_like(a)
    for i in range(4):
        choice = selector >> np.uint32(4 * i)
        byte = sources[lanes, choice & 7]
        sign = np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0))  # bit 3: the sign of the byte, eight times
        out |= np.where(choice & 8, sign, byte.astype(np.uint32)) << np.uint32(8 * i)
    return out


def _halves(function: Callable[..., NDArray[np.float64]]) -> Callable[..., Register]:
    """Two fp16 in a register; computed in float64 and rounded once, as a fused instruction is."""

    def run_halves(*registers: Register) -> Register:
        halves = [np.ascontiguousarray(r).view(np.float16).astype(np.float64) for r in registers]
        return function(*halves).astype(np.float16).view(np.uint32)

    return run_halves


def _bf16_halves(function: Callable[..., NDArray[np.float64]]) -> Callable[..., Register]:
    """Two bf16 in a register; computed in float64, rounded to odd in fp32 and then to nearest even."""

    def run_halves(*registers: Register) -> Register:
        shifted = [np.ascontiguousarray(r).view(np.uint16).astype(np.uint32) << np.uint32(16) for r in registers]
        exact = np.asarray(function(*(s.view(np.float32).astype(np.float64) for s in shifted)))
        near = exact.astype(np.float32)
        bits = np.where(np.abs(near) > np.abs(exact), near.view(np.uint32) - np.uint32(1), near.view(np.uint32))
        bits |= (near != exact).astype(np.uint32)  # what was cut off must not look like a tie
        rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(exact), np.uint16(0x7FC0), rounded.astype(np.uint16)).view(np.uint32)

    return run_halves


def _shift(left: bool) -> Callable[[Register, Register], Register]:
    def run_shift(a: Register, by: Register) -> Register:
        by = np.minimum(by, np.uint32(32))  # PTX clamps; numpy's result for 32 and more is undefined
        shifted = a.astype(np.uint64) << by if left else a.astype(np.uint64) >> by
        return (shifted & np.uint64(0xFFFFFFFF)).astype(np.uint32)

    return run_shift


INSTRUCTIONS: dict[str, Callable[..., Register]] = {
    "mov.b32": lambda a: a.copy(),
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "xor.b32": np.bitwise_xor,
    "not.b32": np.invert,
    "shl.b32": _shift(left=True),
    "shr.b32": _shift(left=False),
    "shr.u32": _shift(left=False),
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "add.f16x2": _halves(lambda a, b: a + b),
    "add.rn.f16x2": _halves(lambda a, b: a + b),
    "sub.f16x2": _halves(lambda a, b: a - b),
    "sub.rn.f16x2": _halves(lambda a, b: a - b),
    "mul.f16x2": _halves(lambda a, b: a * b),
    "mul.rn.f16x2": _halves(lambda a, b: a * b),
    "fma.rn.f16x2": _halves(lambda a, b, c: a * b + c),
    "fma.rn.bf16x2": _bf16_halves(lambda a, b, c: a * b + c),
}
