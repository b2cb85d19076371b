"""y = x W^T for 17 rows of x and more, and a packed weight: the launcher of ``prefill_kernel``."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from plquant.kernels.layout import LAYOUT, PLANES, PackedWeight
from plquant.kernels.prefill_kernel import prefill_kernel

WARPS = 4  # of a program; each has 32 outputs
INPUTS = 128  # of a step
STAGES = 3


def linear(x: Tensor, packed: PackedWeight) -> Tensor:
    """The product x W^T.

    Args:
        x: [M, I], fp16 or bf16, the dtype of the scales, on the weight's device. Meant for M of 17 to 256: the decode
            kernel is for fewer rows; for more, dequantizing once and torch's product are.
        packed: The weight, groups along the input.

    Returns:
        [M, O] in the dtype of x: the product with the dequantized weight. The same operands give the same bits.

    Raises:
        ValueError: The shape or dtype of x, or the layout of the weight, is not what this kernel reads.
    """
    if x.dim() != 2 or x.shape[1] != packed.in_features:
        raise ValueError(f"x is {tuple(x.shape)}, not (rows, {packed.in_features})")
    if x.dtype not in (torch.float16, torch.bfloat16) or x.dtype != packed.scale.dtype:
        raise ValueError(
            f"x is {x.dtype} and scales are {packed.scale.dtype}, not both torch.float16 or torch.bfloat16"
        )
    if packed.layout != LAYOUT:
        raise ValueError(f"the weight's layout is {packed.layout!r}, this kernel reads {LAYOUT!r}")
    if packed.axis != "in":
        raise ValueError("groups along the output are not read by this kernel; dequantize the weight")
    if x.stride(1) != 1:
        x = x.contiguous()
    out = x.new_empty(len(x), packed.out_features)
    options = constants(packed.bits, len(x), _capability(x.device))
    options["GROUP"] = 0 if packed.group_size == packed.in_features else packed.group_size
    options["SYMMETRIC"] = packed.zero_point is None
    options["MASKED"] = packed.in_features % INPUTS != 0 or packed.padded_out_features % (32 * WARPS) != 0
    high = packed.words if packed.high is None else packed.high
    zeros = packed.scale if packed.zero_point is None else packed.zero_point
    padded = (packed.padded_in_features, packed.padded_out_features)
    sizes = (len(x), packed.in_features, packed.out_features, *padded, x.stride(0))
    grid = (triton.cdiv(len(x), options["M"]) * triton.cdiv(packed.out_features, 32 * WARPS),)
    with torch.cuda.device_of(x):
        prefill_kernel[grid](packed.words, high, packed.scale, zeros, x, out, *sizes, **options)
    return out


def constants(bits: int, rows: int, capability: int) -> dict[str, Any]:
    """The constants that follow from the width, the rows of x and the major compute capability, 0 if not NVIDIA's."""
    low, high = PLANES[bits]
    options = {
        "BITS": bits,
        "LOW_BITS": low,
        "HIGH_BITS": high,
        "M": 32 if rows <= 32 else 64,
        "W": WARPS,
        "K": INPUTS,
        "STAGES": STAGES,
        "PTX": capability > 0,
        "OPAQUE": capability in (8, 12),
        "num_warps": WARPS,
        "num_stages": STAGES,
    }
    if capability:
        options["maxnreg"] = 255  # without a bound ptxas would spill rather than miss a round occupancy
    return options


@cache
def _capability(device: torch.device) -> int:
    """For a CPU, on which kernels are interpreted, that of an A100."""
    if torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
