"""Products, dequantization and quantization on a GPU: pytest -m gpu tests/kernels."""

from __future__ import annotations

import pytest
import torch

from plquant.kernels import int_gemm, kronecker, prefill
from plquant.kernels.dequantize import dequantize
from plquant.kernels.token_quantize import Norm, quantize_tokens
from plquant.kernels.tokens import sources
from plquant.quant.token_quantize import token_codes
from tests.kernels.quantized import error_ratio, inputs, quantized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
DTYPES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_dequantized_and_multiplied(bits: int) -> None:
    for dtype in DTYPES:
        for shape in ((4096, 4096), (1000, 1056)):
            packed, weight = quantized(bits, shape, 32, "in", dtype, device=DEVICE)
            assert torch.equal(dequantize(packed), weight.to(dtype))
            for rows in (17, 64, 200):
                x = inputs(rows, shape[1], dtype, DEVICE)
                out = prefill.linear(x, packed)
                assert error_ratio(out, x, weight) <= 1.1
                assert torch.equal(out, prefill.linear(x, packed))
        packed, weight = quantized(bits, (1024, 512), 64, "out", dtype, device=DEVICE)
        assert torch.equal(dequantize(packed), weight.to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_products_are_exact(bits: int) -> None:
    for rows, k, n in ((1, 4096, 4096), (40, 576, 1536), (300, 1000, 1032)):
        x = quantize_tokens(inputs(rows, k, torch.bfloat16, DEVICE), 8)
        codes = torch.randint(0, 1 << bits, (n, k), device=DEVICE).to(torch.uint8)
        zeros = torch.randint(0, 1 << bits, (n,), device=DEVICE)
        weight = int_gemm.pack(codes, torch.rand(n, device=DEVICE), zeros, bits)
        assert x.zero_point is not None
        sums = (x.codes.double() - x.zero_point[:, None]) @ (codes.double() - zeros[:, None]).T
        assert torch.equal(int_gemm.linear(x, weight, torch.float32), sums.float() * x.scale[:, None] * weight.scale)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_codes_are_those_of_the_reference(symmetric: bool) -> None:
    middle = 0 if symmetric else 8
    for dtype in DTYPES:
        x = inputs(33, 4096, dtype, DEVICE)
        found, expected = quantize_tokens(x, 4, symmetric), token_codes(x, 4, symmetric)
        assert torch.equal(found.codes, (expected.codes.short() - middle).to(torch.int8))
        assert torch.equal(found.scale, expected.scale[:, 0])


def test_norm_gather_and_rotation_in_one_launch() -> None:
    x = inputs(9, 4096, torch.bfloat16, DEVICE)
    norm = Norm(torch.rand(4096, device=DEVICE).bfloat16() + 0.5, 1e-5)
    table = sources(torch.arange(4096, device=DEVICE), torch.tensor([[0, 1], [2, 1]], device=DEVICE))
    wide = x.float()
    y = norm.gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)).bfloat16()
    y[:, 1] = (y[:, 1].float() + y[:, 0].float() + y[:, 2].float()).bfloat16()
    found, expected = quantize_tokens(x, 8, norm=norm, gather=table), token_codes(y, 8)
    # sums of squares are taken in another order: a number in 2^16 may round otherwise
    assert ((found.codes.short() + 128 - expected.codes.short()) != 0).double().mean() <= 1e-3
    assert quantize_tokens(x, 8, norm=norm, gather=table, hadamard=128).codes.shape == x.shape


def test_kronecker() -> None:
    for n1, n2 in ((24, 24), (64, 64), (128, 112)):
        x = inputs(5, n1 * n2, torch.bfloat16, DEVICE)
        left, right = torch.randn(n1, n1, device=DEVICE).bfloat16(), torch.randn(n2, n2, device=DEVICE).bfloat16()
        exact = x.double() @ torch.kron(left.double().T.contiguous(), right.double())
        out = kronecker.apply(x, left, right)
        assert (out.double() - exact).norm() <= 6e-3 * exact.norm()
        assert torch.equal(kronecker.quantize(x, left, right, 8).codes, quantize_tokens(out, 8).codes)
