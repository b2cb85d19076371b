"""What every op computes, in plain torch: the specification that kernels are tested against, right on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from plquant.kernels.cpu_layout import Shape, Weight, codes_of, per_group_of


def dequantize(weight: Weight, shape: Shape) -> Tensor:
    """[N, K] in the scale's dtype: ``(code - zero_point) * scale``."""
    codes, scale = codes_of(weight, shape).to(weight.scale.dtype), per_group_of(weight.scale, shape)
    middle = 1 << (shape.bits - 1)
    zero_point = middle if weight.zero_point is None else _spread(per_group_of(weight.zero_point, shape), shape)
    return (codes - zero_point) * _spread(scale, shape)


def linear(x: Tensor, weight: Weight, bias: Tensor | None, shape: Shape) -> Tensor:
    """``x W^T + bias``, [..., K] -> [..., N]."""
    return F.linear(x, dequantize(weight, shape).to(x.dtype), bias)


def quantize_rows(
    x: Tensor, bits: int, symmetric: bool, offset: Tensor | None, clip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Every row on the grid of its own range, which includes zero.

    Args:
        x: [..., K].
        bits: Width of a code.
        symmetric: No zero-point.
        offset: fp32 [K], added before rounding, or ``None``.
        clip: fp32 [2], share of the lower and of the upper end of every range that is kept, or ``None``.

    Returns:
        Steps ``code - zero_point``, fp32 [..., K], and scale, fp32 [..., 1].
    """
    x = x.float()
    lo, hi = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    if clip is not None:
        lo, hi = lo * clip[0], hi * clip[1]
    qmin = -(1 << (bits - 1)) if symmetric else 0
    qmax = qmin + (1 << bits) - 1
    scale = torch.maximum(hi / qmax, lo / qmin) if symmetric else (hi - lo) / (qmax - qmin)
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    zero_point = torch.zeros_like(scale) if symmetric else (-lo / scale).round().clamp(qmin, qmax)
    rounded = (x / scale if offset is None else x / scale + offset).round()
    return torch.minimum(torch.maximum(rounded, qmin - zero_point), qmax - zero_point), scale


def quantized_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    shape: Shape,
    bits: int,
    symmetric: bool,
    offset: Tensor | None,
    clip: Tensor | None = None,
) -> Tensor:
    """``linear`` of the activations quantized row by row."""
    steps, scale = quantize_rows(x, bits, symmetric, offset, clip)
    return linear((steps * scale).to(x.dtype), weight, bias, shape)


def _spread(values: Tensor, shape: Shape) -> Tensor:
    """A value per group -> one per weight, [N, K]."""
    return values.repeat_interleave(shape.group_size, 0 if shape.along_out else 1)


def kronecker(x: Tensor, left: Tensor, right: Tensor, factor: float) -> Tensor:
    """``factor x (L^T kron R)``, each row [n1, n2] as factor (L X) R, both products rounded to the dtype of x."""
    half = left @ x.unflatten(-1, (len(left), len(right)))
    return (half.float() @ right.float() * factor).to(x.dtype).flatten(-2)
