"""Grids, ranges, codes and their gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plquant.quant.affine import from_groups, to_groups
from plquant.quant.clipping import LearnedClipping
from plquant.quant.fake_quantize import fake_quantize, quantize_weight
from plquant.quant.grid import IntGrid

GRIDS = st.builds(
    IntGrid,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    axis=st.sampled_from(["in", "out"]),
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
values = st.floats(-1e4, 1e4, width=32)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def half_step(weight: Tensor, grid: IntGrid, scale: Tensor) -> Tensor:
    """Half a step of every weight's group, [O, I]."""
    scales = scale if grid.axis == "in" else scale.t()
    groups = to_groups(weight, grid)
    return from_groups((scales.float().unsqueeze(-1) / 2).expand_as(groups), grid)


@given(GRIDS, DTYPES, st.lists(values, min_size=64, max_size=64))
def test_codes_and_zero_points_fit_and_zero_is_exact(grid: IntGrid, dtype: torch.dtype, numbers: list[float]) -> None:
    weight = torch.tensor(numbers).view(8, 8).to(dtype)
    q = quantize_weight(weight, grid)
    assert q.codes.min() >= grid.qmin and q.codes.max() <= grid.qmax
    assert torch.isfinite(q.dequantize()).all() and (q.scale > 0).all()
    if q.zero_point is not None:
        assert q.zero_point.max() <= grid.qmax
    assert (q.dequantize()[weight == 0] == 0).all()


@given(GRIDS, DTYPES, st.integers(0, 10_000), st.sampled_from(["zero", "constant", "positive", "negative", "mixed"]))
def test_error_is_at_most_half_a_step(grid: IntGrid, dtype: torch.dtype, seed: int, kind: str) -> None:
    weight = random(8, 8, seed=seed, dtype=torch.float32)
    weight = {
        "zero": weight * 0,
        "constant": torch.full_like(weight, float(weight[0, 0])),
        "positive": weight.abs(),
        "negative": -weight.abs(),
        "mixed": weight,
    }[kind].to(dtype)
    q = quantize_weight(weight, grid)
    error = (q.dequantize().float() - weight.float()).abs()
    # The stored scale and the product are each rounded: by up to 2^-9 of the weight in bf16.
    ends = from_groups((g := to_groups(weight.float(), grid)).abs().amax(-1, keepdim=True).expand_as(g), grid)
    rounding = ends * (2**-8 if dtype == torch.bfloat16 else 2**-22)
    assert (error <= half_step(weight, grid, q.scale) + rounding).all()


@given(GRIDS, st.integers(0, 10_000))
def test_quantizing_twice_changes_nothing(grid: IntGrid, seed: int) -> None:
    weight = random(8, 8, seed=seed, dtype=torch.float64)
    once = fake_quantize(weight, grid)
    torch.testing.assert_close(fake_quantize(once, grid), once, rtol=0, atol=1e-9)


@given(GRIDS, st.integers(0, 10_000))
def test_groups_along_the_output_are_groups_of_the_transpose(grid: IntGrid, seed: int) -> None:
    weight = random(8, 16, seed=seed)
    other = IntGrid(grid.bits, grid.group_size, grid.symmetric, "out" if grid.axis == "in" else "in")
    assert torch.equal(fake_quantize(weight, grid), fake_quantize(weight.t().contiguous(), other).t())


@given(GRIDS, DTYPES, st.integers(0, 10_000))
def test_training_forward_has_the_codes_of_the_fold(grid: IntGrid, dtype: torch.dtype, seed: int) -> None:
    weight = random(16, 8, seed=seed).to(dtype)
    clip = LearnedClipping(weight.shape, grid)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter += random(*parameter.shape, seed=seed + 1).float()
    in_scale, out_scale = random(8, seed=seed).exp().float(), random(16, seed=seed).exp().float()
    for nudge in (None, random(16, 8, seed=seed + 2).float()):
        trained = fake_quantize(weight, grid, clip(), in_scale, out_scale, nudge=nudge)
        folded = quantize_weight(weight, grid, clip(), in_scale, out_scale, nudge=nudge)
        assert torch.equal(trained, folded.dequantize())


def test_the_weight_itself_is_left_alone() -> None:
    weight = random(8, 8, dtype=torch.float32)
    before = weight.clone()
    quantize_weight(weight, IntGrid(4, 4))
    fake_quantize(weight, IntGrid(4, 4))
    assert torch.equal(weight, before)


def test_saturated_clipping_is_min_max() -> None:
    weight, grid = random(16, 32, dtype=torch.float32), IntGrid(3, 8)
    clip = LearnedClipping(weight.shape, grid, init=40.0)
    assert torch.equal(fake_quantize(weight, grid, clip()), fake_quantize(weight, grid))
    assert not torch.equal(
        fake_quantize(weight, grid, LearnedClipping(weight.shape, grid, 1.0)()), fake_quantize(weight, grid)
    )


def plain(
    weight: Tensor,
    grid: IntGrid,
    clip: tuple[Tensor, Tensor],
    in_scale: Tensor,
    out_scale: Tensor,
    nudge: Tensor | None = None,
) -> Tensor:
    """The same quantizer as chained autograd operations: the specification."""

    def ste(x: Tensor) -> Tensor:
        return x + (x.round() - x).detach()

    groups = to_groups(weight * in_scale * out_scale[:, None], grid)
    lo = groups.amin(-1, keepdim=True).clamp(max=0) * clip[0]
    hi = groups.amax(-1, keepdim=True).clamp(min=0) * clip[1]
    if grid.symmetric:
        scale = torch.maximum(hi / grid.qmax, lo / grid.qmin)
        zero_point = torch.zeros_like(scale)
    else:
        scale = (hi - lo) / grid.qmax
        zero_point = ste(-lo / scale)
    moved = groups / scale + (0 if nudge is None else to_groups(nudge, grid))
    codes = (ste(moved) + zero_point).clamp(grid.qmin, grid.qmax)
    return from_groups((codes - zero_point) * scale, grid)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sign", ["mixed", "positive", "negative"])
def test_gradients_are_those_of_plain_autograd(
    sign: str, bits: int, axis: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plquant.quant.in_pieces.piece_size", lambda _: 170)  # several, the last one shorter
    grid = IntGrid(bits, 8, symmetric, axis)  # type: ignore[arg-type]
    weight = random(32, 24)
    weight = {"mixed": weight, "positive": weight.abs(), "negative": -weight.abs()}[sign].requires_grad_()
    in_scale, out_scale = random(24).exp().requires_grad_(), random(32).exp().requires_grad_()
    shape = (32, 3, 1) if axis == "in" else (24, 4, 1)
    low, high = (random(*shape, seed=s).sigmoid().requires_grad_() for s in (1, 2))
    nudge = random(32, 24, seed=4).requires_grad_()
    inputs = (weight, low, high, in_scale, out_scale, nudge)
    upstream = random(32, 24, seed=3)
    ours = fake_quantize(weight, grid, (low, high), in_scale, out_scale, nudge=nudge)
    reference = plain(weight, grid, (low, high), in_scale, out_scale, nudge)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(reference, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("asked", [(0,), (1, 2), (3,), (4,), (0, 3), (1, 2, 4), (5,), (0, 5)])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_a_gradient_is_the_same_whatever_else_is_asked_for(axis: str, asked: tuple[int, ...]) -> None:
    grid = IntGrid(3, 8, axis=axis)  # type: ignore[arg-type]
    shape = (32, 3, 1) if axis == "in" else (24, 4, 1)
    values = [random(32, 24), *(random(*shape, seed=s).sigmoid() for s in (1, 2)), random(24).exp(), random(32).exp()]
    values.append(random(32, 24, seed=4))
    upstream = random(32, 24, seed=3)

    def gradients(asked: tuple[int, ...]) -> dict[int, Tensor]:
        inputs = [v.clone().requires_grad_(i in asked) for i, v in enumerate(values)]
        weight, low, high, in_scale, out_scale, nudge = inputs
        out = fake_quantize(weight, grid, (low, high), in_scale, out_scale, nudge=nudge)
        found = torch.autograd.grad(out, [inputs[i] for i in asked], upstream)
        return dict(zip(asked, found, strict=True))

    everything = gradients((0, 1, 2, 3, 4, 5))
    for index, gradient in gradients(asked).items():
        assert torch.equal(gradient, everything[index])


@given(GRIDS)
def test_gradients_of_groups_of_zeros_are_finite(grid: IntGrid) -> None:
    weight, scale = torch.zeros(8, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    clip = LearnedClipping(weight.shape, grid)
    fake_quantize(weight, grid, clip(), scale, scale).sum().backward()
    for tensor in (weight, scale, *clip.parameters()):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()


def test_gradient_at_the_range_is_shared_by_equal_weights() -> None:
    weight = torch.tensor([[1.0, 1.0, -1.0, 0.3]], dtype=torch.float64, requires_grad=True)
    grid = IntGrid(2, 4)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    scale = torch.ones(4, dtype=torch.float64)
    upstream = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    (ours,) = torch.autograd.grad(fake_quantize(weight, grid, (one, one)), weight, upstream)
    (reference,) = torch.autograd.grad(plain(weight, grid, (one, one), scale, one[0, 0]), weight, upstream)
    torch.testing.assert_close(ours, reference)
    assert ours[0, 0] == ours[0, 1] != 0


@settings(max_examples=20)
@given(st.integers(9, 100) | st.integers(-5, 1))
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"--model.weights.bits={bits} .*2 to 8"):
        IntGrid(bits)


def test_resolve_takes_the_largest_that_divides_every_width() -> None:
    assert IntGrid(4, "auto").resolve({"a": (8, 576), "b": (8, 1536)}).group_size == 64
    assert IntGrid(4, "auto").resolve({"a": (8, 4096)}).group_size == 128
    assert IntGrid(4, "auto", axis="out").resolve({"a": (96, 4096)}).group_size == 32
    assert IntGrid(4, None).resolve({"a": (8, 7)}).group_size is None


def test_resolve_names_every_offender_and_what_would_do() -> None:
    shapes = {f"model.layers.{i}.q": (8, 576) for i in range(3)} | {"model.layers.0.down": (8, 1536)}
    with pytest.raises(ValueError) as error:
        IntGrid(4, 128).resolve(shapes)
    assert "--model.weights.group_size=128 does not divide the width of 3 of 4" in str(error.value)
    assert "model.layers.*.q  in_features=576  (3 of them)" in str(error.value)
    assert "down" not in str(error.value) and "192, 96, 64, 48, 32, 24, 16, 12, 8" in str(error.value)


def test_groups_along_the_output_need_a_size() -> None:
    with pytest.raises(ValueError, match="axis=out"):
        IntGrid(4, None, axis="out")
