"""The integer products are exact; scales are applied in fp32, in a fixed order."""

import pytest
import torch

pytest.importorskip("triton")
from plquant.kernels import int_gemm
from plquant.kernels.tokens import QuantizedTokens
from tests.kernels.quantized import tokens_of

pytestmark = pytest.mark.usefixtures("interpreted")


def operands(
    m: int, k: int, n: int, w_bits: int, x_bits: int, symmetric: bool
) -> tuple[QuantizedTokens, int_gemm.IntWeight, torch.Tensor]:
    """Random codes with scales and zero-points, and the exact integer sums [M, O]."""
    torch.manual_seed(0)
    half = 1 << (x_bits - 1)
    codes = torch.randint(-half, half, (m, k)).to(torch.int8)
    zero = None if symmetric else torch.randint(-half, half, (m,), dtype=torch.int32)
    x = tokens_of(codes, torch.rand(m) + 0.1, zero)
    if symmetric:
        w_codes = torch.randint(-(1 << (w_bits - 1)), 1 << (w_bits - 1), (n, k)).to(torch.int8)
        w_zero = None
    else:
        w_codes = torch.randint(0, 1 << w_bits, (n, k)).to(torch.uint8)
        w_zero = torch.randint(0, 1 << w_bits, (n, 1)).to(torch.uint8)
    weight = int_gemm.pack(w_codes, torch.rand(n, 1) + 0.1, w_zero, w_bits)
    x_steps = codes.long() - (0 if zero is None else zero[:, None].long())
    w_steps = w_codes.long() - (0 if w_zero is None else w_zero.long())
    return x, weight, x_steps @ w_steps.T


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [(8, 8), (6, 6), (4, 8), (4, 4)], ids=lambda b: f"W{b[0]}A{b[1]}")
@pytest.mark.parametrize("shape", [(5, 200, 72), (40, 256, 130), (70, 144, 128)], ids=str)
def test_products_are_exact(shape: tuple[int, int, int], bits: tuple[int, int], symmetric: bool) -> None:
    x, weight, sums = operands(*shape, *bits, symmetric)
    out = int_gemm.linear(x, weight, torch.float32)
    assert torch.equal(out, sums.float() * x.scale[:, None] * weight.scale)
    assert torch.equal(out, int_gemm.linear(x, weight, torch.float32))


@pytest.mark.parametrize(
    "config", [int_gemm.configure(m, p, g) for m in (1, 17, 65) for p in (0, 1) for g in (8, 9, 10)]
)
def test_every_configuration(config: int_gemm.Config) -> None:
    for bits in (8, 4) if config.inputs == int_gemm.BLOCK else (8,):
        x, weight, sums = operands(19, 160, 136, bits, bits, False)
        out = int_gemm.linear(x, weight, torch.bfloat16, config=config)
        assert torch.equal(out, (sums.float() * x.scale[:, None] * weight.scale).bfloat16())


def test_the_largest_codes_do_not_saturate() -> None:
    codes = torch.full((1, 512), -128, dtype=torch.int8)
    x = tokens_of(codes, torch.ones(1), torch.full((1,), 127))
    for bits in (8, 4):
        largest = (1 << bits) - 1
        weight = int_gemm.pack(
            torch.zeros(32, 512, dtype=torch.uint8), torch.ones(32), torch.full((32,), largest), bits=bits
        )
        assert int_gemm.linear(x, weight, torch.float32).unique().tolist() == [255 * largest * 512]


def test_codes_survive_packing() -> None:
    for bits in range(2, 9):
        codes = torch.randint(0, 1 << bits, (8, 200)).to(torch.uint8)
        weight = int_gemm.pack(codes, torch.ones(8), torch.zeros(8), bits)
        assert torch.equal(int_gemm.unpack(weight).long(), codes.long() - (1 << (bits - 1)))
        assert weight.codes.nbytes == 8 * 256 // (2 if bits <= 4 else 1)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, _ = operands(2, 64, 8, 8, 8, False)
    with pytest.raises(ValueError, match="one scale per output channel"):
        int_gemm.pack(torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, 2), torch.zeros(8, 2), 4)
    with pytest.raises(ValueError, match="64 channels, the weight takes 32"):
        int_gemm.linear(x, int_gemm.pack(torch.zeros(8, 32, dtype=torch.int8), torch.ones(8), None, 4), torch.float16)
    assert int_gemm.most_inputs(True, weight) == 33025
    many = torch.zeros(1, 33026, dtype=torch.int8)
    wide = tokens_of(many, torch.ones(1), torch.zeros(1))
    with pytest.raises(ValueError, match="exceed 32 bits"):
        int_gemm.linear(wide, int_gemm.pack(many.byte(), torch.ones(1), torch.zeros(1), 8), torch.float16)
