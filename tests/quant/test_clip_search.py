"""The search for the clipping of least squared error."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from plquant.quant.affine import to_groups
from plquant.quant.clip_search import SHARES, mse_clip
from plquant.quant.fake_quantize import fake_quantize
from plquant.quant.grid import IntGrid

GRIDS = st.builds(
    IntGrid,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    axis=st.sampled_from(["in", "out"]),
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(
    weight: Tensor, grid: IntGrid, clip: tuple[Tensor, Tensor] | None, importance: Tensor | float = 1.0
) -> Tensor:
    """Squared error of every group, [R, G]."""
    squares = (fake_quantize(weight, grid, clip) - weight).square() * importance
    return to_groups(squares, grid).sum(-1)


def brute_force(weight: Tensor, grid: IntGrid, pairs: list[tuple[float, float]], importance: Tensor | float) -> Tensor:
    """Least error of every group among the pairs of shares, [R, G]."""
    like = to_groups(weight, grid)[..., :1]
    errors = [
        error(weight, grid, (torch.full_like(like, low), torch.full_like(like, high)), importance)
        for low, high in pairs
    ]
    return torch.stack(errors).amin(0)


@given(GRIDS, st.integers(0, 10_000))
def test_no_group_is_worse_than_with_its_whole_range(grid: IntGrid, seed: int) -> None:
    weight = random(16, 24, seed=seed).pow(3)
    importance = random(24, seed=seed + 1).square() if grid.axis == "in" else torch.ones(24)
    low, high = mse_clip(weight, grid, importance=importance)
    assert low.min() > 0 and low.max() <= 1 and high.min() > 0 and high.max() <= 1
    ours, whole = error(weight, grid, (low, high), importance), error(weight, grid, None, importance)
    assert (ours <= whole * (1 + 1e-6) + 1e-12).all()


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_close_to_the_best_of_all_pairs(bits: int, axis: str) -> None:
    weight, grid = random(64, 128), IntGrid(bits, 64, axis=axis)  # type: ignore[arg-type]
    ours = error(weight, grid, mse_clip(weight, grid)).sum()
    best = brute_force(weight, grid, list(product(SHARES, SHARES)), 1.0).sum()
    common = brute_force(weight, grid, [(share, share) for share in SHARES], 1.0).sum()
    assert best <= ours <= 1.01 * best  # 1.0007 to 1.0018
    assert 1.005 * ours < common < error(weight, grid, None).sum()


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("bits", [2, 4])
def test_symmetric_grids_have_one_share_and_it_is_the_best(bits: int, axis: str) -> None:
    weight, grid = random(32, 64), IntGrid(bits, 16, True, axis)  # type: ignore[arg-type]
    importance = random(64, seed=1).square() if axis == "in" else torch.ones(64)
    ours = error(weight, grid, mse_clip(weight, grid, importance=importance), importance)
    torch.testing.assert_close(ours, brute_force(weight, grid, [(s, s) for s in SHARES], importance))


def test_a_channel_without_input_may_be_clipped() -> None:
    weight, grid = random(4, 32), IntGrid(3, 32)
    weight[:, 5] = 20.0
    importance = torch.ones(32)
    _, plain = mse_clip(weight, grid, importance=importance)
    importance[5] = 0.0
    _, high = mse_clip(weight, grid, importance=importance)
    assert (plain > 0.9).all() and (high < 0.5).all()


def test_importance_makes_no_difference_along_the_output() -> None:
    weight, importance = random(32, 16), random(16, seed=1).square()
    for axis, same in (("out", True), ("in", False)):
        grid = IntGrid(3, 16, axis=axis)  # type: ignore[arg-type]
        plain, weighted = mse_clip(weight, grid), mse_clip(weight, grid, importance=importance)
        assert all(torch.equal(a, b) for a, b in zip(plain, weighted, strict=True)) == same


@pytest.mark.parametrize("value", [0.0, 0.7, -0.7])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_constant_groups_keep_their_range(axis: str, value: float) -> None:
    weight, grid = torch.full((8, 8), value), IntGrid(3, 8, axis=axis)  # type: ignore[arg-type]
    low, high = mse_clip(weight, grid)
    end = low if value < 0 else high
    assert torch.equal(end, torch.ones_like(end))
    torch.testing.assert_close(fake_quantize(weight, grid, (low, high)), weight)


def test_work_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grid, importance = random(33, 32), IntGrid(3, 8), random(32, seed=1).square()
    whole = mse_clip(weight, grid, torch.bfloat16, importance)
    monkeypatch.setattr("plquant.quant.clip_search.piece_size", lambda _: 3 * len(SHARES) * 32)
    for a, b in zip(mse_clip(weight, grid, torch.bfloat16, importance), whole, strict=True):
        assert torch.equal(a, b)


def test_the_scale_is_rounded_before_errors_are_compared() -> None:
    weight, grid = random(64, 32), IntGrid(4, 32)
    coarse = mse_clip(weight, grid, torch.bfloat16)

    def stored(clip: tuple[Tensor, Tensor]) -> Tensor:
        return (fake_quantize(weight, grid, clip, scale_dtype=torch.bfloat16) - weight).square().sum()

    assert stored(coarse) < stored(mse_clip(weight, grid, torch.float32))
