"""How much of a range is kept: of the groups of a weight (OmniQuant, arXiv 2308.13137), of the rows of activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from plquant.quant.grid import IntGrid


class Clipping(nn.Module):
    """Shares of the range: ``hi = high max(w)``, ``lo = low min(w)``."""

    def forward(self) -> tuple[Tensor, Tensor]:
        """Share of the lower and of the upper end that is kept, each fp32 in (0, 1]: [R, G, 1] for a weight."""
        raise NotImplementedError


class FixedClipping(Clipping):
    """Given shares.

    Args:
        low: fp32 [R, G, 1].
        high: fp32 [R, G, 1].
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """The shares."""
        return self.low, self.high


class LearnedShares(Clipping):
    """Learned shares, ``sigmoid(beta)`` of the lower and ``sigmoid(gamma)`` of the upper end.

    Args:
        shape: Of each; ``()`` for one range.
        init: Starting logit; the papers' 4.0 keeps 98.2% of the range.
    """

    def __init__(self, shape: Sequence[int], init: float = 4.0) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full(tuple(shape), init, dtype=torch.float32))
        self.beta = nn.Parameter(torch.full(tuple(shape), init, dtype=torch.float32))

    @torch.no_grad()
    def set_(self, low: Tensor, high: Tensor) -> None:
        """Start from these shares, each [R, G, 1]; a share of 1 becomes 0.999, from which a gradient leads back."""
        for logit, share in ((self.beta, low), (self.gamma, high)):
            logit.copy_(torch.logit(share, eps=1e-3))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Sigmoids of the strengths."""
        return self.beta.sigmoid(), self.gamma.sigmoid()


class LearnedClipping(LearnedShares):
    """``LearnedShares`` of the groups of a weight.

    Args:
        shape: Shape of the weight, [O, I].
        grid: Its grid; one pair of strengths per group.
        init: Starting logit.
    """

    def __init__(self, shape: torch.Size, grid: IntGrid, init: float = 4.0) -> None:
        width = grid.grouped_width(shape)
        super().__init__((shape.numel() // width, width // grid.size(width), 1), init)
