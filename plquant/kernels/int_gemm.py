"""y = x W^T on integer tensor cores: quantized activations times a quantized weight with one scale per output channel.

Weights of 2 to 4 bits are stored as two codes a byte, those of 5 to 8 bits as one; products are of int8 either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from plquant.kernels.int_gemm_kernel import int_gemm_kernel
from plquant.kernels.tokens import QuantizedTokens

# Letters: M rows of x, I in_features, O out_features.

BLOCK = 128  # inputs that a row of the weight is padded to a multiple of, and that are packed together


@dataclass(frozen=True)
class IntWeight:
    """A weight of signed codes, w = scale (code - zero_point).

    Attributes:
        codes: int8 [O, I'], I padded with zeros to a multiple of 128. ``packed``: [O, I' / 2], byte j of each block of
            64 has input j of 128 in its lower half and input j + 64 in its upper half.
        scale: fp32 [O].
        zero_point: int32 [O], or ``None`` if it is zero everywhere.
        sums: int32 [O], of code - zero_point over the inputs.
        packed: Two codes a byte.
        in_features: I.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    sums: Tensor
    packed: bool
    in_features: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (self.codes, self.scale, self.zero_point, self.sums) if t is not None)


@dataclass(frozen=True)
class Config:
    """Tile of a program: rows of x, outputs, inputs of one step; warps, and steps loaded ahead."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> IntWeight:
    """Codes with one scale per output channel, as the kernel reads them.

    Args:
        codes: [O, I]: uint8 in [0, 2^bits) with a zero-point, or int8 in [-2^(bits - 1), 2^(bits - 1)) without.
        scale: [O] or [O, 1], floating point.
        zero_point: [O] or [O, 1], integer valued in [0, 2^bits); ``None``: symmetric.
        bits: Width of a code, 2 to 8.

    Raises:
        ValueError: Scales are not one per output channel, or ``bits`` is out of range.
    """
    rows, columns = codes.shape
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} is not 2 to 8")
    if scale.numel() != rows:
        raise ValueError(f"integer products need one scale per output channel, {rows}; given are {tuple(scale.shape)}")
    middle = 1 << (bits - 1)
    signed = codes if zero_point is None else (codes.to(torch.int16) - middle).to(torch.int8)
    zeros = None if zero_point is None else zero_point.reshape(-1).to(torch.int32) - middle
    sums = signed.sum(1, dtype=torch.int32)
    sums = sums if zeros is None else sums - columns * zeros
    padded = torch.nn.functional.pad(signed, (0, -columns % BLOCK))
    packed = bits <= 4
    if packed:
        lower, upper = padded.view(rows, -1, 2, BLOCK // 2).unbind(2)
        padded = (lower & 15 | upper << 4).flatten(1)
    return IntWeight(padded.contiguous(), scale.reshape(-1).float(), zeros, sums, packed, columns)


def int_weight(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, sums: Tensor, bits: int, in_features: int
) -> IntWeight:
    """One of its parts."""
    return IntWeight(codes, scale, zero_point, sums, bits <= 4, in_features)


def unpack(weight: IntWeight) -> Tensor:
    """The signed codes, int8 [O, I]."""
    codes = weight.codes
    if weight.packed:
        runs = codes.view(len(codes), -1, BLOCK // 2)
        codes = torch.stack([runs << 4 >> 4, runs >> 4], 2).flatten(1)
    return codes[:, : weight.in_features]


def configure(rows: int, packed: bool, capability: int) -> Config:
    """A tile for so many rows of x.

    Args:
        rows: M.
        packed: Whether codes are packed.
        capability: Major compute capability. From 9 to 10 products are issued by four warps together: their tiles of
            128 x 128 take eight warps then, those of a warp by itself four.
    """
    if rows <= 16:
        return Config(16, 64, 128, 4, 4)
    if packed and capability == 10:
        # Large products take their operands from shared memory there, where codes would have to be put back: a warp's
        # own, in tiles too small for the others, take a sixth of the instructions.
        return Config(32, 128, 128, 4, 3)
    if rows <= 64:
        return Config(64, 128, 128, 4, 3)
    if capability in (9, 10):
        return Config(128, 128, 128, 8, 3)
    return Config(128, 128, 128 if packed else 64, 4, 3)


def linear(x: QuantizedTokens, weight: IntWeight, dtype: torch.dtype, *, config: Config | None = None) -> Tensor:
    """X W^T, the sums over inputs exact.

    Args:
        x: Of I channels.
        weight: The weight.
        dtype: Of the result: fp16, bf16 or fp32.
        config: Instead of ``configure``'s.

    Returns:
        [M, O]: the exact sum, in fp32 times the scale of the row, times that of the output, rounded to ``dtype``.

    Raises:
        ValueError: Widths differ, or sums of so many inputs do not fit 32 bits.
    """
    rows, columns = len(x.rows), x.width
    if columns != weight.in_features:
        raise ValueError(f"x has {columns} channels, the weight takes {weight.in_features}")
    if columns > most_inputs(not x.symmetric, weight):
        raise ValueError(f"a sum of {columns} products can exceed 32 bits; dequantize this weight instead")
    config = configure(rows, weight.packed, _capability(x.rows.device)) if config is None else config
    if weight.packed and config.inputs != BLOCK:
        raise ValueError(f"packed codes are read {BLOCK} inputs at a time, not {config.inputs}")
    out = x.rows.new_empty(rows, len(weight.codes), dtype=dtype)
    grid = (triton.cdiv(rows, config.rows) * triton.cdiv(len(weight.codes), config.outputs),)
    with torch.cuda.device_of(out):  # triton launches on the current device
        int_gemm_kernel[grid](*arguments(x, weight, out), **constants(x, weight, config))
    return out


def most_inputs(x_zero: bool, weight: IntWeight) -> int:
    """The greatest I whose sums fit 32 bits, whatever the codes."""
    product = (
        16 * 128 * 8 if weight.packed else (255 if x_zero else 128) * (255 if weight.zero_point is not None else 128)
    )
    return ((1 << 31) - 1) // product


def arguments(x: QuantizedTokens, weight: IntWeight, out: Tensor) -> tuple[Any, ...]:
    """The tensors and sizes that the kernel is called with."""
    x_zero = x.sums if x.zero_point is None else x.zero_point
    w_zero = weight.sums if weight.zero_point is None else weight.zero_point
    w = (weight.codes, weight.scale, w_zero, weight.sums)
    sizes = (len(x.rows), x.width, len(weight.codes), x.rows.stride(0), weight.codes.stride(0))
    return (x.codes, x.scale, x_zero, x.sums, *w, out, *sizes)


def constants(x: QuantizedTokens, weight: IntWeight, config: Config) -> dict[str, Any]:
    """The constants that the kernel is compiled with."""
    return {
        "PACKED": weight.packed,
        "X_ZERO": not x.symmetric,
        "W_ZERO": weight.zero_point is not None,
        "MASKED": weight.in_features % config.inputs != 0,
        "M": config.rows,
        "N": config.outputs,
        "K": config.inputs,
        "STAGES": config.stages,
        "KEEP": torch.version.hip is None and _capability(x.rows.device) not in (9, 10),
        "PTX": torch.version.hip is None,
        "num_warps": config.warps,
    }


@cache
def _capability(device: torch.device) -> int:
    """Major compute capability; 0 for a CPU, on which kernels are interpreted."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
