"""GPTQ against rounding to nearest, and against a plain loop."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from plquant.formats.packing import pack, unpack
from plquant.quant.affine import QTensor
from plquant.quant.axis import output_error
from plquant.quant.clip_search import mse_clip
from plquant.quant.fake_quantize import quantize_weight
from plquant.quant.gptq import gptq_round
from plquant.quant.grid import IntGrid

Clip = tuple[Tensor, Tensor]
AXES = ["in", "out"]
GRIDS = st.builds(
    IntGrid,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    axis=st.sampled_from(AXES),
)
PER_CHANNEL = st.builds(IntGrid, bits=st.integers(2, 8), group_size=st.none(), symmetric=st.booleans())


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated(channels: int, tokens: int = 200, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Hessian of inputs with few directions and very different sizes."""
    mix = random(channels, channels, seed=seed) + 3 * random(channels, 1, seed=seed + 1)
    x = random(tokens, channels, seed=seed + 2) @ mix * random(channels, seed=seed + 3).exp()
    return (x.t() @ x / tokens).to(dtype)


def shares(weight: Tensor, grid: IntGrid, seed: int = 0) -> Clip:
    """Clipping as if learned."""
    width = grid.grouped_width(weight.shape)
    rows, groups = weight.numel() // width, width // grid.size(width)
    low, high = random(2, rows, groups, 1, seed=seed).sigmoid().to(weight.dtype)
    return low, high


def same(a: QTensor, b: QTensor) -> bool:
    pairs = [(a.codes, b.codes), (a.scale, b.scale), (a.zero_point, b.zero_point)]
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def proper(q: QTensor) -> bool:
    """Codes and zero-points in their range, positive scales, no NaN."""
    points = q.codes if q.zero_point is None else torch.cat([q.codes.flatten(), q.zero_point.flatten()])
    within = bool(points.min() >= q.grid.qmin and points.max() <= q.grid.qmax)
    return within and bool((q.scale > 0).all() and q.scale.isfinite().all() and q.dequantize().isfinite().all())


def textbook(
    weight: Tensor, hessian: Tensor, grid: IntGrid, clip: Clip | None, damp: float, act_order: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ as OBS tells it, one column at a time and one weight group at a time, without a Cholesky factor: codes
    [O, I], and scale and zero-point of every weight, [O, I]."""
    remaining, codes = weight.clone(), torch.zeros_like(weight)
    scale, zero_point = torch.zeros_like(weight), torch.zeros_like(weight)

    def choose(values: Tensor, low: Tensor | float, high: Tensor | float) -> tuple[Tensor, Tensor]:
        lo, hi = values.min().clamp(max=0) * low, values.max().clamp(min=0) * high
        if grid.symmetric:
            return torch.maximum(hi / grid.qmax, lo / grid.qmin), torch.zeros(())
        s = (hi - lo) / (2**grid.bits - 1)
        return s, (-lo / s).round().clamp(0, 2**grid.bits - 1)

    size = grid.size(grid.grouped_width(weight.shape))
    if grid.axis == "in":
        for o in range(weight.shape[0]):
            for g in range(weight.shape[1] // size):
                part = slice(g * size, (g + 1) * size)
                kept = (1.0, 1.0) if clip is None else (clip[0][o, g], clip[1][o, g])
                scale[o, part], zero_point[o, part] = choose(weight[o, part], *kept)
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    inverse = torch.linalg.inv(damped)
    order = sorted(range(len(hessian)), key=lambda k: -float(hessian[k, k])) if act_order else range(len(hessian))
    for k in order:
        if grid.axis == "out":
            for g in range(weight.shape[0] // size):
                part = slice(g * size, (g + 1) * size)
                kept = (1.0, 1.0) if clip is None else (clip[0][k, g], clip[1][k, g])
                scale[part, k], zero_point[part, k] = choose(remaining[part, k], *kept)
        s, z = scale[:, k], zero_point[:, k]
        codes[:, k] = ((remaining[:, k] / s).round() + z).clamp(grid.qmin, grid.qmax)
        error = (remaining[:, k] - (codes[:, k] - z) * s) / inverse[k, k]
        remaining -= torch.outer(error, inverse[k])
        inverse -= torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
        inverse[k], inverse[:, k] = 0, 0
    return codes, scale, zero_point


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_those_of_the_textbook(bits: int, axis: str, symmetric: bool, act_order: bool, clipped: bool) -> None:
    grid = IntGrid(bits, 8, symmetric, axis)  # type: ignore[arg-type]
    weight, hessian = random(24, 40), correlated(40)
    clip = shares(weight, grid) if clipped else None
    for block_size in (1, 7, 128):
        q = gptq_round(weight, hessian, grid, clip, act_order=act_order, block_size=block_size)
        codes, scale, zero_point = textbook(weight, hessian, grid, clip, 0.01, act_order)
        assert torch.equal(q.codes.double(), codes)
        torch.testing.assert_close(q.dequantize(), (codes - zero_point) * scale, rtol=1e-9, atol=1e-9)
    other = gptq_round(weight, hessian, grid, clip, act_order=not act_order)
    assert not torch.equal(other.codes.double(), codes)


def test_one_scale_per_output_channel_follows_the_textbook_too() -> None:
    grid, weight, hessian = IntGrid(3, None), random(5, 37), correlated(37)
    codes, *_ = textbook(weight, hessian, grid, None, 0.05, True)
    assert torch.equal(gptq_round(weight, hessian, grid, damp=0.05).codes.double(), codes)


@given(GRIDS | PER_CHANNEL, st.integers(0, 10_000), st.booleans(), st.booleans(), st.booleans())
def test_with_a_diagonal_hessian_it_rounds_to_nearest(
    grid: IntGrid, seed: int, act_order: bool, clipped: bool, identity: bool
) -> None:
    weight = random(16, 24, seed=seed).bfloat16()
    clip = shares(weight.float(), grid, seed) if clipped else None
    size = torch.ones(24) if identity else random(24, seed=seed + 1, dtype=torch.float32).exp()
    if not identity:
        size[::5] = 0  # and some channels without input
    nearest = quantize_weight(weight, grid, clip)
    assert same(gptq_round(weight, size.diag(), grid, clip, act_order=act_order, block_size=5), nearest)
    if grid.bits < 8:
        assert not same(gptq_round(weight, correlated(24, dtype=torch.float32), grid, clip), nearest)


@pytest.mark.parametrize("axis", AXES)
def test_without_a_single_token_it_rounds_to_nearest(axis: str) -> None:
    grid, weight = IntGrid(3, 8, axis=axis), random(16, 24)  # type: ignore[arg-type]
    assert same(gptq_round(weight, torch.zeros(24, 24), grid, damp=0.0), quantize_weight(weight, grid))
    searched = gptq_round(weight, torch.zeros(24, 24), grid, "mse")
    assert same(searched, quantize_weight(weight, grid, mse_clip(weight, grid)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_output_error_is_below_that_of_rounding_to_nearest(
    bits: int, axis: str, act_order: bool, seed: int
) -> None:
    grid = IntGrid(bits, 16, axis=axis)  # type: ignore[arg-type]
    weight = random(32, 64, seed=seed, dtype=torch.float32)
    hessian = correlated(64, seed=10 * seed, dtype=torch.float32)
    nearest = output_error(weight, quantize_weight(weight, grid), hessian)
    q = gptq_round(weight, hessian, grid, act_order=act_order)
    assert output_error(weight, q, hessian) < 0.3 * nearest  # 0.03 to 0.15
    assert (q.dequantize() - weight).square().sum() > (
        quantize_weight(weight, grid).dequantize() - weight
    ).square().sum()


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", [2, 3])
def test_searched_clipping_lowers_the_error(bits: int, axis: str) -> None:
    grid = IntGrid(bits, 32, axis=axis)  # type: ignore[arg-type]
    weight, hessian = random(64, 64, dtype=torch.float32), correlated(64, dtype=torch.float32)
    whole = output_error(weight, gptq_round(weight, hessian, grid), hessian)
    searched = output_error(weight, gptq_round(weight, hessian, grid, "mse"), hessian)
    assert searched < 0.95 * whole  # 0.63 to 0.85


def test_searched_clipping_minds_what_a_column_costs() -> None:
    """With a diagonal Hessian each column costs its damped diagonal."""
    weight, size = random(16, 32, dtype=torch.float32), random(32, seed=1, dtype=torch.float32).exp()
    grid, importance = IntGrid(3, 8), size + 0.01 * size.mean()
    q = gptq_round(weight, size.diag(), grid, "mse")
    assert same(q, quantize_weight(weight, grid, mse_clip(weight, grid, importance=importance)))
    assert not same(q, quantize_weight(weight, grid, mse_clip(weight, grid)))
    grid = IntGrid(3, 8, axis="out")
    assert same(gptq_round(weight, size.diag(), grid, "mse"), quantize_weight(weight, grid, mse_clip(weight, grid)))


@given(GRIDS, st.integers(0, 10_000))
def test_learned_clipping_is_frozen_along_the_input(grid: IntGrid, seed: int) -> None:
    weight, hessian = random(16, 24, seed=seed).float(), correlated(24, seed=seed, dtype=torch.float32)
    clip = shares(weight, grid, seed)
    nearest, q = quantize_weight(weight, grid, clip), gptq_round(weight, hessian, grid, clip)
    assert torch.equal(q.scale, nearest.scale) == (grid.axis == "in")


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([IntGrid(3, None), IntGrid(3, 8, axis="out")]))
def test_codes_come_in_the_order_of_the_channels(seed: int, act_order: bool, grid: IntGrid) -> None:
    weight, hessian = random(16, 24, seed=seed), correlated(24, seed=seed)
    permutation = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    moved = gptq_round(weight[:, permutation], hessian[permutation][:, permutation], grid, act_order=act_order)
    stayed = gptq_round(weight, hessian, grid, act_order=act_order)
    assert torch.equal(moved.codes, stayed.codes[:, permutation]) == act_order


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("axis", AXES)
def test_channels_without_input_are_rounded_to_nearest(axis: str, act_order: bool) -> None:
    grid, weight, hessian = IntGrid(3, 8, axis=axis), random(16, 24), correlated(24)  # type: ignore[arg-type]
    silent = torch.tensor([0, 7, 8, 23])
    hessian[silent], hessian[:, silent] = 0, 0
    nearest = quantize_weight(weight, grid)
    for damp in (0.01, 0.0):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the others need no more damping because of these
            q = gptq_round(weight, hessian, grid, damp=damp, act_order=act_order)
        assert torch.equal(q.codes[:, silent], nearest.codes[:, silent])
        assert not torch.equal(q.codes, nearest.codes)


@given(
    GRIDS | PER_CHANNEL,
    st.integers(0, 10_000),
    st.integers(1, 30),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([None, "mse", "learned"]),
    st.sampled_from(["zero", "constant", "positive", "negative", "mixed", "tiny", "huge"]),
)
def test_no_input_gives_a_nan(
    grid: IntGrid, seed: int, tokens: int, dtype: torch.dtype, clip: str | None, kind: str
) -> None:
    """Hessians of any rank, with channels of sizes from 1e-6 to 1e6."""
    weight = random(16, 24, seed=seed)
    weight = {
        "zero": weight * 0,
        "constant": torch.full_like(weight, float(weight[0, 0])),
        "positive": weight.abs(),
        "negative": -weight.abs(),
        "mixed": weight,
        "tiny": weight * 1e-30,
        "huge": weight * 1e30,
    }[kind].to(dtype)
    x = random(tokens, 24, seed=seed + 1, dtype=torch.float32) * 10 ** torch.linspace(-6, 6, 24)
    chosen = shares(weight.float(), grid, seed) if clip == "learned" else clip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        q = gptq_round(weight, x.t() @ x / tokens, grid, chosen, damp=1e-6)  # type: ignore[arg-type]
    assert proper(q)
    if clip is None and kind in ("zero", "constant"):
        torch.testing.assert_close(
            q.dequantize().float(), weight.float(), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0
        )


@given(GRIDS, st.integers(1, 4), st.integers(1, 4), st.sampled_from([torch.float32, torch.bfloat16]))
def test_scales_have_the_shape_that_is_packed(grid: IntGrid, rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = random(8 * rows, 8 * columns).to(dtype)
    q = gptq_round(weight, correlated(8 * columns, dtype=torch.float32), grid)
    size, (outputs, inputs) = grid.size(8), weight.shape
    assert q.scale.shape == ((outputs, inputs // size) if grid.axis == "in" else (outputs // size, inputs))
    assert q.scale.dtype == dtype
    assert same(unpack(pack(q), weight.shape, grid), q)


def test_a_matrix_that_is_not_positive_is_damped_more_and_says_so() -> None:
    weight, grid = random(16, 24), IntGrid(3, 8)
    hessian = correlated(24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gptq_round(weight, hessian, grid)
    indefinite = torch.eye(24)
    indefinite[3, 4] = indefinite[4, 3] = 1.05  # correlated by more than 1
    with pytest.warns(UserWarning, match="not positive definite with damp=0.01; raised to 0.1"):
        q = gptq_round(weight, indefinite, grid)
    assert proper(q) and same(q, gptq_round(weight, indefinite, grid, damp=0.1))
    with pytest.warns(UserWarning, match="damp=0; raised to 0.01"):
        gptq_round(weight, torch.ones(24, 24), grid, damp=0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_matrix_of_no_inputs_is_refused(value: float) -> None:
    hessian = torch.eye(8)
    hessian[3, 3] = value
    with pytest.raises(ValueError, match="activations that overflow"):
        gptq_round(random(8, 8), hessian, IntGrid(4, 8))


@pytest.mark.parametrize("axis", AXES)
def test_what_it_is_given_is_left_alone(axis: str) -> None:
    weight, hessian = random(16, 24, dtype=torch.float32), correlated(24, dtype=torch.float32)
    before = weight.clone(), hessian.clone()
    gptq_round(weight, hessian, IntGrid(4, 8, axis=axis))  # type: ignore[arg-type]
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@pytest.mark.parametrize("axis", AXES)
def test_single_precision_is_enough(axis: str) -> None:
    grid = IntGrid(3, 16, axis=axis)  # type: ignore[arg-type]
    weight, hessian = random(64, 256), correlated(256, tokens=100)  # of less than full rank
    exact = output_error(weight, gptq_round(weight, hessian, grid), hessian)
    single = output_error(weight, gptq_round(weight.float(), hessian.float(), grid), hessian)
    assert abs(single / exact - 1) < 0.02  # 5e-8 and 0.003
