"""Low-rank error correction inside the quantizer (QLLM, arXiv 2310.08041)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from plquant.nn.corrections import Correction


class LoRA(Correction):
    """A learnable change of a weight, ``alpha / rank * B A``; zero at the start.

    It is added to the weight before rounding, so that what is trained is what is rounded, and costs nothing at
    inference. The released code trains it outside the quantizer and merges it afterwards: most of it is then lost to
    rounding.

    Args:
        out_features: Rows of the weight, O.
        in_features: Columns of the weight as it is rounded, after all transforms, I.
        rank: Columns of B and rows of A.
        alpha: Strength; the released code's 1 at rank 4 multiplies by 0.25.
        seed: Of the start of A.
    """

    def __init__(self, out_features: int, in_features: int, rank: int = 4, alpha: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.scaling = alpha / rank
        generator = torch.Generator().manual_seed(seed)
        a = torch.empty(rank, in_features, dtype=torch.float32)
        self.a = nn.Parameter(nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator))
        self.b = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32))

    def delta(self) -> Tensor:
        """The change, fp32 [O, I]; to be called outside autocast."""
        return (self.scaling * self.b) @ self.a
