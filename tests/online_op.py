"""A run-time operation that only the tests have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plquant.transforms.online import OnlineOp


class Mix(OnlineOp):
    """Permutes channels, then multiplies them: an index and a matrix, both to be kept as they are."""

    kind = "test-mix"
    index: Tensor
    factor: Tensor

    def __init__(self, index: Tensor, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.register_buffer("factor", factor)

    @classmethod
    def random(cls, width: int, seed: int) -> Mix:
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randperm(width, generator=generator), torch.rand(width, generator=generator) + 0.5)

    @classmethod
    def empty(cls, width: int) -> Mix:
        return cls(torch.empty(width, dtype=torch.int64), torch.empty(width))

    def config(self) -> dict[str, Any]:
        return {"width": len(self.index)}

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.index] * self.factor.to(x.dtype)
