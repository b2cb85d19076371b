"""Ops by which activations are quantized once for all linears that read them, on a GPU.

    norm_tokens         RMSNorm, a gather of channels, quantization
    kronecker_tokens    a Kronecker product, quantization
    token_linear        the product with an ``int_gemm.IntWeight``

Between them a token is a row of bytes, ``QuantizedTokens.rows``: a tensor of the activations' leading shape, which a
model's own code passes on as it would pass on them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plquant.kernels.checks import HALVES, check_integer_weight, check_kronecker, check_tensor, expect
from plquant.kernels.cpu_layout import Shape
from plquant.kernels.ops import INTEGERS, LIBRARY, SHAPE, implement
from plquant.kernels.tokens import QuantizedTokens, row_bytes

_QUANTIZE = "int bits, bool symmetric, Tensor? offset"

LIBRARY.define(f"norm_tokens(Tensor x, Tensor gain, float eps, Tensor? gather, {_QUANTIZE}) -> Tensor")
LIBRARY.define(f"kronecker_tokens(Tensor x, Tensor left, Tensor right, float factor, {_QUANTIZE}) -> Tensor")
LIBRARY.define(f"token_linear(Tensor tokens, {INTEGERS}, {SHAPE}, ScalarType dtype, bool symmetric) -> Tensor")


def _check_norm(x: Tensor, gain: Tensor, gather: Tensor | None, *quantize: Any) -> int:
    """The width of the codes."""
    expect(x.dtype in HALVES, "x", "bfloat16 or float16", x.dtype)
    expect(x.ndim > 0 and x.shape[-1] == len(gain), "x", f"of shape [..., {len(gain)}]", list(x.shape))
    check_tensor(x, "gain", gain, (x.dtype,), (x.shape[-1],))
    width = x.shape[-1]
    if gather is not None:
        expect(gather.ndim == 2, "gather", "of two dimensions", list(gather.shape))
        check_tensor(x, "gather", gather, (torch.int32,), (*gather.shape,))
        width = gather.shape[1]
    _check_quantize(x, width, *quantize)
    return width


def _check_quantize(x: Tensor, width: int, bits: int, symmetric: bool, offset: Tensor | None) -> None:
    expect(2 <= bits <= 8, "bits", "2 to 8", bits)
    if offset is not None:
        check_tensor(x, "offset", offset, (torch.float32,), (width,))


def _norm_tokens(x: Tensor, gain: Tensor, eps: float, gather: Tensor | None, *quantize: Any) -> Tensor:
    width = _check_norm(x, gain, gather, *quantize)
    if x.numel() == 0:
        return _room(x, width)
    from plquant.kernels.token_quantize import Norm, quantize_tokens  # needs triton

    rows = quantize_tokens(x.reshape(-1, len(gain)), *quantize, norm=Norm(gain, eps), gather=gather).rows
    return rows.view(*x.shape[:-1], -1)


def _kronecker_tokens(x: Tensor, left: Tensor, right: Tensor, factor: float, *quantize: Any) -> Tensor:
    _check_rotated(x, left, right, *quantize)
    if x.numel() == 0:
        return _room(x, x.shape[-1])
    from plquant.kernels.kronecker import quantize as quantized  # needs triton

    bits, symmetric, offset = quantize
    rows = quantized(x.reshape(-1, x.shape[-1]), left, right, bits, symmetric, offset, factor).rows
    return rows.view(*x.shape[:-1], -1)


def _check_rotated(x: Tensor, left: Tensor, right: Tensor, *quantize: Any) -> None:
    check_kronecker(x, left, right, HALVES)
    _check_quantize(x, x.shape[-1], *quantize)


def _token_linear(tokens: Tensor, *arguments: Any) -> Tensor:
    shape, dtype, symmetric = _check_tokens(tokens, *arguments)
    if tokens.numel() == 0:
        return _fake_token_linear(tokens, *arguments)
    from plquant.kernels import int_gemm  # needs triton

    codes, scale, zero_point, sums, bias = arguments[:5]
    weight = int_gemm.int_weight(codes, scale, zero_point, sums, shape.bits, shape.in_features)
    rows = tokens.reshape(-1, tokens.shape[-1]).contiguous()
    out = int_gemm.linear(QuantizedTokens(rows, shape.in_features, symmetric), weight, dtype)
    return (out if bias is None else out.add_(bias)).view(*tokens.shape[:-1], shape.out_features)


def _check_tokens(
    tokens: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    sums: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Shape, torch.dtype, bool]:
    shape, dtype, symmetric = Shape(*rest[:5]), rest[5], rest[6]
    expect(tokens.dtype == torch.int8, "tokens", "int8", tokens.dtype)
    width = row_bytes(shape.in_features)
    expect(tokens.ndim > 0 and tokens.shape[-1] == width, "tokens", f"of shape [..., {width}]", list(tokens.shape))
    check_integer_weight(tokens, codes, scale, zero_point, sums, shape, dtype)
    if bias is not None:
        check_tensor(tokens, "bias", bias, (dtype,), (shape.out_features,))
    return shape, dtype, symmetric


def _room(x: Tensor, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], row_bytes(width), dtype=torch.int8)


def _fake_norm_tokens(x: Tensor, gain: Tensor, eps: float, gather: Tensor | None, *quantize: Any) -> Tensor:
    return _room(x, _check_norm(x, gain, gather, *quantize))


def _fake_kronecker_tokens(x: Tensor, left: Tensor, right: Tensor, factor: float, *quantize: Any) -> Tensor:
    _check_rotated(x, left, right, *quantize)
    return _room(x, x.shape[-1])


def _fake_token_linear(tokens: Tensor, *arguments: Any) -> Tensor:
    shape, dtype, _ = _check_tokens(tokens, *arguments)
    return tokens.new_empty(*tokens.shape[:-1], shape.out_features, dtype=dtype)


implement("norm_tokens", _norm_tokens, _fake_norm_tokens)
implement("kronecker_tokens", _kronecker_tokens, _fake_kronecker_tokens)
implement("token_linear", _token_linear, _fake_token_linear)

norm_tokens = torch.ops.plquant.norm_tokens
kronecker_tokens = torch.ops.plquant.kronecker_tokens
token_linear = torch.ops.plquant.token_linear
