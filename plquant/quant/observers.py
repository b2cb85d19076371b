"""Statistics of activations as torchmetrics: right under many processes by declaration."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

PANEL = 256  # rows of a Hessian that are added up together, from their diagonal on


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


class ChannelRange(Metric):
    """Least and greatest value seen in each channel, fp32 [2, I]; inf and -inf before the first token.

    Args:
        channels: Width of the activations, I.
    """

    full_state_update = False
    low: Tensor
    high: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.add_state("low", torch.full((channels,), torch.inf), dist_reduce_fx="min")
        self.add_state("high", torch.full((channels,), -torch.inf), dist_reduce_fx="max")

    def update(self, x: Tensor) -> None:
        """Take in activations [..., I]."""
        x = x.flatten(0, -2)
        self.low = torch.minimum(self.low, x.amin(0).float())
        self.high = torch.maximum(self.high, x.amax(0).float())

    def compute(self) -> Tensor:
        """Both so far."""
        return torch.stack([self.low, self.high])


class Hessian(Metric):
    """Mean of x x^T over all tokens x, fp32 [I, I]: the Hessian of E ||W x||^2 / 2 in each row of W (GPTQ's, halved).

    Where tokens have weights it is their weighted mean.

    It is symmetric, so what lies left of its diagonal, but for squares on it, is not added up but copied at the end.

    Of 1/n and 2/n the first, so that tr(E H E^T) is the mean squared output error; GPTQ's codes are the same.

    The products are fp32, of bf16 activations too: a bf16 product is rounded to 8 bits when it leaves the matmul, and
    on SmolLM2 that error is up to 11 times the damping which is to keep the matrix positive (fp32: 0.01 of it).

    What is fitted to the tokens seen, GPTQ's codes above all, finds those sums of channels that happen to be small on
    them: with 4,096 tokens of SmolLM2 and 1,536 inputs its error is twice as large on other tokens. ``ridge`` adds to
    the diagonal what a mean over N tokens is uncertain by, I / N of its own mean: tr(H) / N. Codes are then better by
    up to 23% on other tokens there, at worst 3% worse (``bench/held_out.py``). It is for tokens of about one size, or
    that weights have made so.

    Args:
        channels: Width of the activations, I.
        ridge: Of other tokens than those seen; false gives the plain mean.
    """

    full_state_update = False
    products: Tensor
    weight: Tensor
    tokens: Tensor

    def __init__(self, channels: int, ridge: bool = False) -> None:
        super().__init__()
        self.ridge = ridge
        self.add_state("products", torch.zeros(channels, channels), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Take in activations [..., I] of tokens that count alike, or with weights [tokens], in any unit."""
        x = x.flatten(0, -2).float()
        self.tokens += len(x)
        if weights is None:
            self.weight += len(x)
        else:
            self.weight += weights.sum(dtype=torch.float64)
            x = x * weights.sqrt()[:, None]  # on both sides alike: the products stay symmetric
        for start in range(0, x.shape[1], PANEL):
            # In place: autocast leaves it alone, and no second [I, I] is needed.
            rows = slice(start, start + PANEL)
            self.products[rows, start:].addmm_(x[:, rows].t(), x[:, start:])

    def compute(self) -> Tensor:
        """The mean so far, or what it is for other tokens; zeros before the first token."""
        mean = self.products / torch.where(self.weight > 0, self.weight, 1)
        for end in range(PANEL, len(mean), PANEL):
            mean[end:, end - PANEL : end] = mean[end - PANEL : end, end:].t()
        if self.ridge and self.tokens > 0:
            mean.diagonal().add_(mean.trace() / self.tokens)
        return mean
