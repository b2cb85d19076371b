"""Quantize and dequantize a weight in one differentiable step: what a calibration step does to every linear.

One autograd function, because this is what a step costs beside its matmuls: chained operations would keep ten
intermediate copies of the weight; this keeps none and works through the rows in pieces that stay in the cache, where a
pass takes a quarter of the time. ``quantize_weight`` (the fold) and ``fake_quantize`` (the forward) share
``_quantized``: their codes agree.

Letters: R, G, g as in ``affine``, r rows of a piece; s scale, z zero-point, u = w / s, v what moves the rounding (0
unless it is learned), n = clamp(round(u + v), qmin - z, qmax - z). Rounding is straight-through (so is z's, which has
no gradient at all in OmniQuant's released code):

    inside the range   d(n s)/dw = 1    d(n s)/ds = n - u    d(n s)/dv = s
    clipped            d(n s)/dw = 0    d(n s)/ds = n - lo / s    d(n s)/dlo = 1    (symmetric: n and 0)
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plquant.quant.affine import QTensor, choose_qparams, from_groups, group_range, to_groups
from plquant.quant.grid import IntGrid
from plquant.quant.pieces import piece_size

Clip = tuple[Tensor, Tensor]


class _Weight(NamedTuple):
    """A weight to be quantized, ``groups`` * ``inner`` * ``outer``, and how much of its ranges is kept.

    Attributes:
        groups: [R, G, g], any floating dtype.
        inner: [1, G, g], multiplies the columns.
        outer: [R, 1, 1], multiplies the rows.
        low: Share of the lower end, [R, G, 1].
        high: Share of the upper end, [R, G, 1].
        nudge: v, [R, G, g].
    """

    groups: Tensor
    inner: Tensor | None
    outer: Tensor | None
    low: Tensor | None
    high: Tensor | None
    nudge: Tensor | None

    def buffers(self, count: int, pieces: int = 1) -> Tensor:
        """Memory for so many rows as are worked on at once, [count, r, G, g] in fp32 (fp64 for an fp64 weight)."""
        rounds = -(-self.groups.numel() // (pieces * piece_size(self.groups)))
        rows = -(-len(self.groups) // rounds)
        dtype = torch.promote_types(self.groups.dtype, torch.float32)
        return self.groups.new_empty((count, rows, *self.groups.shape[1:]), dtype=dtype)

    def product(self, groups: Tensor, outer: Tensor | None, into: Tensor) -> Tensor:
        """Some rows of the weight."""
        into.copy_(groups)
        if self.inner is not None:
            into.mul_(self.inner)
        return into if outer is None else into.mul_(outer)


class _Ranges(NamedTuple):
    """What is known of every group: each [R, G, 1], fp32 (fp64 for an fp64 weight)."""

    low: Tensor  # the range of the weight,
    high: Tensor
    lo: Tensor  # what clipping keeps of it,
    hi: Tensor
    scale: Tensor  # and the grid this gives
    zero_point: Tensor


def _split(rows: int, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """So many rows of every tensor at a time; ``None`` stays ``None``."""
    return zip(*(repeat(None) if t is None else t.split(rows) for t in tensors), strict=False)


def _quantized(weight: _Weight, grid: IntGrid, scale_dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, _Ranges]]:
    """Every piece of a weight as codes less their zero-point, n, and ranges: the single place where codes are made."""
    (buffer,) = weight.buffers(1, pieces=2)  # of one buffer more fits the cache
    stop = 0
    for groups, outer, nudge, *clip in _split(
        len(buffer), weight.groups, weight.outer, weight.nudge, weight.low, weight.high
    ):
        start, stop = stop, stop + len(groups)
        rows = weight.product(groups, outer, into=buffer[: len(groups)])
        low, high = group_range(rows)
        lo, hi = (low, high) if clip[0] is None else (low * clip[0], high * clip[1])
        scale, zero_point = choose_qparams(lo, hi, grid, scale_dtype)
        steps = rows.div_(scale)
        steps = (steps if nudge is None else steps.add_(nudge)).round_()
        # torch.clamp with tensor bounds takes four times as long as these two.
        torch.maximum(steps, grid.qmin - zero_point, out=steps)
        torch.minimum(steps, grid.qmax - zero_point, out=steps)
        yield slice(start, stop), steps, _Ranges(low, high, lo, hi, scale, zero_point)


def _joined(found: list[_Ranges]) -> _Ranges:
    return found[0] if len(found) == 1 else _Ranges(*map(torch.cat, zip(*found, strict=True)))


class _FakeQuantize(torch.autograd.Function):
    """Works on groups; takes the fields of ``_Weight`` one by one."""

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
        weight = _Weight(groups, inner, outer, low, high, nudge)
        out = torch.empty_like(groups, dtype=dtype)
        found: list[_Ranges] = []
        for piece, steps, ranges in _quantized(weight, grid, scale_dtype):
            out[piece] = steps.mul_(ranges.scale)
            found.append(ranges)
        ctx.grid = grid
        ctx.save_for_backward(*weight, *_joined(found))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        weight, ranges = _Weight(*saved[:6]), _Ranges(*saved[6:])
        needs_weight, needs_inner, needs_outer, needs_clip, _, needs_nudge = ctx.needs_input_grad[:6]
        g_inner = torch.zeros_like(saved[1]) if needs_inner else None
        g_groups: list[Tensor] = []
        g_outer: list[Tensor] = []
        g_nudge: list[Tensor] = []
        g_ends: list[tuple[Tensor, Tensor]] = []
        buffers = weight.buffers(4)
        pieces = _split(buffers.shape[1], weight.groups, weight.outer, weight.nudge, *grads, *ranges)
        for groups, outer, nudge, g_out, *part in pieces:
            grad, product, g_rows, rows = buffers[:, : len(groups)]
            grad.copy_(g_out)
            weight.product(groups, outer, into=rows)
            found = _Ranges(*part)
            g_ends.append(_straight_through_(grad, product, g_rows, rows, nudge, found, ctx.grid))
            if needs_nudge:
                g_nudge.append(g_rows * found.scale)
            if not (needs_weight or needs_inner or needs_outer):
                continue
            _add_at_ends_(product, g_rows if needs_weight else None, rows, found, g_ends[-1], scratch=grad)
            if g_inner is not None:
                g_inner += product.sum(0, keepdim=True)
            if needs_outer:
                g_outer.append(product.sum((1, 2), keepdim=True))
            if needs_weight:
                g_groups.append(weight.product(g_rows, outer, into=rows).to(groups.dtype, copy=True))
        g_lo, g_hi = map(torch.cat, zip(*g_ends, strict=True))
        return (
            torch.cat(g_groups) if needs_weight else None,
            g_inner.div_(saved[1]) if g_inner is not None else None,
            torch.cat(g_outer).div_(saved[2]) if needs_outer else None,
            g_lo.mul_(ranges.low) if needs_clip else None,
            g_hi.mul_(ranges.high) if needs_clip else None,
            torch.cat(g_nudge) if needs_nudge else None,
            None,
            None,
            None,
        )


def _straight_through_(
    grad: Tensor, product: Tensor, g_rows: Tensor, rows: Tensor, nudge: Tensor | None, r: _Ranges, grid: IntGrid
) -> tuple[Tensor, Tensor]:
    """Gradients of the two ends of the range that is kept, each [r, G, 1].

    Args:
        grad: The gradient of n s, [r, G, g].
        product: Becomes ``g_rows * rows``.
        g_rows: Becomes the gradient of the weight with its range held fixed.
        rows: The weight.
        nudge: What moves its rounding.
        r: Its ranges.
        grid: Its grid.
    """
    codes = torch.div(rows, r.scale, out=product)
    codes = (codes if nudge is None else codes.add_(nudge)).round_()
    if not grid.symmetric:
        codes.add_(r.zero_point)
    # Zero where a code was clipped; comparisons, which give booleans, take ten times as long on a CPU.
    torch.ops.aten.hardtanh_backward.grad_input(grad, codes, grid.qmin - 0.5, grid.qmax + 0.5, grad_input=g_rows)
    g_scale = codes.clamp_(grid.qmin, grid.qmax).mul_(grad).sum(-1, keepdim=True)
    total, inside = grad.sum(-1, keepdim=True), g_rows.sum(-1, keepdim=True)
    through = torch.mul(g_rows, rows, out=product).sum(-1, keepdim=True)
    if grid.symmetric:  # scale = max(hi / qmax, lo / qmin), and zero_point = 0
        g_scale.addcdiv_(through, r.scale, value=-1)
        from_hi = r.hi / grid.qmax >= r.lo / grid.qmin
        return torch.where(from_hi, 0, g_scale / grid.qmin), torch.where(from_hi, g_scale / grid.qmax, 0)
    g_scale.addcmul_(r.zero_point, total, value=-1)
    clipped = total.sub_(inside)
    g_hi = g_scale.addcdiv_(through.addcmul_(clipped, r.lo), r.scale, value=-1).div_(grid.qmax - grid.qmin)
    return clipped - g_hi, g_hi


def _add_at_ends_(
    product: Tensor, g_rows: Tensor | None, rows: Tensor, r: _Ranges, g_ends: tuple[Tensor, Tensor], scratch: Tensor
) -> None:
    """Add the gradient of a range to that of the weights which are its ends, in equal parts where several are."""
    for end, kept, g_end in zip((r.low, r.high), (r.lo, r.hi), g_ends, strict=True):
        is_end = torch.eq(rows, end, out=scratch)
        share = (g_end * kept).div_(is_end.sum(-1, keepdim=True).clamp_(min=1))
        product.addcmul_(is_end, share)
        if g_rows is not None:
            g_rows.addcmul_(is_end, torch.where(end == 0, 0, share / end))


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
    codes = torch.empty_like(groups, dtype=torch.int8 if grid.symmetric else torch.uint8)
    nudge = None if nudge is None else to_groups(nudge, grid)
    low, high = clip if clip is not None else (None, None)
    scaled = _Weight(groups, *_grouped_scales(weight, grid, in_scale, out_scale), low, high, nudge)
    found = []
    for piece, steps, ranges in _quantized(scaled, grid, scale_dtype):
        codes[piece] = steps.add_(ranges.zero_point)
        found.append(ranges)
    ranges = _joined(found)
    scale, zero_point = ranges.scale.squeeze(-1).to(scale_dtype), ranges.zero_point.squeeze(-1).to(torch.uint8)
    if grid.axis == "out":
        scale, zero_point = scale.t().contiguous(), zero_point.t().contiguous()
    return QTensor(from_groups(codes, grid), scale, None if grid.symmetric else zero_point, grid)
