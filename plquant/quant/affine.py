"""Affine quantization on plain tensors: ranges to scale and zero-point, weights to codes and back.

Letters: R rows, G groups per row, g weights per group. A weight [O, I] is seen as groups [R, G, g] by ``to_groups``:
R = O with groups along the input, R = I (the weight transposed) with groups along the output.

    scale = (hi - lo) / (2^b - 1)      zero_point = round(-lo / scale)
    code = clamp(round(w / scale) + zero_point, qmin, qmax)      w ~ (code - zero_point) * scale

Zero is always representable, the zero-point always fits its bits and no input, constant or zero, gives a NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plquant.quant.grid import IntGrid


@dataclass(frozen=True)
class QTensor:
    """A quantized weight.

    Attributes:
        codes: uint8 (asymmetric) or int8 (symmetric) [O, I], from ``grid.qmin`` to ``grid.qmax``.
        scale: Storage dtype, [O, I / g] with groups along the input, [O / g, I] along the output: the step.
        zero_point: uint8 as ``scale``, codes; ``None`` when the grid is symmetric.
        grid: The grid, with its group size settled.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: IntGrid

    def in_steps(self, change: Tensor) -> Tensor:
        """A change of the weight, [O, I], in units of the scale; in its own dtype."""
        scale = _per_group(self.scale, self.grid).to(change.dtype)
        return from_groups(to_groups(change, self.grid) / scale, self.grid)

    def dequantize(self) -> Tensor:
        """The weight the codes stand for: [O, I] in the scale's dtype, ``(code - zero_point) * scale``."""
        codes = to_groups(self.codes.to(self.scale.dtype), self.grid)
        if self.zero_point is not None:
            codes = codes - _per_group(self.zero_point, self.grid).to(codes.dtype)
        return from_groups(codes * _per_group(self.scale, self.grid), self.grid)


def to_groups(weight: Tensor, grid: IntGrid) -> Tensor:
    """[O, I] -> [R, G, g]; a view with groups along the input."""
    rows = weight if grid.axis == "in" else weight.t()
    return rows.reshape(rows.shape[0], -1, grid.size(rows.shape[1]))


def from_groups(groups: Tensor, grid: IntGrid) -> Tensor:
    """[R, G, g] -> [O, I], the inverse of ``to_groups``."""
    rows = groups.flatten(1)
    return rows if grid.axis == "in" else rows.t().contiguous()


def _per_group(values: Tensor, grid: IntGrid) -> Tensor:
    """Stored scale or zero-point -> [R, G, 1]."""
    return (values if grid.axis == "in" else values.t()).unsqueeze(-1)


def group_range(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value of every group, zero included: both [R, G, 1]."""
    return groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)


def choose_qparams(lo: Tensor, hi: Tensor, grid: IntGrid, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero-point for ranges that contain zero.

    The scale is rounded to the dtype it is stored in *before* codes are chosen with it, so that what is trained and
    evaluated is what is stored.

    Args:
        lo: Lower ends, [R, G, 1], at most 0.
        hi: Upper ends, [R, G, 1], at least 0.
        grid: Bits and symmetry.
        scale_dtype: Dtype of the stored scale.

    Returns:
        Scale in the dtype of ``lo``, positive and representable in ``scale_dtype``; zero_point likewise, integer
        valued, in [qmin, qmax], or 0 for a symmetric grid.
    """
    if grid.symmetric:
        scale = torch.maximum(hi / grid.qmax, lo / grid.qmin)
    else:
        scale = (hi - lo) / (grid.qmax - grid.qmin)
    scale = scale.to(scale_dtype).clamp(min=torch.finfo(scale_dtype).tiny).to(lo.dtype)
    if grid.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, (-lo / scale).round_().clamp_(grid.qmin, grid.qmax)
