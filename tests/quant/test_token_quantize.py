"""Activations on their grids, token by token, and the gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from plquant.quant.grid import ActivationGrid, IntGrid
from plquant.quant.token_quantize import quantize_tokens, token_codes

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
BITS = st.integers(2, 8)
values = st.floats(-(2.0**100), 2.0**100, width=32)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(BITS, st.booleans(), DTYPES, st.lists(values, min_size=32, max_size=32))
def test_codes_fit_and_zero_is_exact(bits: int, symmetric: bool, dtype: torch.dtype, numbers: list[float]) -> None:
    x, grid = torch.tensor(numbers).view(2, 2, 8).to(dtype), IntGrid(bits, None, symmetric)
    q = token_codes(x, bits, symmetric)
    assert q.codes.min() >= grid.qmin and q.codes.max() <= grid.qmax
    assert q.scale.dtype == torch.float32 and q.scale.shape == (2, 2, 1) and (q.scale > 0).all()
    if not symmetric:
        assert q.zero_point is not None and q.zero_point.max() <= grid.qmax
    assert (q.dequantize()[x == 0] == 0).all()


@given(BITS, st.booleans(), DTYPES, st.integers(0, 10_000), st.sampled_from(["zero", "constant", "positive", "mixed"]))
def test_error_is_at_most_half_a_step(bits: int, symmetric: bool, dtype: torch.dtype, seed: int, kind: str) -> None:
    x = random(3, 5, 16, seed=seed, dtype=torch.float32)
    x = {"zero": x * 0, "constant": torch.full_like(x, float(x[0, 0, 0])), "positive": x.abs(), "mixed": x}[kind]
    x = x.to(dtype)
    error = (quantize_tokens(x, bits, symmetric).float() - x.float()).abs()
    step = token_codes(x, bits, symmetric).scale
    rounding = x.float().abs().amax(-1, keepdim=True) * (2**-8 if dtype == torch.bfloat16 else 2**-22)
    assert (error <= step / 2 + rounding).all()


@given(BITS, st.booleans(), DTYPES, st.booleans(), st.booleans(), st.integers(0, 10_000))
def test_fake_quantization_is_that_of_the_codes(
    bits: int, symmetric: bool, dtype: torch.dtype, has_offset: bool, has_clip: bool, seed: int
) -> None:
    x = random(2, 3, 8, seed=seed).to(dtype)
    offset = (random(8, seed=seed + 1).sigmoid() - 0.5).float() if has_offset else None
    clip = (torch.tensor(0.7), torch.tensor(0.9)) if has_clip else None
    ours = quantize_tokens(x, bits, symmetric, offset, clip)
    assert ours.dtype == dtype
    assert torch.equal(ours, token_codes(x, bits, symmetric, offset, clip).dequantize(dtype))


def test_every_token_and_head_has_its_own_range() -> None:
    x = random(2, 3, 5, 8, dtype=torch.float32)
    by_row = torch.stack([quantize_tokens(row, 4) for row in x.reshape(-1, 8)]).view_as(x)
    assert torch.equal(quantize_tokens(x, 4), by_row)
    assert torch.equal(quantize_tokens(x.transpose(1, 2), 4), by_row.transpose(1, 2))
    assert not torch.equal(quantize_tokens(x.flatten(-2), 4).view_as(x), by_row)


def test_arithmetic_is_fp32_whatever_the_dtype() -> None:
    x = random(64, 128, dtype=torch.float32).bfloat16()
    codes = token_codes(x, 8)
    assert torch.equal(codes.codes, token_codes(x.float(), 8).codes)
    in_bf16 = (x / codes.scale.bfloat16()).round() + codes.zero_point
    assert (in_bf16 != codes.codes).float().mean() > 0.05  # what is avoided; 0.44


@pytest.mark.parametrize("copies", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("symmetric", [False, True])
def test_offset_copies_add_up_to_the_channel_at_its_own_step(copies: int, symmetric: bool) -> None:
    x = random(500, 1) * 3
    bounds = torch.tensor([[-4.0, 4.0]], dtype=torch.float64).expand(500, 2)  # fix the range, hence the step
    offset = (2 * torch.arange(copies) - copies + 1) / (2 * copies)
    row = torch.cat([bounds, (x / copies).expand(-1, copies)], dim=1)
    with_offsets = torch.cat([torch.zeros(2), offset])
    step = token_codes(row, 4, symmetric).scale
    offset_sum = quantize_tokens(row, 4, symmetric, with_offsets)[:, 2:].sum(1, keepdim=True)
    plain_sum = quantize_tokens(row, 4, symmetric)[:, 2:].sum(1, keepdim=True)
    assert torch.allclose(offset_sum, (x / step).round() * step)
    assert (offset_sum - x).abs().max() <= step.max() / 2 * (1 + 1e-9)
    if copies > 1:
        assert (plain_sum - x).abs().max() > step.max() / 2 * 1.5


def ste(x: Tensor, to: Tensor) -> Tensor:
    return x + (to - x).detach()


def plain(x: Tensor, grid: IntGrid, offset: Tensor, clip: tuple[Tensor, Tensor] | None) -> Tensor:
    """The same quantizer as chained autograd operations: the specification."""
    lo, hi = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    if clip is not None:
        lo, hi = lo * clip[0], hi * clip[1]
    scale = torch.maximum(hi / grid.qmax, lo / grid.qmin) if grid.symmetric else (hi - lo) / grid.qmax
    zero_point = torch.zeros_like(scale) if grid.symmetric else ste(-lo / scale, (-lo / scale).round())
    position = x / scale
    codes = ste(position, (position + offset).round()) + zero_point
    clamped = codes.clamp(grid.qmin, grid.qmax)
    if clip is None:  # within the full range only the rounding of the zero-point clips
        clamped = ste(codes, clamped)
    return (clamped - zero_point) * scale


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("where", ["mixed", "positive", "negative"])
def test_gradients_are_those_of_plain_autograd(
    bits: int, symmetric: bool, clipped: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plquant.quant.token_quantize.piece_size", lambda _: 100)  # several, the last one shorter
    x = random(3, 5, 24)
    x = {"mixed": x, "positive": x.abs(), "negative": -x.abs()}[where].requires_grad_()
    offset = random(24, seed=1).sigmoid() - 0.5
    low, high = (torch.tensor(share, dtype=torch.float64, requires_grad=True) for share in (0.6, 0.8))
    clip = (low, high) if clipped else None
    inputs = (x, low, high) if clipped else (x,)
    upstream = random(3, 5, 24, seed=3)
    ours = quantize_tokens(x, bits, symmetric, offset, clip)
    reference = plain(x, IntGrid(bits, None, symmetric), offset, clip)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(reference, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_an_outlier_feels_the_step_it_forces_on_the_others() -> None:
    x = torch.cat([torch.full((1, 1), 100.0), random(1, 63, dtype=torch.float32)], dim=1).requires_grad_()
    (quantize_tokens(x, 4) - x.detach())[:, 1:].square().sum().backward()
    assert x.grad is not None and x.grad[0, 0] > 0.01


@pytest.mark.parametrize("name", ["bits", "kv", "probabilities"])
@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_widths_out_of_range_are_refused(name: str, bits: int) -> None:
    with pytest.raises(ValueError, match=rf"--model.activations.{name}={bits} .*2 to 8"):
        ActivationGrid(**{name: bits})


def test_quantizing_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="--model.activations.bits=null .* quantizes no activation"):
        ActivationGrid(bits=None)
    assert ActivationGrid(bits=None, kv=4).kv_bits == 4


@pytest.mark.parametrize(
    ("grid", "title"),
    [
        (ActivationGrid(4), "A4"),
        (ActivationGrid(8, kv=4), "A8KV4"),
        (ActivationGrid(8, kv=None), "A8KV16"),
        (ActivationGrid(None, kv=4), "A16KV4"),
        (ActivationGrid(4, probabilities=8), "A4P8"),
    ],
)
def test_titles_are_those_of_papers(grid: ActivationGrid, title: str) -> None:
    assert grid.title == title


def test_what_is_quantized_where_is_said() -> None:
    said = dict(ActivationGrid(4, kv=8).describe())
    assert said["inputs of the quantized linears"] == "4 bits per token, asymmetric, dynamic"
    assert said["keys (after RoPE) and values: the KV cache"] == "8 bits per token and head, asymmetric, dynamic"
    assert said["softmax probabilities"] == "floating point"
