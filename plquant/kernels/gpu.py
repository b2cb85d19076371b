"""Which Triton kernel takes which product on a GPU.

The kernels compute in fp16 and bf16, the dtype of the scales; activations of another dtype are cast around the call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from plquant.kernels import decode, int_gemm, kronecker, prefill
from plquant.kernels.dequantize import dequantize
from plquant.kernels.int_gemm import IntWeight
from plquant.kernels.layout import PackedWeight
from plquant.kernels.token_quantize import quantize_tokens
from plquant.kernels.tokens import QuantizedTokens

MOST_PREFILL_ROWS = 256  # from here on torch's product of the dequantized weight, made once, is the quickest


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``x W^T + bias``; ``x`` [M, K] contiguous."""
    rows = x.to(weight.scale.dtype)
    if len(rows) <= decode.MAX_ROWS:
        out = decode.linear(rows, weight)
    elif len(rows) <= MOST_PREFILL_ROWS and weight.axis == "in":
        out = prefill.linear(rows, weight)
    else:
        out = F.linear(rows, dequantize(weight))
    return _finished(out, x, bias)


def quantized_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    bits: int,
    symmetric: bool,
    offset: Tensor | None,
    clip: Tensor | None = None,
) -> Tensor:
    """``linear`` of the activations quantized row by row."""
    tokens = quantize_tokens(x.to(weight.scale.dtype), bits, symmetric, offset, clip)
    return linear(_values(tokens).to(x.dtype), weight, bias)


def integer_linear(
    x: Tensor,
    weight: IntWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
    bits: int,
    symmetric: bool,
    offset: Tensor | None,
    clip: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:
    """``quantized_linear`` as a product of integers; ``dtype`` is that of the model: fp16 or bf16.

    With ``left`` and ``right`` it is that of ``factor x (L^T kron R)``, which is quantized as it is made.
    """
    if left is None or right is None:
        tokens = quantize_tokens(x.to(dtype), bits, symmetric, offset, clip)
    else:
        tokens = kronecker.quantize(x.to(dtype), left, right, bits, symmetric, offset, factor)
    return _finished(int_gemm.linear(tokens, weight, x.dtype), x, bias)


def _values(tokens: QuantizedTokens) -> Tensor:
    """What the codes stand for, fp32 [M, K]."""
    steps = tokens.codes.float()
    return (steps if tokens.zero_point is None else steps - tokens.zero_point[:, None]) * tokens.scale[:, None]


def _finished(out: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    out = out.to(x.dtype)
    return out if bias is None else out.add_(bias)
