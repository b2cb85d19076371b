"""A correction of a norm's weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plquant.transforms.base import Transform


class NormGain(Transform):
    """Learnable factors of a norm's gain that nobody takes back: no equivalence, a correction. They start at 1.

    Args:
        channels: Width of the norm, C.
    """

    preserves = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_gain = nn.Parameter(torch.zeros(channels, dtype=torch.float32))

    def write_norm(self, weight: Tensor, bias: Tensor | None, gain_offset: float) -> tuple[Tensor, Tensor | None]:
        """The gain, ``weight + gain_offset``, times the factors."""
        return (weight + gain_offset) * self.log_gain.exp().to(weight.dtype) - gain_offset, bias
