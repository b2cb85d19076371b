"""Entries that start late under Adam move as if the optimizer had been made with them."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from plquant.transforms.late_start import reset_state_

LR, LATE, SIZE = 5e-3, 300, 6
ADAMS = {
    "fused AdamW": partial(torch.optim.AdamW, fused=True, weight_decay=0.0),
    "AdamW with decay": partial(torch.optim.AdamW, weight_decay=0.1),
    "foreach Adam": partial(torch.optim.Adam, foreach=True),
    "one tensor at a time": partial(torch.optim.AdamW, foreach=False),
}


def gradients(steps: int) -> Tensor:
    scales = 10.0 ** torch.linspace(-4, 2, SIZE)  # entries of very different size
    return torch.randn(steps, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scales


def step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient.clone()
    optimizer.step()


@pytest.mark.parametrize("make", ADAMS.values(), ids=ADAMS)
def test_every_step_is_that_of_an_optimizer_of_ones_own(make: Callable[..., torch.optim.Adam]) -> None:
    late = torch.tensor([True, False, True, False, True, False])
    ours, stock, fresh = (nn.Parameter(torch.ones(SIZE, dtype=torch.float64)) for _ in range(3))
    optimizer, other = make([ours], lr=LR), make([stock], lr=LR)
    for gradient in gradients(LATE):
        step(optimizer, ours, gradient)
        step(other, stock, gradient)
    reset_state_(optimizer, ours, late)
    with torch.no_grad():
        fresh.copy_(ours)
    alone = make([fresh], lr=LR)
    for gradient in gradients(50):
        for group in (*optimizer.param_groups, *other.param_groups, *alone.param_groups):
            group["lr"] *= 0.97  # a schedule
        step(optimizer, ours, gradient)
        step(other, stock, gradient)
        step(alone, fresh, gradient)
        torch.testing.assert_close(ours[late], fresh[late], rtol=1e-10, atol=1e-12)
        assert torch.equal(ours[~late], stock[~late])
        assert not torch.isclose(stock[late], fresh[late], rtol=1e-3).any()  # what stock Adam does to them


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at", [1, 10, 2000])
def test_the_first_step_is_one_learning_rate(at: int, dtype: torch.dtype) -> None:
    mask = torch.tensor([[True, False], [False, True]])
    parameter = nn.Parameter(torch.zeros(3, 2, 2, dtype=dtype))  # a batch, and a mask that is broadcast to it
    optimizer = torch.optim.AdamW([parameter], lr=LR, weight_decay=0.0, fused=True)
    for _ in range(at):
        step(optimizer, parameter, (torch.randn(3, 2, 2) * ~mask).to(dtype))
    assert (parameter[:, mask] == 0).all()
    reset_state_(optimizer, parameter, mask)
    step(optimizer, parameter, torch.randn(3, 2, 2).sign().to(dtype) * 0.1)
    torch.testing.assert_close(parameter[:, mask].abs(), torch.full((3, 2), LR, dtype=dtype), rtol=1e-5, atol=0)


def test_without_it_the_first_step_is_three_times_that() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=LR, weight_decay=0.0)
    for _ in range(2000):
        step(optimizer, parameter, torch.zeros(1))
    step(optimizer, parameter, torch.ones(1))
    assert parameter.abs().item() == pytest.approx(2.94 * LR, rel=1e-2)


def test_bands_opened_one_after_another_each_have_their_own_start() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([parameter], lr=LR, weight_decay=0.0, fused=True)
    reset_state_(optimizer, parameter, torch.tensor([True, False, False, False]))  # nothing has been stepped yet
    open_ = torch.tensor([1.0, 0, 0, 0])
    for band in range(1, 5):
        before = parameter.detach().clone()
        step(optimizer, parameter, open_)
        # A constant gradient moves a fresh entry by one learning rate in each of its steps.
        torch.testing.assert_close(before - parameter, LR * open_, rtol=1e-3, atol=0)
        for _ in range(99):
            step(optimizer, parameter, open_)
        torch.testing.assert_close(parameter[band:], torch.zeros(4 - band))
        if band < 4:
            open_[band] = 1
            newly = torch.arange(4) == band
            reset_state_(optimizer, parameter, newly)
    torch.testing.assert_close(parameter, -LR * torch.tensor([400.0, 300, 200, 100]), rtol=1e-3, atol=0)


def test_a_step_that_leaves_the_parameter_out_changes_nothing() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter], lr=LR)
    for _ in range(10):
        step(optimizer, parameter, torch.tensor([1.0, 0.0]))
    reset_state_(optimizer, parameter, torch.tensor([False, True]))
    step(optimizer, parameter, torch.ones(2))
    before = parameter.detach().clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(parameter, before)
