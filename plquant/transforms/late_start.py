"""Adam for parameters whose entries start at different times.

Adam divides its moments by ``1 - beta^t`` because they start at zero, t being the number of steps of the *parameter*.
An entry that was masked until step t0 has zero moments then, like any at step 0, but is divided as if it had taken part
since then. With betas (0.9, 0.999), t0 = 2,000 and a constant gradient it moves by 2.9 lr in its first step and by
6.1 lr in its tenth, where a fresh one moves by lr in each.

No preset value of the moments mends that. Seeded with the first gradient they give a first step of lr, but leave the
second moment at that one sample for a thousand steps; zeroing the step counter makes all older entries start again.
What differs is only the bias correction, which is known: after each step this file replaces Adam's update of these
entries by the one that belongs to their own step s = t - t0.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

OPENED_AT = "opened_at"  # in the optimizer's state: the parameter's step when each entry was opened, of its shape


@torch.no_grad()
def reset_state_(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, mask: Tensor) -> None:
    """Let the entries in ``mask`` start with the next step, as if the optimizer had just been made.

    Args:
        optimizer: ``Adam`` or ``AdamW``, of any implementation (fused, foreach), without amsgrad or maximize.
        parameter: One of its parameters.
        mask: bool, of the parameter's shape or broadcast to it.
    """
    state = optimizer.state[parameter]
    if "step" not in state:
        return  # no step was taken yet: everything is fresh
    if OPENED_AT not in state:
        state[OPENED_AT] = torch.zeros_like(parameter)
        optimizer.register_step_post_hook(partial(_correct, parameter))
    for name in ("exp_avg", "exp_avg_sq"):
        state[name].masked_fill_(mask, 0)
    state[OPENED_AT].masked_fill_(mask, float(state["step"]))


def correct_again(optimizer: torch.optim.Optimizer) -> None:
    """Go on with an optimizer whose state was loaded from a checkpoint: hooks are not part of it."""
    for parameter, state in optimizer.state.items():
        if OPENED_AT in state:
            optimizer.register_step_post_hook(partial(_correct, parameter))


@torch.no_grad()
def _correct(parameter: Tensor, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """After a step: from Adam's update of each entry to that of its own age."""
    if parameter.grad is None:
        return  # and no update either
    state = optimizer.state[parameter]
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    step = torch.zeros_like(parameter) + state["step"]  # of one kind with the age: no change where they are equal
    difference = _direction(state, step - state[OPENED_AT], group) - _direction(state, step, group)
    parameter.sub_(group["lr"] * difference)


def _direction(state: dict[str, Tensor], steps: Tensor, group: dict[str, Any]) -> Tensor:
    """Adam's update in units of the learning rate, for entries that took part in ``steps`` steps."""
    correction1, correction2 = (-torch.expm1(steps * math.log(beta)) for beta in group["betas"])  # 1 - beta^steps
    mean, square = state["exp_avg"] / correction1, state["exp_avg_sq"] / correction2
    return mean / (square.sqrt() + group["eps"])
