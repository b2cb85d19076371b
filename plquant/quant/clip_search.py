"""Clipping without learning: for each group, the shares of its range that round with the least squared error.

    min over low, high    sum_i c_i (w_i - Q(w_i; low min(w), high max(w)))^2

with c_i = 1, or the mean square of input channel i: then it is the error of the output, correlations between channels
left out. Along the output axis all weights of a group meet the same input, so that the optimum needs no data.

Searched along one line at a time: a common share, then the lower end, then the upper end. On SmolLM2 the error comes
within 0.5% of that of all pairs of shares, in a fifth of the time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plquant.quant.affine import choose_qparams, group_range, to_groups
from plquant.quant.grid import IntGrid
from plquant.quant.pieces import piece_size

# Letters: R, G, g as in ``affine``; S shares that are tried.

SHARES = [1 - 0.05 * i for i in range(16)]  # 1 to 0.25; the first is kept where several are as good


@torch.no_grad()
def mse_clip(
    weight: Tensor, grid: IntGrid, scale_dtype: torch.dtype | None = None, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Shares of every group's range with the least squared error of rounding, as ``fake_quantize`` takes them.

    Args:
        weight: [O, I], computed in fp32 (fp64 for an fp64 weight).
        grid: The grid, with its group size settled.
        scale_dtype: That the scale is stored in, and rounded to; the weight's if not given.
        importance: [I], not negative: the weight of each input channel's error, such as the diagonal of the Hessian.
            Makes no difference with groups along the output.

    Returns:
        Kept share of the lower and of the upper end, each [R, G, 1] in (0, 1], in the dtype computed in.
    """
    dtype, scale_dtype = torch.promote_types(weight.dtype, torch.float32), scale_dtype or weight.dtype
    groups = to_groups(weight, grid)
    if importance is not None:
        importance = None if grid.axis == "out" else importance.to(dtype).view(groups.shape[1:])
    rows = max(1, piece_size(weight) // (len(SHARES) * groups[0].numel()))
    found = [best_shares(piece.to(dtype), grid, scale_dtype, importance) for piece in groups.split(rows)]
    low, high = (torch.cat(parts) for parts in zip(*found, strict=True))
    return low, high


def best_shares(
    groups: Tensor, grid: IntGrid, scale_dtype: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``mse_clip`` of weights that are groups already.

    Args:
        groups: fp32 or fp64 [..., g].
        grid: Bits and symmetry.
        scale_dtype: Dtype that the scale is stored in.
        importance: Broadcasts against ``groups``.

    Returns:
        Lower and upper share, each [..., 1].
    """
    tried = torch.tensor(SHARES, dtype=groups.dtype, device=groups.device)
    low_end, high_end = group_range(groups)

    def best(low: Tensor, high: Tensor) -> Tensor:
        """The tried share, [..., 1], at which S pairs of shares, each [..., 1] or [S, ..., 1], are at their best."""
        scale, zero_point = choose_qparams(low * low_end, high * high_end, grid, scale_dtype)
        error = (groups / scale).round_().add_(zero_point).clamp_(grid.qmin, grid.qmax)
        error = error.sub_(zero_point).mul_(scale).sub_(groups).square_()
        if importance is not None:
            error = error.mul_(importance)
        return tried[error.sum(-1, keepdim=True).argmin(0)]

    along = tried.view(-1, *[1] * groups.ndim)
    low = high = best(along, along)
    if not grid.symmetric:  # there a common share says it all: the scale is that of one end
        low = best(along, high)
        high = best(low, along)
    return low, high
