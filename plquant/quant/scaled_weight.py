"""A weight on its way to the quantizer: channel scales kept apart until something needs the product.

Multiplying a weight by its channel scales costs as much as quantizing it. ``fake_quantize`` does both at once, so a
transform that only scales leaves its factors here; one that mixes channels asks for the product (``dense``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Letters: O output channels, I input channels.


@dataclass(frozen=True)
class ScaledWeight:
    """The weight ``diag(out_scale) weight diag(in_scale)``.

    Attributes:
        weight: [O, I], any floating dtype.
        in_scale: [I], positive, or ``None`` for ones.
        out_scale: [O], positive, or ``None`` for ones.
    """

    weight: Tensor
    in_scale: Tensor | None = None
    out_scale: Tensor | None = None

    def scale_in(self, scale: Tensor) -> ScaledWeight:
        """Multiply the input channels by ``scale`` [I]."""
        return replace(self, in_scale=scale if self.in_scale is None else self.in_scale * scale)

    def scale_out(self, scale: Tensor, rows: slice = slice(None)) -> ScaledWeight:
        """Multiply the output channels ``rows`` by ``scale``, one factor for each of them."""
        outputs = self.weight.shape[0]
        if len(range(outputs)[rows]) < outputs:
            ones = scale.new_ones(outputs)
            scale = torch.cat([ones[: rows.start or 0], scale, ones[rows.stop :]])
        return replace(self, out_scale=scale if self.out_scale is None else self.out_scale * scale)

    def dense(self) -> Tensor:
        """The product, [O, I], in fp32 (fp64 for an fp64 weight)."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        weight = weight if self.in_scale is None else weight * self.in_scale
        return weight if self.out_scale is None else weight * self.out_scale[:, None]

    def map_in(self, function: Callable[[Tensor], Tensor]) -> ScaledWeight:
        """Apply a linear map of the input channels, given on the dense weight, [O, I] -> [O, I']."""
        return ScaledWeight(function(self.dense()))

    def map_out(self, function: Callable[[Tensor], Tensor], rows: slice = slice(None)) -> ScaledWeight:
        """Apply a linear map of the output channels ``rows``, given on those rows of the dense weight, [R, I]."""
        dense = self.dense()
        start, stop, _ = rows.indices(dense.shape[0])
        return ScaledWeight(torch.cat([dense[:start], function(dense[start:stop]), dense[stop:]]))
