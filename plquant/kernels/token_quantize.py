"""Activations to codes, row by row, in one launch with what comes before: norm, gather of channels, rotation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from plquant.kernels.token_quantize_kernel import token_quantize_kernel
from plquant.kernels.tokens import QuantizedTokens

# Letters: M rows, K channels of x, K' channels of the codes, T most sources of a channel.

HADAMARD_ORDERS = (0, 16, 32, 64, 128)
MAX_WIDTH = 65536


@dataclass(frozen=True)
class Norm:
    """RMSNorm before everything else: gain [K] in the dtype of x, and epsilon."""

    gain: Tensor
    eps: float


def quantize_tokens(
    x: Tensor,
    bits: int,
    symmetric: bool = False,
    offset: Tensor | None = None,
    clip: Tensor | None = None,
    *,
    norm: Norm | None = None,
    gather: Tensor | None = None,
    hadamard: int = 0,
) -> QuantizedTokens:
    """Norm, gather, rotation and quantization of rows.

    Args:
        x: [M, K], fp16 or bf16, channels contiguous.
        bits: Width of a code, 2 to 8.
        symmetric: No zero-point.
        offset: fp32 [K'], added to x / scale before rounding.
        clip: fp32 [2], share of the lower and of the upper end of every row's range that is kept.
        norm: RMSNorm, as modules compute it: x / rms rounded to the dtype of x, then times the gain.
        gather: int32 [T, K'], of ``sources``; sums are rounded once.
        hadamard: Order of the Hadamard matrix over sqrt(order) that blocks of channels are multiplied with: 16, 32, 64
            or 128; 0 for none.

    Raises:
        ValueError: A shape, dtype or number is not one of these; the message says which.
    """
    rows, width = x.shape
    width_out = width if gather is None else gather.shape[1]
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"x is {x.dtype}, not torch.float16 or torch.bfloat16")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} is not 2 to 8")
    if hadamard not in HADAMARD_ORDERS or (hadamard and width_out % hadamard):
        raise ValueError(f"hadamard={hadamard} is not one of {HADAMARD_ORDERS} that divides {width_out}")
    if max(width, width_out) > MAX_WIDTH:
        raise ValueError(f"rows of {max(width, width_out)} channels are wider than {MAX_WIDTH}")
    if x.stride(1) != 1:
        x = x.contiguous()
    result = QuantizedTokens.empty(x, width_out, symmetric)
    gain = x if norm is None else norm.gain
    table = result.sums if gather is None else gather
    shift = result.scale if offset is None else offset
    shares = result.scale if clip is None else clip
    zero = result.sums if result.zero_point is None else result.zero_point
    outputs = (result.codes, result.scale, zero, result.sums)
    sizes = (x.stride(0), result.rows.stride(0), width, width_out, 0.0 if norm is None else norm.eps)
    options = constants(bits, symmetric, width, width_out, 0 if gather is None else len(gather), hadamard)
    with torch.cuda.device_of(x):  # triton launches on the current device
        token_quantize_kernel[(rows,)](
            *(x, gain, table, shift, shares, *outputs, *sizes),
            NORM=norm is not None,
            OFFSET=offset is not None,
            CLIP=clip is not None,
            **options,
        )
    return result


def constants(bits: int, symmetric: bool, width: int, width_out: int, most: int, hadamard: int) -> dict[str, Any]:
    """The constants that follow from bits and sizes."""
    block = triton.next_power_of_2(width)
    block_out = max(triton.next_power_of_2(width_out), 16 * hadamard)
    return {
        "SOURCES": most,
        "HADAMARD": hadamard,
        "QMIN": -(1 << (bits - 1)),
        "QMAX": (1 << (bits - 1)) - 1,
        "SYMMETRIC": symmetric,
        "BLOCK": block,
        "BLOCK_OUT": block_out,
        "num_warps": min(16, max(4, max(block, block_out) // 1024)),
    }
