"""Quantize a weight by plain operations: on any device, in any dtype.

A chain of operations on the whole weight would keep ten intermediate copies of it; this keeps none and works through
the rows in pieces that stay in the cache, where a pass takes a quarter of the time.

Letters as in ``fake_quantize``, and r rows of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from plquant.quant.affine import choose_qparams, group_range
from plquant.quant.grid import IntGrid
from plquant.quant.grouped import Gradients, GroupedWeight, Ranges
from plquant.quant.pieces import piece_size


def quantize(weight: GroupedWeight, grid: IntGrid, scale_dtype: torch.dtype, out: Tensor) -> Ranges:
    """Round a weight to its grid.

    Args:
        weight: The weight.
        grid: Its grid.
        scale_dtype: That the scale is stored in, and rounded to.
        out: [R, G, g], becomes the values n s, or the codes n + z if its dtype is one of integers.
    """
    (buffer,) = _buffers(weight, 1, pieces=2)  # of one buffer more fits the cache
    found: list[Ranges] = []
    for groups, outer, nudge, into, *clip in _split(
        len(buffer), weight.groups, weight.outer, weight.nudge, out, weight.low, weight.high
    ):
        rows = _product(weight, groups, outer, into=buffer[: len(groups)])
        low, high = group_range(rows)
        lo, hi = (low, high) if clip[0] is None else (low * clip[0], high * clip[1])
        scale, zero_point = choose_qparams(lo, hi, grid, scale_dtype)
        steps = rows.div_(scale)
        steps = (steps if nudge is None else steps.add_(nudge)).round_()
        # torch.clamp with tensor bounds takes four times as long as these two.
        torch.maximum(steps, grid.qmin - zero_point, out=steps)
        torch.minimum(steps, grid.qmax - zero_point, out=steps)
        into.copy_(steps.mul_(scale) if out.is_floating_point() else steps.add_(zero_point))
        found.append(Ranges(low, high, lo, hi, scale, zero_point))
    return found[0] if len(found) == 1 else Ranges(*map(torch.cat, zip(*found, strict=True)))


def gradients(
    weight: GroupedWeight, ranges: Ranges, grid: IntGrid, grad: Tensor, needed: tuple[bool, ...]
) -> Gradients:
    """Gradients of the fields of a weight.

    Args:
        weight: The weight.
        ranges: What ``quantize`` found.
        grid: Its grid.
        grad: That of the values, [R, G, g].
        needed: Which are asked for.
    """
    needs_weight, needs_inner, needs_outer, needs_low, needs_high, needs_nudge = needed
    g_inner = torch.zeros_like(weight.inner) if needs_inner and weight.inner is not None else None
    g_groups: list[Tensor] = []
    g_outer: list[Tensor] = []
    g_nudge: list[Tensor] = []
    g_ends: list[tuple[Tensor, Tensor]] = []
    buffers = _buffers(weight, 4)
    pieces = _split(buffers.shape[1], weight.groups, weight.outer, weight.nudge, grad, *ranges)
    for groups, outer, nudge, g_out, *part in pieces:
        g_values, product, g_rows, rows = buffers[:, : len(groups)]
        g_values.copy_(g_out)
        _product(weight, groups, outer, into=rows)
        found = Ranges(*part)
        g_ends.append(_straight_through_(g_values, product, g_rows, rows, nudge, found, grid))
        if needs_nudge:
            g_nudge.append(g_rows * found.scale)
        if not (needs_weight or needs_inner or needs_outer):
            continue
        _add_at_ends_(product, g_rows if needs_weight else None, rows, found, g_ends[-1], scratch=g_values)
        if g_inner is not None:
            g_inner += product.sum(0, keepdim=True)
        if needs_outer:
            g_outer.append(product.sum((1, 2), keepdim=True))
        if needs_weight:
            g_groups.append(_product(weight, g_rows, outer, into=rows).to(groups.dtype, copy=True))
    g_lo, g_hi = map(torch.cat, zip(*g_ends, strict=True))
    return (
        torch.cat(g_groups) if needs_weight else None,
        g_inner.div_(weight.inner) if g_inner is not None and weight.inner is not None else None,
        torch.cat(g_outer).div_(weight.outer) if needs_outer and weight.outer is not None else None,
        g_lo.mul_(ranges.low) if needs_low else None,
        g_hi.mul_(ranges.high) if needs_high else None,
        torch.cat(g_nudge) if needs_nudge else None,
    )


def _buffers(weight: GroupedWeight, count: int, pieces: int = 1) -> Tensor:
    """Memory for so many rows as are worked on at once, [count, r, G, g] in fp32 (fp64 for an fp64 weight)."""
    groups = weight.groups
    rounds = -(-groups.numel() // (pieces * piece_size(groups)))
    rows = -(-len(groups) // rounds)
    return groups.new_empty((count, rows, *groups.shape[1:]), dtype=torch.promote_types(groups.dtype, torch.float32))


def _product(weight: GroupedWeight, groups: Tensor, outer: Tensor | None, into: Tensor) -> Tensor:
    """Some rows of the weight."""
    into.copy_(groups)
    if weight.inner is not None:
        into.mul_(weight.inner)
    return into if outer is None else into.mul_(outer)


def _split(rows: int, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """So many rows of every tensor at a time; ``None`` stays ``None``."""
    return zip(*(repeat(None) if t is None else t.split(rows) for t in tensors), strict=False)


def _straight_through_(
    grad: Tensor, product: Tensor, g_rows: Tensor, rows: Tensor, nudge: Tensor | None, r: Ranges, grid: IntGrid
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
    product: Tensor, g_rows: Tensor | None, rows: Tensor, r: Ranges, g_ends: tuple[Tensor, Tensor], scratch: Tensor
) -> None:
    """Add the gradient of a range to that of the weights which are its ends, in equal parts where several are."""
    for end, kept, g_end in zip((r.low, r.high), (r.lo, r.hi), g_ends, strict=True):
        is_end = torch.eq(rows, end, out=scratch)
        share = (g_end * kept).div_(is_end.sum(-1, keepdim=True).clamp_(min=1))
        product.addcmul_(is_end, share)
        if g_rows is not None:
            g_rows.addcmul_(is_end, torch.where(end == 0, 0, share / end))
