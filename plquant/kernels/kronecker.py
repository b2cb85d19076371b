"""The run-time operation of a Kronecker-factored matrix, with the quantization of its result if that is wanted."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from plquant.kernels.kronecker_kernel import kronecker_kernel
from plquant.kernels.native import MOST_KRONECKER_ORDER
from plquant.kernels.tokens import QuantizedTokens

# Letters: M rows; X [n1, n2] a row of x.


def apply(x: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    """``factor x (L^T kron R)``, each row as factor (L X) R, both products rounded to the dtype of x.

    Args:
        x: [M, n1 n2], fp16 or bf16.
        left: L, [n1, n1], in the dtype of x, n1 at most 128.
        right: R, [n2, n2], likewise.
        factor: Multiplied with the sums of the second product before they are rounded.

    Raises:
        ValueError: A shape or dtype is another.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, left, right, factor, out, None, None, _options(8, True) | {"QUANTIZE": False})
    return out


def quantize(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    bits: int,
    symmetric: bool = False,
    offset: Tensor | None = None,
    factor: float = 1.0,
) -> QuantizedTokens:
    """The codes of ``apply(x, left, right, factor)``, as ``quantize_tokens`` makes them, in one launch.

    Args:
        x: As in ``apply``.
        left: As in ``apply``.
        right: As in ``apply``.
        bits: Width of a code, 2 to 8.
        symmetric: No zero-point.
        offset: fp32 [n1 n2], added to the quotient before rounding.
        factor: As in ``apply``.

    Raises:
        ValueError: A shape, dtype or number is another.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} is not 2 to 8")
    result = QuantizedTokens.empty(x, x.shape[1], symmetric)
    _launch(x, left, right, factor, result.codes, result, offset, _options(bits, symmetric) | {"QUANTIZE": True})
    return result


def _options(bits: int, symmetric: bool) -> dict[str, Any]:
    return {"QMIN": -(1 << (bits - 1)), "QMAX": (1 << (bits - 1)) - 1, "SYMMETRIC": symmetric}


def sizes(n1: int, n2: int) -> dict[str, int]:
    """The tiles that hold matrices of these orders, and the warps for them."""
    tiles = [max(16, triton.next_power_of_2(n)) for n in (n1, n2)]
    return {"N1": tiles[0], "N2": tiles[1], "num_warps": 8 if tiles[0] * tiles[1] > 4096 else 4}


def _launch(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    factor: float,
    out: Tensor,
    codes: QuantizedTokens | None,
    offset: Tensor | None,
    options: dict[str, Any],
) -> None:
    n1, n2 = len(left), len(right)
    if left.shape != (n1, n1) or right.shape != (n2, n2) or x.dim() != 2 or x.shape[1] != n1 * n2:
        raise ValueError(f"x {tuple(x.shape)} is not rows of {tuple(left.shape)} times {tuple(right.shape)} matrices")
    if max(n1, n2) > MOST_KRONECKER_ORDER:
        raise ValueError(f"factors of {n1} and {n2} are larger than {MOST_KRONECKER_ORDER}, which fit in registers")
    if x.dtype not in (torch.float16, torch.bfloat16) or {left.dtype, right.dtype} != {x.dtype}:
        raise ValueError(f"x, left and right are {x.dtype}, {left.dtype}, {right.dtype}, not all fp16 or all bf16")
    if x.stride(1) != 1:
        x = x.contiguous()
    scale = x if codes is None else codes.scale
    zero = x if codes is None or codes.zero_point is None else codes.zero_point
    sums = x if codes is None else codes.sums
    tensors = (x, left.contiguous(), right.contiguous(), out, scale if offset is None else offset, scale, zero, sums)
    with torch.cuda.device_of(x):
        kronecker_kernel[(len(x),)](
            *tensors, x.stride(0), out.stride(0), n1, n2, factor, OFFSET=offset is not None, **options, **sizes(n1, n2)
        )
