"""Invertible whatever is learned."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plquant.transforms.dominant_matrix import DOMINANCE, FREE, DominantMatrix
from plquant.transforms.gradual_mask import gradual_mask


def drawn(size: int, share: float, log_size: float, seed: int, count: int = 2) -> DominantMatrix:
    """Off-diagonals of about 10^log_size, diagonals between 1e-4 and 1e4."""
    generator = torch.Generator().manual_seed(seed)
    matrix = DominantMatrix(count, size)
    matrix.progress_(share)
    with torch.no_grad():
        matrix.off_diagonal.normal_(generator=generator).mul_(10.0**log_size)
        matrix.log_scale.uniform_(-9.2, 9.2, generator=generator)
    return matrix


@given(
    size=st.integers(1, 40), share=st.sampled_from([0.0, 0.3, 1.0]), log_size=st.floats(-6, 30), seed=st.integers(0, 99)
)
def test_dominance_and_the_bounds_hold_for_any_parameters(size: int, share: float, log_size: float, seed: int) -> None:
    matrix = drawn(size, share, log_size, seed)
    a = matrix.matrix().double()
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    off = a.abs().sum(-1) - diagonal.abs()
    assert (off <= DOMINANCE * (1 + 1e-5) * diagonal).all() and (diagonal > 0).all()
    limit = 1 / (1 - DOMINANCE)
    unit_inverse, inverse = matrix.unit_inverse(), matrix.inverse()
    assert unit_inverse.abs().sum(-1).amax() <= limit * (1 + 1e-3)  # 1 - row sums of fp32
    assert (inverse.abs().sum(-1).amax(-1) <= limit / diagonal.amin(-1) * (1 + 1e-3)).all()
    assert torch.linalg.cond(matrix.unit().double(), torch.inf).amax() <= 199 * (1 + 1e-3)
    eye = torch.eye(size, dtype=torch.float64).expand(2, size, size)
    torch.testing.assert_close(matrix.unit().double() @ unit_inverse, eye, rtol=0, atol=1e-13)


def test_without_the_rescaling_dominance_is_lost() -> None:
    matrix = drawn(16, 1.0, 0.0, 0)
    raw = matrix.off_diagonal.abs().sum(-1)
    assert (raw > 1).all()  # so the property test above has something to show


def test_a_row_that_is_well_dominant_is_left_as_it_is() -> None:
    matrix = drawn(8, 1.0, -3.0, 0)
    expected = matrix.off_diagonal * matrix.opened + torch.eye(8)
    assert torch.equal(matrix.unit(), expected)


def test_starts_as_the_identity_and_opens_by_bands() -> None:
    matrix = DominantMatrix(3, 6)
    assert torch.equal(matrix.matrix(), torch.eye(6).expand(3, 6, 6))
    assert float(matrix.condition_number()) == pytest.approx(1)
    opened = torch.zeros(6, 6, dtype=torch.bool)
    for share in (0, 0.2, 0.2, 0.6, 1):
        [(parameter, newly)] = matrix.progress_(share)
        assert parameter is matrix.off_diagonal
        assert not (newly & opened).any() and not newly.diagonal().any()
        opened |= newly
        assert torch.equal(opened | torch.eye(6, dtype=torch.bool), gradual_mask(6, share))


@given(total=st.floats(0.5, 1e6))
def test_a_row_at_the_bound_can_still_come_back(total: float) -> None:
    matrix = DominantMatrix(1, 2).double()
    matrix.progress_(1)
    with torch.no_grad():
        matrix.off_diagonal[0, 0, 1] = total
    found = matrix.unit()[0, 0, 1]
    found.backward()
    assert min(total, FREE) <= found.item() < DOMINANCE and matrix.off_diagonal.grad[0, 0, 1] > 0


def test_what_is_masked_gets_no_gradient_at_all() -> None:
    matrix = drawn(9, 0.4, 0.0, 1)
    (matrix.inverse() * torch.randn(2, 9, 9)).sum().backward()
    assert matrix.off_diagonal.grad is not None
    masked = matrix.off_diagonal.grad[:, ~matrix.opened]
    assert (masked == 0).all() and (matrix.off_diagonal.grad[:, matrix.opened] != 0).all()


def test_stability_is_a_factor_on_the_off_diagonals() -> None:
    one, tenth = drawn(5, 1.0, -2.0, 3), DominantMatrix(2, 5, stability=0.1)
    tenth.load_state_dict(one.state_dict())
    tenth.progress_(1)
    eye = torch.eye(5)
    torch.testing.assert_close(tenth.unit() - eye, 0.1 * (one.unit() - eye))


def test_gradients_are_those_of_the_formula() -> None:
    matrix = drawn(4, 0.7, -0.5, 5).double()  # some rows at the bound, some below

    def inverse(log_scale: torch.Tensor, off_diagonal: torch.Tensor) -> torch.Tensor:
        parameters = {"log_scale": log_scale, "off_diagonal": off_diagonal}
        return torch.func.functional_call(Inverse(matrix), {f"matrix.{k}": v for k, v in parameters.items()}, ())

    row = (matrix.off_diagonal * matrix.opened).abs().sum(-1)
    assert (row > FREE).any() and (row < FREE).any()
    with torch.no_grad():
        matrix.log_scale.mul_(0.1)
    assert torch.autograd.gradcheck(inverse, (matrix.log_scale, matrix.off_diagonal))


class Inverse(torch.nn.Module):
    def __init__(self, matrix: DominantMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self) -> torch.Tensor:
        return self.matrix.inverse()
