"""Signed gradient descent, as SignRound uses it (arXiv 2309.05516)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class SignSGD(Optimizer):
    """Moves every number by its learning rate, against the sign of its gradient: p <- p - lr sign(g).

    With momentum mu the sign is that of m <- mu m + g, which starts at 0. Without, it keeps no state at all, where Adam
    keeps two numbers for each it trains.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate of groups without one of their own.
        momentum: Share of the last direction that is kept, from 0 to less than 1.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.0) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: choose 0 or more, and less than 1")
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(self._direction(parameter, group["momentum"]).sign(), alpha=group["lr"])
        return loss

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """What the sign is taken of, of the parameter's shape."""
        gradient = parameter.grad
        assert gradient is not None
        if momentum == 0:
            return gradient
        state = self.state[parameter]
        if "direction" not in state:
            state["direction"] = torch.zeros_like(parameter)
        direction: Tensor = state["direction"].mul_(momentum).add_(gradient)
        return direction
