"""Quantize and dequantize a weight in one differentiable step: what a calibration step does to every linear.

One autograd function, because this is what a step costs beside its matmuls: chained operations would keep ten
intermediate copies of the weight; this keeps none and works through the rows in pieces that stay in the cache.
``quantize_weight`` (the fold) and ``fake_quantize`` (the forward) share ``_quantized_rows``: their codes agree.

Letters: R, G, g as in ``affine``; s scale, z zero-point, u = w / s, n = clamp(round(u), qmin - z, qmax - z).
Rounding is straight-through (so is z's, which has no gradient at all in OmniQuant's released code):

    inside the range   d(n s)/dw = 1    d(n s)/ds = n - u
    clipped            d(n s)/dw = 0    d(n s)/ds = n - lo / s    d(n s)/dlo = 1    (symmetric: n and 0)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plquant.quant.affine import QTensor, choose_qparams, from_groups, group_range, to_groups
from plquant.quant.grid import IntGrid

# Weights worked on at once: a few fp32 buffers of this size fit the cache; an accelerator wants few, large kernels.
PIECE_ON_CPU, PIECE_ON_ACCELERATOR = 1 << 18, 1 << 26

Clip = tuple[Tensor, Tensor]


class _Ranges(NamedTuple):
    """What is known of every group: each [R, G, 1], fp32 (fp64 for an fp64 weight)."""

    low: Tensor  # the range of the weight,
    high: Tensor
    lo: Tensor  # what clipping keeps of it,
    hi: Tensor
    scale: Tensor  # and the grid this gives
    zero_point: Tensor

    def of(self, piece: slice) -> _Ranges:
        """Those of some rows."""
        return _Ranges(*(t[piece] for t in self))


class _Weight(NamedTuple):
    """A weight to be quantized: ``groups`` * ``inner`` * ``outer``.

    Attributes:
        groups: [R, G, g], any floating dtype.
        inner: [1, G, g], multiplies the columns.
        outer: [R, 1, 1], multiplies the rows.
        scale_dtype: Dtype that the scale is stored in.
    """

    groups: Tensor
    inner: Tensor | None
    outer: Tensor | None
    scale_dtype: torch.dtype

    def pieces(self) -> Iterator[slice]:
        """Rows to work on at once."""
        size = PIECE_ON_CPU if self.groups.device.type == "cpu" else PIECE_ON_ACCELERATOR
        rows = max(1, size // self.groups[0].numel())
        return (slice(start, start + rows) for start in range(0, len(self.groups), rows))

    def rows(self, piece: slice) -> Tensor:
        """Some rows, multiplied; [r, G, g] in fp32 or fp64."""
        groups = self.groups[piece]
        weight = groups.to(torch.promote_types(groups.dtype, torch.float32))
        weight = weight if self.inner is None else weight * self.inner
        return weight if self.outer is None else weight * self.outer[piece]


def _choose(weight: Tensor, clip: Clip | None, grid: IntGrid, scale_dtype: torch.dtype) -> _Ranges:
    low, high = group_range(weight)
    lo, hi = (low, high) if clip is None else (low * clip[0], high * clip[1])
    return _Ranges(low, high, lo, hi, *choose_qparams(lo, hi, grid, scale_dtype))


def _clamped(rounded: Tensor, zero_point: Tensor, grid: IntGrid) -> Tensor:
    """Codes less their zero-point: n of round(u)."""
    # torch.clamp with tensor bounds takes four times as long as these two.
    steps = torch.maximum(rounded, grid.qmin - zero_point)
    return torch.minimum(steps, grid.qmax - zero_point, out=steps)


def _rows(values: Tensor | None, piece: slice) -> Tensor | None:
    return None if values is None else values[piece]


def _quantized_rows(weight: _Weight, clip: Clip | None, grid: IntGrid) -> Iterator[tuple[slice, Tensor, _Ranges]]:
    """Every piece of a weight as steps and ranges: the single place where codes are made."""
    for piece in weight.pieces():
        rows = weight.rows(piece)
        part = None if clip is None else (clip[0][piece], clip[1][piece])
        ranges = _choose(rows, part, grid, weight.scale_dtype)
        yield piece, _clamped((rows / ranges.scale).round_(), ranges.zero_point, grid), ranges


class _FakeQuantize(torch.autograd.Function):
    """Works on groups; takes the fields of ``_Weight`` and ``Clip`` one by one."""

    @staticmethod
    def forward(
        ctx: Any,
        groups: Tensor,
        inner: Tensor | None,
        outer: Tensor | None,
        clip_low: Tensor | None,
        clip_high: Tensor | None,
        grid: IntGrid,
        dtype: torch.dtype,
        scale_dtype: torch.dtype,
    ) -> Tensor:
        clip = None if clip_low is None or clip_high is None else (clip_low, clip_high)
        out = torch.empty_like(groups, dtype=dtype)
        found = []
        for piece, steps, ranges in _quantized_rows(_Weight(groups, inner, outer, scale_dtype), clip, grid):
            out[piece] = steps.mul_(ranges.scale)
            found.append(ranges)
        ctx.grid, ctx.scale_dtype = grid, scale_dtype
        ctx.save_for_backward(groups, inner, outer, clip_low, clip_high, *map(torch.cat, zip(*found, strict=True)))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        groups, inner, outer, clip_low, clip_high, *found = ctx.saved_tensors
        weight, ranges = _Weight(groups, inner, outer, ctx.scale_dtype), _Ranges(*found)
        needs_weight, needs_inner, needs_outer, needs_clip = ctx.needs_input_grad[:4]
        g_groups = torch.empty_like(groups) if needs_weight else None
        g_inner = torch.zeros_like(inner) if needs_inner else None
        g_outer = torch.empty_like(outer) if needs_outer else None
        g_lo, g_hi = torch.empty_like(ranges.lo), torch.empty_like(ranges.hi)
        for piece in weight.pieces():
            rows, part = weight.rows(piece), ranges.of(piece)
            grad = grads[0][piece].to(rows.dtype)
            g_rows, g_lo[piece], g_hi[piece] = _straight_through(rows, grad, part, ctx.grid)
            if not (needs_weight or needs_inner or needs_outer):
                continue
            g_low, g_high = (
                (g_lo[piece], g_hi[piece])
                if clip_low is None
                else (g_lo[piece] * clip_low[piece], g_hi[piece] * clip_high[piece])
            )
            _add_at_extremes_(g_rows, rows, part, g_low, g_high)
            if g_groups is not None:
                g_groups[piece] = _Weight(g_rows, inner, _rows(outer, piece), ctx.scale_dtype).rows(slice(None))
            product = g_rows.mul_(rows)
            if g_inner is not None:
                g_inner += product.sum(0, keepdim=True)
            if g_outer is not None:
                g_outer[piece] = product.sum((1, 2), keepdim=True)
        return (
            g_groups,
            None if g_inner is None else g_inner.div_(inner),
            None if g_outer is None else g_outer.div_(outer),
            g_lo.mul_(ranges.low) if needs_clip else None,
            g_hi.mul_(ranges.high) if needs_clip else None,
            None,
            None,
            None,
        )


def _straight_through(weight: Tensor, grad: Tensor, r: _Ranges, grid: IntGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the weight (its range held fixed) and of the range's two ends; overwrites nothing it is given.

    Masks are made by arithmetic: comparisons, which give booleans, take ten times as long on a CPU.
    """
    position = weight / r.scale
    rounded = position.round()
    steps = _clamped(rounded, r.zero_point, grid)
    beyond = rounded.sub_(steps).abs_().clamp_(max=1).mul_(grad)  # the gradient where a code was clipped
    g_weight, clipped = grad - beyond, beyond.sum(-1, keepdim=True)
    g_scale = torch.mul(grad, steps, out=beyond).addcmul_(g_weight, position, value=-1).sum(-1, keepdim=True)
    if grid.symmetric:  # scale = max(hi / qmax, lo / qmin), and zero_point = 0
        from_hi = r.hi / grid.qmax >= r.lo / grid.qmin
        return g_weight, torch.where(from_hi, 0, g_scale / grid.qmin), torch.where(from_hi, g_scale / grid.qmax, 0)
    g_scale.addcmul_(r.lo / r.scale, clipped, value=-1)
    g_hi = g_scale / (grid.qmax - grid.qmin)
    return g_weight, clipped - g_hi, g_hi


def _add_at_extremes_(g_weight: Tensor, weight: Tensor, r: _Ranges, g_low: Tensor, g_high: Tensor) -> None:
    """The range's gradient belongs to the weights that are its ends, in equal parts where several are."""
    for distance, gradient, end in ((weight - r.low, g_low, r.low), (r.high - weight, g_high, r.high)):
        elsewhere = distance.sign_()  # 0 at the end itself, 1 everywhere else
        count = weight.shape[-1] - elsewhere.sum(-1, keepdim=True)
        share = torch.where(end == 0, 0, gradient) / count.clamp_(min=1)
        g_weight.add_(share).addcmul_(elsewhere, share, value=-1)


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
    """
    inner, outer = _grouped_scales(weight, grid, in_scale, out_scale)
    low, high = clip if clip is not None else (None, None)
    dtypes = dtype or weight.dtype, scale_dtype or weight.dtype
    return from_groups(_FakeQuantize.apply(to_groups(weight, grid), inner, outer, low, high, grid, *dtypes), grid)


@torch.no_grad()
def quantize_weight(
    weight: Tensor,
    grid: IntGrid,
    clip: Clip | None = None,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    scale_dtype: torch.dtype | None = None,
) -> QTensor:
    """The codes behind ``fake_quantize`` of the same arguments."""
    groups = to_groups(weight, grid)
    scale_dtype = scale_dtype or weight.dtype
    codes = torch.empty_like(groups, dtype=torch.int8 if grid.symmetric else torch.uint8)
    scale = torch.empty_like(groups[..., 0], dtype=scale_dtype)
    zero_point = torch.empty_like(scale, dtype=torch.uint8)
    scaled = _Weight(groups, *_grouped_scales(weight, grid, in_scale, out_scale), scale_dtype)
    for piece, steps, ranges in _quantized_rows(scaled, clip, grid):
        codes[piece] = steps.add_(ranges.zero_point)
        scale[piece] = ranges.scale.squeeze(-1)
        zero_point[piece] = ranges.zero_point.squeeze(-1)
    if grid.axis == "out":
        scale, zero_point = scale.t().contiguous(), zero_point.t().contiguous()
    return QTensor(from_groups(codes, grid), scale, None if grid.symmetric else zero_point, grid)
