"""The quantizers in C++ against those of plain operations."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from plquant.native import library
from plquant.quant import in_pieces, native, token_quantize
from plquant.quant.fake_quantize import fake_quantize, quantize_weight
from plquant.quant.grid import IntGrid
from plquant.quant.grouped import GroupedWeight

FLOATS = st.sampled_from([torch.float32, torch.bfloat16])
GRIDS = st.builds(IntGrid, st.integers(2, 8), st.sampled_from([1, 3, 16, 64, 100]), st.booleans())
SIGNS: dict[str, Callable[[Tensor], Tensor]] = {
    "with a NaN": lambda x: x.index_fill(-1, torch.tensor([0]), float("nan")),
    "mixed": lambda x: x,
    "positive": torch.abs,
    "zero": torch.zeros_like,
    "constant": torch.ones_like,
}


@st.composite
def weights(draw: st.DrawFn, size: int, signs: list[str]) -> GroupedWeight:
    """Five rows of three groups; every field but the first may be missing."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    groups = SIGNS[draw(st.sampled_from(signs))](torch.randn(5, 3, size)).to(draw(FLOATS))
    low, high = torch.rand(2, 5, 3, 1) if draw(st.booleans()) else (None, None)
    inner, outer, nudge = torch.rand(1, 3, size) + 0.5, torch.rand(5, 1, 1) + 0.5, torch.rand(5, 3, size) - 0.5
    some = [tensor if draw(st.booleans()) else None for tensor in (inner, outer, nudge)]
    return GroupedWeight(groups, some[0], some[1], low, high, some[2])


@given(GRIDS, FLOATS, st.sampled_from(["float32", "bfloat16", "codes"]), st.data())
def test_values_codes_and_ranges_agree_to_the_bit(
    grid: IntGrid, scale_dtype: torch.dtype, out: str, data: st.DataObject
) -> None:
    weight = data.draw(weights(grid.size(0), list(SIGNS)))
    integer = torch.int8 if grid.symmetric else torch.uint8
    values = torch.zeros(2, *weight.groups.shape, dtype=integer if out == "codes" else getattr(torch, out))
    assert native.takes(weight, scale_dtype, values)
    found = native.quantize(weight, grid, scale_dtype, values[0])
    expected = in_pieces.quantize(weight, grid, scale_dtype, values[1])
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0, atol=0, equal_nan=True)
    if out != "codes" or torch.isfinite(weight.groups).all():  # a NaN has no code
        torch.testing.assert_close(values[0], values[1], rtol=0, atol=0, equal_nan=True)


@given(GRIDS, FLOATS, FLOATS, st.data())
def test_gradients_agree(grid: IntGrid, scale_dtype: torch.dtype, dtype: torch.dtype, data: st.DataObject) -> None:
    weight = data.draw(weights(grid.size(0), list(SIGNS)[1:]))
    grad = torch.randn(weight.groups.shape).to(dtype)
    ranges = in_pieces.quantize(weight, grid, scale_dtype, torch.empty_like(grad))
    needed = tuple(field is not None and data.draw(st.booleans()) for field in weight)
    found = native.gradients(weight, ranges, grid, grad, needed)
    expected = in_pieces.gradients(weight, ranges, grid, grad, needed)
    for name, asked, ours, theirs in zip(weight._fields, needed, found, expected, strict=True):
        assert (ours is not None) == (theirs is not None) == asked, name
        if ours is not None and theirs is not None:
            near = 2e-2 if ours.dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(ours, theirs, rtol=near, atol=near * float(grad.abs().max()), equal_nan=True)


@given(
    *[st.integers(2, 8), st.booleans(), FLOATS, st.sampled_from(["values", "codes"]), st.sampled_from([1, 3, 64, 100])],
    *[st.booleans(), st.booleans(), st.sampled_from([-3.0, 0.0, 3.0]), st.integers(0, 10_000)],
)
def test_rows_agree(
    bits: int,
    symmetric: bool,
    dtype: torch.dtype,
    out: str,
    width: int,
    clips: bool,
    shifts: bool,
    mean: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    grid, rows, grad = IntGrid(bits, None, symmetric), (torch.randn(7, width) + mean).to(dtype), torch.randn(7, width)
    offset = torch.rand(width) - 0.5 if shifts else None
    low, high = (torch.tensor(0.7), torch.tensor(0.9)) if clips else (None, None)
    integer = torch.int8 if symmetric else torch.uint8
    values = torch.zeros(2, 7, width, dtype=integer if out == "codes" else dtype)
    with pytest.MonkeyPatch.context() as patch:
        found = token_quantize._quantize(rows, offset, low, high, grid, values[0])
        ours = token_quantize._gradients(rows, offset, low, high, grid, grad.to(dtype))
        patch.setattr(native, "takes_rows", lambda *_: False)
        expected = token_quantize._quantize(rows, offset, low, high, grid, values[1])
        theirs = token_quantize._gradients(rows, offset, low, high, grid, grad.to(dtype))
    assert torch.equal(values[0], values[1])
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    near = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=near, atol=near * width**0.5)


@pytest.mark.parametrize("rows", [1, 7, 64, 200])
def test_the_number_of_threads_changes_nothing(rows: int) -> None:
    torch.manual_seed(0)
    weight, scale, upstream = torch.randn(rows, 24), torch.rand(24) + 0.5, torch.randn(rows, 24)
    scale.requires_grad_()

    def run(threads: int) -> tuple[Tensor, Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        out = fake_quantize(weight, IntGrid(3, 8), in_scale=scale)
        found = torch.autograd.grad(out, scale, upstream)[0]
        torch.set_num_threads(before)
        return out.detach(), found

    for threads in (2, 3):
        for one, many in zip(run(1), run(threads), strict=True):
            assert torch.equal(one, many)


def test_what_it_does_not_take_goes_the_other_way_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(native, "quantize", fail)
    quantize_weight(torch.randn(4, 8, dtype=torch.float64), IntGrid(3, 8))
    quantize_weight(torch.randn(4, 8, dtype=torch.float16), IntGrid(3, 8))
    with pytest.raises(AssertionError):
        quantize_weight(torch.randn(4, 8), IntGrid(3, 8))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_makes_no_difference(default: torch.dtype) -> None:
    weight, x, scale = torch.randn(8, 64), torch.randn(5, 64), torch.ones(64, requires_grad=True)
    clip, share = (torch.full((8, 4, 1), 0.9), torch.full((8, 4, 1), 0.8)), torch.tensor(0.9, requires_grad=True)

    def everything() -> list[Tensor]:
        out = fake_quantize(weight, IntGrid(3, 16), clip, scale)
        rows = token_quantize.quantize_tokens(x, 4, clip=(share, share))
        tokens = token_quantize.token_codes(x, 4)
        gradients = torch.autograd.grad([out.sum(), rows.sum()], [scale, share])
        return [out, rows, tokens.codes, tokens.scale, quantize_weight(weight, IntGrid(3, 16)).scale, *gradients]

    expected = everything()
    torch.set_default_dtype(default)
    try:
        found = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_no_rows_are_no_rows(dtype: torch.dtype) -> None:
    x = torch.empty(0, 8, dtype=dtype)
    assert token_quantize.quantize_tokens(x, 4).shape == x.shape
    assert token_quantize.token_codes(x, 4).scale.shape == (0, 1)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("", r"no C\+\+ compiler"),
        ("/nowhere/g++ -v", "No such file"),
        ("false", "failed"),
    ],
)
def test_without_a_compiler_a_warning_says_so(
    command: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = quantize_weight(torch.ones(4, 8), IntGrid(3, 8))
    false = shutil.which("false") or ""
    monkeypatch.setenv("CXX", false if command == "false" else command)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nothing is built there yet
    for kept in (native.available, native._library, library):
        kept.cache_clear()
    with pytest.warns(UserWarning, match=reason):
        found = quantize_weight(torch.ones(4, 8), IntGrid(3, 8))
    for kept in (native.available, native._library, library):
        kept.cache_clear()
    assert torch.equal(found.codes, expected.codes)
