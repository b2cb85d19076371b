"""Statistics of activations as torchmetrics: right under many processes by declaration."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class ChannelAbsMax(Metric):
    """Greatest magnitude seen in each channel, fp32 [I].

    Args:
        channels: Width of the activations, I.
    """

    full_state_update = False
    abs_max: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.add_state("abs_max", torch.zeros(channels), dist_reduce_fx="max")

    def update(self, x: Tensor) -> None:
        """Take in activations [..., I]."""
        self.abs_max = torch.maximum(self.abs_max, x.flatten(0, -2).abs().amax(0).float())

    def compute(self) -> Tensor:
        """The maxima so far."""
        return self.abs_max


class Hessian(Metric):
    """Second moments of activations, E[x x^T], fp32 [I, I].

    Args:
        channels: Width of the activations, I.
    """

    full_state_update = False
    total: Tensor
    tokens: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(channels, channels), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        """Take in activations [..., I]."""
        x = x.flatten(0, -2).float()
        self.total += x.t() @ x
        self.tokens += len(x)

    def compute(self) -> Tensor:
        """The mean over tokens."""
        return self.total / self.tokens.clamp(min=1)
