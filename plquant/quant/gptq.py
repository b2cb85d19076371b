"""GPTQ (arXiv 2210.17323): columns are rounded one after the other, and those to come make up for the error.

    min over codes    tr((W - Q) H (W - Q)^T),    H = E[x x^T]

With H = (F + 1) D (F + 1)^T, F strictly upper triangular and D diagonal, the error is a sum over columns,

    tr((W - Q) H (W - Q)^T) = sum_k D_k ||w_k + (W - Q)_{<k} F_{<k, k} - q_k||^2

and q_k = round(w_k + (W - Q)_{<k} F_{<k, k}) is the best answer to the columns before it. QuIP (arXiv 2307.13304)
proves that these are GPTQ's codes. In this form they take one Cholesky factor of H, where GPTQ's own takes the inverse
of H and a factor of that.

Groups along the input are static: scale and zero-point of each are fixed from the weight as it is given, with the
clipping that was learned for it, before any column is rounded. Groups along the output (AdaDim, arXiv 2309.15531)
belong to one column, so theirs are chosen when its turn comes, from what it has become.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from plquant.quant.affine import QTensor, choose_qparams, group_range, to_groups
from plquant.quant.clip_search import best_shares, mse_clip
from plquant.quant.fake_quantize import Clip
from plquant.quant.grid import IntGrid

# Letters: O output channels, I input channels, R, G, g as in ``affine``.


@torch.no_grad()
def gptq_round(
    weight: Tensor,
    hessian: Tensor,
    grid: IntGrid,
    clip: Clip | Literal["mse"] | None = None,
    scale_dtype: torch.dtype | None = None,
    damp: float = 0.01,
    act_order: bool = True,
    block_size: int = 128,
    compensated: Tensor | None = None,
) -> QTensor:
    """Codes that keep the output of a linear, where rounding to nearest keeps its weight.

    Args:
        weight: [O, I], computed in fp32 (fp64 for an fp64 weight).
        hessian: fp32 [I, I], the mean of x x^T over the inputs that meet this weight, or any multiple of it. Channels
            without input are rounded to nearest.
        grid: The grid, with its group size settled.
        clip: Kept share of the lower and the upper end of every group's range, each fp32 [R, G, 1]. ``"mse"`` searches
            the shares that add least to the error above. ``None`` keeps all.
        scale_dtype: That the scale is stored in, and rounded to; the weight's if not given.
        damp: Added to the diagonal of the Hessian, as a share of its mean.
        act_order: Take the columns in the order of falling ``diag(hessian)``; as they come if false.
        block_size: Columns between two updates of all the others. Changes the time, not the result.
        compensated: fp32 [O, I], filled with what each column was when it was rounded, q_k before its rounding.

    Raises:
        ValueError: The Hessian cannot be one.
    """
    dense = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale_dtype = scale_dtype or weight.dtype
    energy = _energy(hessian)
    order = torch.arange(len(energy), device=energy.device)
    if act_order:
        order = energy.argsort(descending=True, stable=True)
    feedback, cost = _decompose(hessian, energy, order, damp)
    feedback = feedback.to(dense.dtype)
    groups: _StaticGroups | _ColumnGroups
    if grid.axis == "in":
        shares = mse_clip(dense, grid, scale_dtype, cost) if clip == "mse" else clip
        groups = _StaticGroups(dense, grid, shares, scale_dtype)
    else:
        groups = _ColumnGroups(dense, grid, clip, scale_dtype)

    columns = dense.t().index_select(0, order)  # [I, O] in order; a row becomes W - Q once its codes are chosen
    codes = torch.empty_like(columns, dtype=torch.int8 if grid.symmetric else torch.uint8)
    channels = order.tolist()
    for start in range(0, len(channels), block_size):
        block = slice(start, start + block_size)
        wanted = torch.addmm(columns[block], feedback[block, :start], columns[:start])
        for k, (column, channel) in enumerate(zip(wanted, channels[block], strict=True), start):
            column.addmv_(columns[start:k].t(), feedback[k, start:k])
            values, scale, zero_point = groups.of(channel, column)
            if compensated is not None:
                compensated[:, channel] = column
            values.div_(scale).round_().add_(zero_point).clamp_(grid.qmin, grid.qmax)
            codes[channel] = column
            values.sub_(zero_point).mul_(scale)
            columns[k] -= column  # which ``values`` is a view of
    scale, zero_point = (t.squeeze(-1).t() for t in (groups.scale, groups.zero_point))
    return QTensor(
        codes=codes.t().contiguous(),
        scale=scale.to(scale_dtype).contiguous(),
        zero_point=None if grid.symmetric else zero_point.to(torch.uint8).contiguous(),
        grid=grid,
    )


class _StaticGroups:
    """Groups along the input: scale and zero-point, fp32 [G, O, 1], are known before a column is rounded."""

    def __init__(self, weight: Tensor, grid: IntGrid, clip: Clip | None, scale_dtype: torch.dtype) -> None:
        found = _qparams(to_groups(weight, grid), clip, grid, scale_dtype)
        self.scale, self.zero_point = (values.transpose(0, 1).contiguous() for values in found)
        self.size = grid.size(weight.shape[1])

    def of(self, channel: int, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A column [O] seen as groups [O, 1], their scale and zero-point, each [O, 1]."""
        group = channel // self.size
        return column.unsqueeze(-1), self.scale[group], self.zero_point[group]


class _ColumnGroups:
    """Groups along the output: scale and zero-point, fp32 [I, O / g, 1], are chosen column by column."""

    def __init__(
        self, weight: Tensor, grid: IntGrid, clip: Clip | Literal["mse"] | None, scale_dtype: torch.dtype
    ) -> None:
        outputs, inputs = weight.shape
        self.grid, self.clip, self.scale_dtype = grid, clip, scale_dtype
        self.size = grid.size(outputs)
        self.scale = weight.new_empty(inputs, outputs // self.size, 1)
        self.zero_point = torch.empty_like(self.scale)

    def of(self, channel: int, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A column [O] seen as groups [O / g, g], their scale and zero-point, each [O / g, 1]."""
        values = column.view(-1, self.size)
        if self.clip == "mse":  # every weight of the column costs the same, so that least squares is the best here
            clip: Clip | None = best_shares(values, self.grid, self.scale_dtype)
        else:
            clip = None if self.clip is None else (self.clip[0][channel], self.clip[1][channel])
        self.scale[channel], self.zero_point[channel] = _qparams(values, clip, self.grid, self.scale_dtype)
        return values, self.scale[channel], self.zero_point[channel]


def _qparams(groups: Tensor, clip: Clip | None, grid: IntGrid, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    lo, hi = group_range(groups)
    if clip is not None:
        lo, hi = lo * clip[0], hi * clip[1]
    return choose_qparams(lo, hi, grid, scale_dtype)


def _energy(hessian: Tensor) -> Tensor:
    """Mean square of every input channel, fp64 [I].

    Raises:
        ValueError: No inputs can have this Hessian.
    """
    energy = hessian.diagonal().double()
    if not hessian.isfinite().all() or (energy < 0).any():
        raise ValueError(
            "the Hessian of a linear's inputs has NaN, infinite or negative entries where sums of squares are needed; "
            "look for the activations that overflow"
        )
    return energy


def _decompose(hessian: Tensor, energy: Tensor, order: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """H = (F + 1) D (F + 1)^T of the damped Hessian, its channels taken in the given order.

    In fp64: on a CPU that is 1.3 to 2 times the time of fp32, which is little beside the rounding.

    Returns:
        F^T, [I, I] in order, which means nothing on and above its diagonal; and D, [I] as the channels come.
    """
    mean = energy.mean() if energy.any() else energy.new_ones(())
    backwards = order.flip(0)
    matrix = hessian[backwards][:, backwards].double()
    # A channel without input is alone, so that any positive number will do for it.
    diagonal = energy.clamp(min=torch.finfo(torch.float32).eps * mean)[backwards]
    while True:
        matrix.diagonal().copy_(diagonal + damp * mean)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            break
        raised = max(10 * damp, 0.01)
        warnings.warn(
            f"the Hessian of a linear's inputs is not positive definite with damp={damp:g}; raised to {raised:g}",
            stacklevel=3,
        )
        damp = raised
    del matrix  # beside the factor and its reverse the third of this size, in fp64
    root = factor.diagonal().clone()
    cost = torch.empty_like(energy).index_copy_(0, backwards, root.square())
    # The Cholesky factor of the reversed matrix, reversed again, is the upper triangular (F + 1) sqrt(D).
    return factor.div_(root).flip(0, 1).t(), cost
