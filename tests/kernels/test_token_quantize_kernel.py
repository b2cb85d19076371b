"""The codes are those of plquant.quant.token_quantize, after the modules that the launch takes in."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from plquant.kernels.token_quantize import Norm, quantize_tokens
from plquant.kernels.tokens import QuantizedTokens, sources
from plquant.quant.token_quantize import token_codes
from plquant.transforms.gather_op import GatherOp

pytestmark = pytest.mark.usefixtures("interpreted")


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    x[:, ::7] *= 20  # outliers, so that ranges differ
    return x.to(dtype)


def same(
    found: QuantizedTokens,
    x: Tensor,
    bits: int,
    symmetric: bool,
    offset: Tensor | None = None,
    clip: Tensor | None = None,
) -> None:
    """The codes of the reference on x, moved down where they are unsigned."""
    expected = token_codes(x, bits, symmetric, offset, None if clip is None else (clip[0], clip[1]))
    middle = 0 if symmetric else 1 << (bits - 1)
    assert torch.equal(found.codes, (expected.codes.short() - middle).to(torch.int8))
    assert torch.equal(found.scale, expected.scale[:, 0])
    assert torch.equal(found.sums, found.codes.sum(1, dtype=torch.int32))
    if found.zero_point is None:
        assert expected.zero_point is None
    else:
        assert torch.equal(found.zero_point, expected.zero_point[:, 0].int() - middle)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_codes(bits: int, symmetric: bool) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for width in (576, 96, 33):
            x = random(7, width, dtype=dtype)
            same(quantize_tokens(x, bits, symmetric), x, bits, symmetric)
    x = random(9, 64)
    offset = torch.rand(64) - 0.5
    same(quantize_tokens(x, bits, symmetric, offset), x, bits, symmetric, offset)
    clip = torch.tensor([0.5, 0.8])
    same(quantize_tokens(x, bits, symmetric, offset, clip), x, bits, symmetric, offset, clip)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_ranges_on_one_side_of_zero_and_ties(symmetric: bool) -> None:
    x = random(4, 64).abs()
    x[1] = -x[1]
    x[2] = 0
    x[3] = (torch.arange(64) - 32) / 2  # halves between codes
    same(quantize_tokens(x, 4, symmetric), x, 4, symmetric)


def normed(x: Tensor, norm: Norm) -> Tensor:
    """RMSNorm as transformers' Llama computes it."""
    wide = x.float()
    return norm.gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_after_a_norm_and_a_gather(dtype: torch.dtype) -> None:
    x = random(5, 192, dtype=dtype)
    norm = Norm(torch.rand(192).to(dtype) + 0.5, 1e-5)
    same(quantize_tokens(x, 8, norm=norm), normed(x, norm), 8, False)
    index = torch.randperm(192)[:150]
    index[3] = index[4]
    adds = torch.stack([torch.arange(40), torch.arange(40) % 17], 1)
    op = GatherOp(index, adds)
    table = sources(op.index, op.adds)
    assert table.shape == (4, 150)
    same(quantize_tokens(x, 8, gather=table), op(x), 8, False)
    same(quantize_tokens(x, 4, norm=norm, gather=table), op(normed(x, norm)), 4, False)


@pytest.mark.parametrize("order", [16, 64, 128])
def test_after_a_rotation(order: int) -> None:
    x = random(3, 384)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))
    rotated = (x.double().view(3, -1, order) @ matrix / order**0.5).view(3, -1).bfloat16()
    same(quantize_tokens(x, 4, True, hadamard=order), rotated, 4, True)


def test_rows_that_are_not_contiguous() -> None:
    x = random(4, 128)
    same(quantize_tokens(x[:, :64], 8), x[:, :64], 8, False)
    same(quantize_tokens(x.T[:64], 8), x.T[:64].contiguous(), 8, False)


def test_what_does_not_fit_is_refused() -> None:
    x = random(2, 96)
    with pytest.raises(ValueError, match="bits=9"):
        quantize_tokens(x, 9)
    with pytest.raises(ValueError, match="hadamard=64"):
        quantize_tokens(x, 8, hadamard=64)
    with pytest.raises(ValueError, match="float32"):
        quantize_tokens(x.float(), 8)
