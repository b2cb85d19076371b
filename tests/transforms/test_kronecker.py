"""Kronecker-factored matrices: the same function, exactly the dense product, cheap."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from plquant.quant.scaled_weight import ScaledWeight
from plquant.quant.token_quantize import quantize_tokens
from plquant.transforms.gradual_mask import gradual_mask
from plquant.transforms.hadamard import split_width
from plquant.transforms.kronecker import KroneckerAffine
from plquant.transforms.scale_shift import ScaleShift
from tests.transforms.toy import randomized, read, relative

WIDTHS = [6, 12, 16, 35]


def opened(width: int, share: float = 1.0) -> KroneckerAffine:
    transform = KroneckerAffine(width)
    transform.progress_(share)
    randomized(transform)
    return transform


def dense(transform: KroneckerAffine) -> Tensor:
    return torch.kron(transform.left.matrix()[0], transform.right.matrix()[0]).detach()


@pytest.mark.parametrize(
    ("n", "factors"),
    [
        (576, (24, 24)),
        (1536, (32, 48)),
        (4096, (64, 64)),
        (14336, (112, 128)),
        (11008, (86, 128)),
        (1, (1, 1)),
        (7, (1, 7)),
    ],
)
def test_splits_as_square_as_it_gets(n: int, factors: tuple[int, int]) -> None:
    assert split_width(n) == factors


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_equals_the_dense_product(width: int, share: float) -> None:
    torch.manual_seed(0)
    transform = opened(width, share)
    x, weight = torch.randn(2, 5, width, dtype=torch.float64), torch.randn(4, width, dtype=torch.float64)
    matrix = dense(transform)
    assert relative(transform.online(x), torch.linalg.solve(matrix.mT, x.mT).mT) < 1e-12
    assert relative(transform.read_weight(ScaledWeight(weight)).dense(), weight @ matrix.mT) < 1e-12
    assert float(transform.condition_number()) == pytest.approx(float(torch.linalg.cond(matrix)))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_norm_and_its_linears_compute_the_same(width: int) -> None:
    torch.manual_seed(0)
    norm, consumer = randomized(nn.LayerNorm(width)), randomized(nn.Linear(width, 5))
    transform, x = opened(width), torch.randn(3, 7, width, dtype=torch.float64)
    for y in (transform.online(norm(x)), transform.online_op()(norm(x))):
        assert relative(read(consumer, y, [transform]), consumer(norm(x))) < 1e-12
    wrong = torch.linalg.solve(dense(transform), norm(x).mT).mT
    assert relative(read(consumer, wrong, [transform]), consumer(norm(x))) > 0.1


def test_goes_after_a_scale_and_shift_of_the_same_site() -> None:
    torch.manual_seed(0)
    norm, consumer = randomized(nn.LayerNorm(12)), randomized(nn.Linear(12, 5))
    scale, transform, x = randomized(ScaleShift(12, shift=True)), opened(12), torch.randn(7, 12, dtype=torch.float64)
    y = nn.functional.layer_norm(x, (12,), *scale.write_norm(norm.weight, norm.bias, 0.0), norm.eps)
    assert relative(read(consumer, transform.online(y), [scale, transform]), consumer(norm(x))) < 1e-12
    assert relative(read(consumer, transform.online(y), [transform, scale]), consumer(norm(x))) > 0.1


def test_starts_as_the_identity() -> None:
    transform, x = KroneckerAffine(12), torch.randn(5, 12)
    assert torch.equal(transform.online(x), x)
    assert torch.equal(transform.read_weight(ScaledWeight(x)).dense(), x)


def test_both_factors_are_opened_band_by_band() -> None:
    transform = KroneckerAffine(12)
    (left, left_mask), (right, right_mask) = transform.progress_(0.5)
    assert left is transform.left.off_diagonal and right is transform.right.off_diagonal
    for n, mask in ((3, left_mask), (4, right_mask)):
        assert torch.equal(mask | torch.eye(n, dtype=torch.bool), gradual_mask(n, 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_runs_later_is_what_ran_in_training_to_the_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    transform, x = opened(12).float(), torch.randn(7, 12).to(dtype)
    op = transform.online_op()
    assert torch.equal(op(x), transform.online(x)) and op.left.dtype == torch.float32
    weight = torch.randn(5, 12).to(dtype)
    training = transform.read_weight(ScaledWeight(weight)).dense()
    with torch.no_grad():
        fold = copy.deepcopy(transform).read_weight(ScaledWeight(weight)).dense()
    assert training.requires_grad and training.dtype == torch.float32 and torch.equal(training, fold)


def test_a_rotation_leaves_four_bits_to_all_channels() -> None:
    """One channel of thirty times the size takes the whole range; spread over all it does not."""
    torch.manual_seed(0)
    x, consumer = torch.randn(50, 96, dtype=torch.float64), torch.randn(8, 96, dtype=torch.float64)
    x[:, 7] *= 30
    consumer[:, 7] /= 30
    errors = {}
    for name, rotate in {"plain": None, "rotated": torch.Generator().manual_seed(0)}.items():
        transform = KroneckerAffine(96, rotate=rotate)
        weight = transform.read_weight(ScaledWeight(consumer)).dense()
        assert relative(transform.online(x) @ weight.T, x @ consumer.T) < 1e-12
        errors[name] = float(relative(quantize_tokens(transform.online(x), 4) @ weight.T, x @ consumer.T))
    assert errors["rotated"] < 0.4 * errors["plain"]


def test_a_rotation_is_exact_in_any_dtype() -> None:
    """Entries of a Hadamard matrix are powers of two there, so that rounding them moves nothing."""
    op = KroneckerAffine(576, rotate=torch.Generator().manual_seed(0)).online_op()
    for factor in (op.left, op.right):
        torch.testing.assert_close(factor.abs(), torch.full_like(factor, 0.25), rtol=1e-6, atol=0)
        assert torch.equal(factor.bfloat16().float().abs(), torch.full_like(factor, 0.25))


def test_costs_the_square_root() -> None:
    op = KroneckerAffine(576).online_op()
    assert op.macs_per_token == 576 * 48 and op.stored_bits == 32 * 2 * 24**2


def test_a_prime_width_is_said() -> None:
    with pytest.warns(UserWarning, match="13 is prime"):
        transform = KroneckerAffine(13)
    assert (transform.left.size, transform.right.size) == (1, 13)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KroneckerAffine(12)
