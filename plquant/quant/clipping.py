"""LWC, OmniQuant's learnable weight clipping (arXiv 2308.13137, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plquant.quant.grid import IntGrid


class LearnedClipping(nn.Module):
    """How much of every group's range is kept: ``hi = sigmoid(gamma) max(w)``, ``lo = sigmoid(beta) min(w)``.

    Args:
        shape: Shape of the weight, [O, I].
        grid: Its grid; one pair of strengths per group.
        init: Starting logit; the papers' 4.0 keeps 98.2% of the range.
    """

    def __init__(self, shape: torch.Size, grid: IntGrid, init: float = 4.0) -> None:
        super().__init__()
        width = grid.grouped_width(shape)
        rows, groups = shape.numel() // width, width // grid.size(width)
        self.gamma = nn.Parameter(torch.full((rows, groups, 1), init, dtype=torch.float32))
        self.beta = nn.Parameter(torch.full((rows, groups, 1), init, dtype=torch.float32))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Share of the lower and of the upper end that is kept, each fp32 [R, G, 1] in (0, 1)."""
        return self.beta.sigmoid(), self.gamma.sigmoid()
