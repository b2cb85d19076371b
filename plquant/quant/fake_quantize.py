"""Quantize and dequantize a weight in one differentiable step: what a calibration step does to every linear.

One autograd function, because this is what a step costs beside its matmuls. It keeps no copy of the weight. On a CPU
the work is that of quantize.cpp, elsewhere and in fp64 that of ``in_pieces``; they agree to the bit in codes and
scales. ``quantize_weight`` (the fold) and ``fake_quantize`` (the forward) share ``_quantize``: their codes agree.

Letters: R, G, g as in ``affine``; s scale, z zero-point, u = w / s, v what moves the rounding (0 unless it is learned),
n = clamp(round(u + v), qmin - z, qmax - z). Rounding is straight-through (so is z's, which has no gradient at all in
OmniQuant's released code):

    inside the range   d(n s)/dw = 1    d(n s)/ds = n - u    d(n s)/dv = s
    clipped            d(n s)/dw = 0    d(n s)/ds = n - lo / s    d(n s)/dlo = 1    (symmetric: n and 0)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plquant.quant import in_pieces, native
from plquant.quant.affine import QTensor, from_groups, to_groups
from plquant.quant.grid import IntGrid
from plquant.quant.grouped import GroupedWeight, Ranges

Clip = tuple[Tensor, Tensor]


def _quantize(weight: GroupedWeight, grid: IntGrid, scale_dtype: torch.dtype, out: Tensor) -> Ranges:
    """Fill ``out`` with values or codes: the single place where codes are made."""
    quantize = native.quantize if native.takes(weight, scale_dtype, out) else in_pieces.quantize
    return quantize(weight, grid, scale_dtype, out)


class _FakeQuantize(torch.autograd.Function):
    """Works on groups; takes the fields of a ``GroupedWeight`` one by one."""

    @staticmethod
    def forward(
        ctx: Any,
        groups: Tensor,
        inner: Tensor | None,
        outer: Tensor | None,
        low: Tensor | None,
        high: Tensor | None,
        nudge: Tensor | None,
        grid: IntGrid,
        dtype: torch.dtype,
        scale_dtype: torch.dtype,
    ) -> Tensor:
        weight = GroupedWeight(groups, inner, outer, low, high, nudge)
        out = groups.new_empty(groups.shape, dtype=dtype)
        ranges = _quantize(weight, grid, scale_dtype, out)
        ctx.grid, ctx.scale_dtype = grid, scale_dtype
        ctx.save_for_backward(*weight, *ranges)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, ranges = GroupedWeight(*ctx.saved_tensors[:6]), Ranges(*ctx.saved_tensors[6:])
        gradients = native.gradients if native.takes(weight, ctx.scale_dtype, grad) else in_pieces.gradients
        return *gradients(weight, ranges, ctx.grid, grad, ctx.needs_input_grad[:6]), None, None, None


def _grouped_scales(
    weight: Tensor, grid: IntGrid, in_scale: Tensor | None, out_scale: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Channel scales as they meet the groups of ``weight``: [1, G, g] along the rows' inside, [R, 1, 1] across."""
    inner, outer = (in_scale, out_scale) if grid.axis == "in" else (out_scale, in_scale)
    inner = None if inner is None else inner.view(1, -1, grid.size(inner.numel()))
    return inner, None if outer is None else outer.view(-1, 1, 1)


def fake_quantize(
    weight: Tensor,
    grid: IntGrid,
    clip: Clip | None = None,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    scale_dtype: torch.dtype | None = None,
    nudge: Tensor | None = None,
) -> Tensor:
    """The quantized value of ``diag(out_scale) weight diag(in_scale)``, differentiable in all tensors.

    Args:
        weight: [O, I], computed in fp32 (fp64 for an fp64 weight).
        grid: The grid, with its group size settled.
        clip: Kept share of the lower and the upper end of every group, each fp32 [R, G, 1].
        in_scale: [I], positive.
        out_scale: [O], positive.
        dtype: Of the result; the weight's if not given.
        scale_dtype: That the scale is stored in, and rounded to; the weight's if not given.
        nudge: fp32 [O, I], added to ``w / scale`` before rounding.
    """
    inner, outer = _grouped_scales(weight, grid, in_scale, out_scale)
    low, high = clip if clip is not None else (None, None)
    dtypes = dtype or weight.dtype, scale_dtype or weight.dtype
    nudge = None if nudge is None else to_groups(nudge, grid)
    groups = to_groups(weight, grid)
    return from_groups(_FakeQuantize.apply(groups, inner, outer, low, high, nudge, grid, *dtypes), grid)


@torch.no_grad()
def quantize_weight(
    weight: Tensor,
    grid: IntGrid,
    clip: Clip | None = None,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    scale_dtype: torch.dtype | None = None,
    nudge: Tensor | None = None,
) -> QTensor:
    """The codes behind ``fake_quantize`` of the same arguments."""
    groups = to_groups(weight, grid)
    scale_dtype = scale_dtype or weight.dtype
    nudge = None if nudge is None else to_groups(nudge, grid)
    low, high = clip if clip is not None else (None, None)
    scaled = GroupedWeight(groups, *_grouped_scales(weight, grid, in_scale, out_scale), low, high, nudge)
    codes = groups.new_empty(groups.shape, dtype=torch.int8 if grid.symmetric else torch.uint8)
    ranges = _quantize(scaled, grid, scale_dtype, codes)
    scale, zero_point = ranges.scale.squeeze(-1).to(scale_dtype), ranges.zero_point.squeeze(-1).to(torch.uint8)
    if grid.axis == "out":
        scale, zero_point = scale.t().contiguous(), zero_point.t().contiguous()
    return QTensor(from_groups(codes, grid), scale, None if grid.symmetric else zero_point, grid)
