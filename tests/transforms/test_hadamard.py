"""Orthogonal matrices for any width."""

import pytest
import torch

from plquant.transforms.hadamard import hadamard, orthogonal, split_width

# Below 300, what doubling and Paley's two constructions leave out of the multiples of four.
UNKNOWN = {52, 92, 100, 116, 156, 172, 184, 188, 232, 236, 244, 260, 268, 292}


@pytest.mark.parametrize("n", [1, 2, *range(4, 300, 4)])
def test_rows_are_orthogonal_in_integers(n: int) -> None:
    matrix = hadamard(n)
    assert (matrix is None) == (n in UNKNOWN)
    if matrix is not None:
        assert matrix.shape == (n, n) and bool((matrix.abs() == 1).all())
        assert torch.equal(matrix.long() @ matrix.long().T, n * torch.eye(n, dtype=torch.long))


@pytest.mark.parametrize("n", [3, 6, 22, 43, 250])
def test_there_is_none_of_other_orders(n: int) -> None:
    assert hadamard(n) is None


@pytest.mark.parametrize("n", [1, 2, 24, 43, 64, 100])
def test_all_widths_have_an_orthogonal_matrix_chosen_by_the_seed(n: int) -> None:
    first, again, other = (orthogonal(n, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    torch.testing.assert_close(first @ first.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(first, again) and (n < 3 or not torch.equal(first, other))


@pytest.mark.parametrize(
    ("n", "factors"),
    [
        *[(576, (24, 24)), (1536, (32, 48)), (896, (28, 32)), (4864, (64, 76)), (3584, (56, 64))],
        *[(14336, (112, 128)), (18944, (128, 148)), (13824, (108, 128)), (11008, (86, 128)), (64, (8, 8))],
    ],
)
def test_widths_of_real_models_split_into_two_near_each_other(n: int, factors: tuple[int, int]) -> None:
    assert split_width(n) == factors


def test_an_outlier_is_spread_over_all_channels() -> None:
    x = torch.zeros(24, dtype=torch.float64)
    x[5] = 100
    spread = (x @ orthogonal(24, torch.Generator().manual_seed(0))).abs()
    torch.testing.assert_close(spread, torch.full_like(x, 100 / 24**0.5))
