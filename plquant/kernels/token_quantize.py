"""Activations to codes, row by row, in one launch with what comes before: norm, gather of channels, rotation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from plquant.kernels.token_quantize_kernel import token_quantize_kernel

# Letters: M rows, K channels of x, K' channels of the codes, T most sources of a channel, A additions.

HADAMARD_ORDERS = (0, 16, 32, 64, 128)
MAX_WIDTH = 65536


@dataclass(frozen=True)
class QuantizedTokens:
    """Activations as signed codes, x = scale (code - zero_point), all of a token in one row of bytes.

    So one tensor of the shape of the activations can take their place between two modules.

    Attributes:
        rows: int8 [M, row_bytes(K')]: the codes, what fills them up to a multiple of 16, then fp32 scale, int32
            zero-point, int32 sum of the codes, and four bytes of nothing.
        width: K'.
        symmetric: There is no zero-point.
    """

    rows: Tensor
    width: int
    symmetric: bool

    @classmethod
    def empty(cls, x: Tensor, width: int, symmetric: bool) -> QuantizedTokens:
        """Room for the codes of the rows of ``x``."""
        return cls(x.new_empty(len(x), row_bytes(width), dtype=torch.int8), width, symmetric)

    @property
    def codes(self) -> Tensor:
        """int8 [M, K'], in [-2^(bits - 1), 2^(bits - 1)); those of an asymmetric grid are less by half its range."""
        return self.rows[:, : self.width]

    @property
    def scale(self) -> Tensor:
        """fp32 [M]."""
        return self._rest(torch.float32)[:, 0]

    @property
    def zero_point(self) -> Tensor | None:
        """int32 [M], in the units of ``codes``; ``None``: symmetric."""
        return None if self.symmetric else self._rest(torch.int32)[:, 1]

    @property
    def sums(self) -> Tensor:
        """int32 [M], of the codes of each row."""
        return self._rest(torch.int32)[:, 2]

    def _rest(self, dtype: torch.dtype) -> Tensor:
        return self.rows[:, -16:].view(dtype)


def row_bytes(width: int) -> int:
    """Of ``QuantizedTokens`` with so many codes."""
    return -(-width // 16) * 16 + 16


@dataclass(frozen=True)
class Norm:
    """RMSNorm before everything else: gain [K] in the dtype of x, and epsilon."""

    gain: Tensor
    eps: float


def sources(index: Tensor, adds: Tensor) -> Tensor:
    """What each channel of a gather is the sum of.

    Args:
        index: integer [K'], the channel that each one reads.
        adds: integer [A, 2], a channel and the position that it is added at.

    Returns:
        int32 [T, K'], padded with -1; the sums are taken in this order.
    """
    columns: list[list[int]] = [[channel] for channel in index.tolist()]
    for channel, position in adds.tolist():
        columns[position].append(channel)
    most = max(map(len, columns))
    table = torch.tensor([column + [-1] * (most - len(column)) for column in columns], dtype=torch.int32)
    return table.T.contiguous().to(index.device)


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
