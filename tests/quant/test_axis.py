"""Which axis groups run along: what it changes, and how it is chosen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from plquant.quant.affine import QTensor
from plquant.quant.axis import AXES, Axis, choose_axis, output_error
from plquant.quant.clip_search import mse_clip
from plquant.quant.fake_quantize import quantize_weight
from plquant.quant.gptq import gptq_round
from plquant.quant.grid import IntGrid
from plquant.quant.observers import Hessian

GRIDS = st.builds(
    IntGrid,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    axis=st.sampled_from(AXES),
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def channel_scales(weight: Tensor, axis: Axis, exact: bool, seed: int) -> Tensor:
    """Positive scales that broadcast along ``weight``: of input channels for "in"; powers of two if exact."""
    scale = random(weight.shape[1] if axis == "in" else weight.shape[0], seed=seed)
    scale = torch.exp2((2 * scale).round()) if exact else scale.exp()
    return scale if axis == "in" else scale[:, None]


@given(GRIDS, st.booleans(), st.sampled_from([None, "mse"]), st.integers(0, 10_000))
def test_groups_do_not_see_the_scale_of_the_channel_they_lie_in(
    grid: IntGrid, exact: bool, clip: str | None, seed: int
) -> None:
    """Q_ic(W S) S^-1 = Q_ic(W) and T^-1 Q_oc(T W) = Q_oc(W): no group mixes the channels that are scaled."""
    weight = random(16, 24, seed=seed)
    across: Axis = "out" if grid.axis == "in" else "in"

    def quantized(w: Tensor) -> QTensor:
        return quantize_weight(w, grid, mse_clip(w, grid) if clip == "mse" else None)

    scale = channel_scales(weight, across, exact, seed + 1)
    plain, scaled = quantized(weight), quantized(weight * scale)
    if exact:
        assert torch.equal(scaled.dequantize() / scale, plain.dequantize())
    torch.testing.assert_close(scaled.dequantize() / scale, plain.dequantize(), rtol=1e-9, atol=1e-9)
    scale = channel_scales(weight, grid.axis, exact, seed + 1)
    assert not torch.allclose(quantized(weight * scale).dequantize() / scale, plain.dequantize(), rtol=1e-2)


@given(st.integers(2, 4), st.sampled_from([None, "mse"]), st.integers(0, 10_000))
def test_gptq_keeps_both_invariances(bits: int, clip: str | None, seed: int) -> None:
    """Input scales change the order, so that it is given here; and the damping, so that there is none."""
    weight, x = random(16, 24, seed=seed), random(100, 24, seed=seed + 1) @ random(24, 24, seed=seed + 2)
    hessian = x.t() @ x
    for axis, across in (("in", "out"), ("out", "in")):
        grid, scale = IntGrid(bits, 8, axis=axis), channel_scales(weight, across, True, seed)  # type: ignore[arg-type]
        inputs = scale if across == "in" else torch.ones(24)
        scaled_hessian = hessian / inputs / inputs[:, None]
        plain = gptq_round(weight, hessian, grid, clip, damp=0.0, act_order=False)  # type: ignore[arg-type]
        scaled = gptq_round(weight * scale, scaled_hessian, grid, clip, damp=0.0, act_order=False)  # type: ignore[arg-type]
        assert torch.equal(scaled.dequantize() / scale, plain.dequantize())


@pytest.mark.parametrize("axis", AXES)
def test_the_error_is_that_of_the_outputs_of_all_samples(axis: Axis) -> None:
    samples = random(6, 20, 48, seed=1, dtype=torch.float32) * torch.arange(1, 7)[:, None, None]
    weight, grid = random(32, 48, dtype=torch.float32), IntGrid(3, 8, axis=axis)
    metric = Hessian(48)
    for sample in samples:
        metric.update(sample)
    hessian = metric.compute()
    for q in (quantize_weight(weight, grid), gptq_round(weight, hessian, grid)):
        outputs = (weight.double() - q.dequantize().double()) @ samples.flatten(0, 1).double().t()
        error = output_error(weight, q, hessian)
        assert error.dtype == torch.float64 and error.shape == ()
        torch.testing.assert_close(error, outputs.square().sum(0).mean(), rtol=1e-5, atol=0)
        first = samples[0].t() @ samples[0] / 20
        assert output_error(weight, q, first) < 0.2 * error


def test_a_weight_that_lies_on_the_grid_has_no_error() -> None:
    grid = IntGrid(3, 8)
    q = quantize_weight(random(32, 48, dtype=torch.float32), grid)
    assert output_error(q.dequantize(), q, torch.ones(48, 48)) == 0


def candidates(weight: Tensor) -> dict[Axis, QTensor]:
    return {axis: quantize_weight(weight, IntGrid(3, 16, axis=axis)) for axis in AXES}


def errors(weight: Tensor, hessian: Tensor) -> dict[Axis, float]:
    return {axis: float(output_error(weight, q, hessian)) for axis, q in candidates(weight).items()}


def spread(count: int) -> Tensor:
    """Sizes of channels: every fourth is large."""
    return torch.tensor([1.0, 1.0, 1.0, 4.0]).repeat(count // 4)


@pytest.mark.parametrize("axis", AXES)
def test_groups_keep_channels_of_different_size_apart(axis: Axis) -> None:
    """Outputs of different size want groups along the input; small inputs with large weights, along the output."""
    weight, size = random(32, 32, dtype=torch.float32), spread(32)
    weight, hessian = (weight * size[:, None], torch.eye(32)) if axis == "in" else (weight * size, size.pow(-2).diag())
    assert choose_axis(errors(weight, hessian)) == axis


def test_all_samples_decide() -> None:
    """The first sample has only inputs whose weights want one axis, and the others those that want the other."""
    weight = random(32, 32, dtype=torch.float32)
    samples = random(8, 64, 32, seed=1, dtype=torch.float32)
    weight[:, :16] *= spread(16)
    samples[0, :, :16] /= 10 * spread(16)
    samples[0, :, 16:] = 0
    weight[:, 16:] *= spread(32)[:, None]
    samples[1:, :, :16] = 0
    whole, first = Hessian(32), Hessian(32)
    for sample in samples:
        whole.update(sample)
    first.update(samples[0])
    outputs = {
        axis: float(((weight - q.dequantize()) @ samples.flatten(0, 1).t()).square().sum())
        for axis, q in candidates(weight).items()
    }
    assert outputs["in"] < 0.9 * outputs["out"]
    assert choose_axis(errors(weight, whole.compute())) == "in"
    assert choose_axis(errors(weight, first.compute())) == "out"


def test_linears_of_one_call_are_judged_together() -> None:
    small: dict[Axis, float] = {"in": 1.0, "out": 2.0}
    large: dict[Axis, float] = {"in": 9.0, "out": 7.0}
    assert choose_axis(small) == "in" and choose_axis(large) == "out" and choose_axis(small, large) == "out"


def test_the_usual_axis_wins_a_tie_whatever_comes_first() -> None:
    assert choose_axis({"out": 1.0, "in": 1.0}) == "in"


def test_only_what_all_have_can_be_chosen() -> None:
    assert choose_axis({"in": 5.0}) == "in"
    assert choose_axis({"in": 5.0, "out": 0.0}, {"in": 5.0}) == "in"


def test_an_error_that_is_no_number_is_never_chosen() -> None:
    nan = float("nan")
    assert choose_axis({"in": nan, "out": 3.0}) == "out"
    with pytest.raises(ValueError, match="no axis has a finite error"):
        choose_axis({"in": nan, "out": float("inf")})
