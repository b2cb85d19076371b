"""A packed weight as a plain matrix, for products with so many rows that torch's own are the best."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from plquant.kernels.dequantize_kernel import dequantize_kernel
from plquant.kernels.layout import LAYOUT, PLANES, PackedWeight

INPUTS = 512  # of a program, or one unit if that is more


def dequantize(packed: PackedWeight) -> Tensor:
    """The weight, [O, I] in the dtype of its scales: ``(code - zero_point) * scale``, rounded once.

    The result is the corner of a matrix padded as the weight is.

    Raises:
        ValueError: The scales are not fp16 or bf16, or the weight is in another layout.
    """
    dtype = packed.scale.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"scales are {dtype}, not torch.float16 or torch.bfloat16")
    if packed.layout != LAYOUT:
        raise ValueError(f"the weight's layout is {packed.layout!r}, this kernel reads {LAYOUT!r}")
    out = packed.scale.new_empty(packed.padded_out_features, packed.padded_in_features)
    high = packed.words if packed.high is None else packed.high
    zeros = packed.scale if packed.zero_point is None else packed.zero_point
    scale = packed.scale
    if packed.axis == "out":
        scale, zeros = (scale * packed.gain).view(torch.int32), zeros.view(torch.int32)  # by a power of two: exact
    units = packed.padded_in_features // unit(packed.bits)
    options = constants(packed.bits, packed.axis == "out", packed.zero_point is None, units, dtype)
    options["GROUP"] = 0 if packed.axis == "in" and packed.group_size == packed.in_features else packed.group_size
    grid = (len(packed.words), triton.cdiv(units, options["UNITS"]))
    with torch.cuda.device_of(out):
        dequantize_kernel[grid](
            packed.words, high, scale, zeros, out.view(torch.int32), units, packed.in_features, **options
        )
    return out[: packed.out_features, : packed.in_features]


def unit(bits: int) -> int:
    """Inputs that whole words of all planes have: 32 to 128."""
    low, high = PLANES[bits]
    return max(32, 128 // (high or low))


def constants(bits: int, along_out: bool, symmetric: bool, units: int, dtype: torch.dtype) -> dict[str, Any]:
    """The constants that the kernel is compiled with, but for GROUP."""
    low, high = PLANES[bits]
    at_once = max(1, INPUTS // unit(bits))
    nvidia = torch.version.hip is None
    options = {
        "LOW_BITS": low,
        "HIGH_BITS": high,
        "BITS": bits,
        "ALONG_OUT": along_out,
        "SYMMETRIC": symmetric,
        "MASKED": units % at_once != 0,
        "UNITS": at_once,
        "DTYPE": tl.float16 if dtype == torch.float16 else tl.bfloat16,
        "PTX": nvidia,
        "num_warps": 4,
    }
    if nvidia:
        options["maxnreg"] = 168  # without a bound ptxas would spill rather than miss a round occupancy
    return options
