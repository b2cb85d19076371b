"""The operation is that of plquant.transforms.online, its codes those of plquant.quant.token_quantize."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from plquant.kernels import kronecker
from plquant.quant.token_quantize import token_codes
from plquant.transforms.online import apply_kronecker

pytestmark = pytest.mark.usefixtures("interpreted")


def operands(rows: int, n1: int, n2: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Small integers: all sums are exact, whatever their order."""
    generator = torch.Generator().manual_seed(n1)
    x = torch.randint(-9, 10, (rows, n1 * n2), generator=generator)
    left, right = (torch.randint(-1, 2, (n, n), generator=generator) for n in (n1, n2))
    return x.to(dtype), left.to(dtype), right.to(dtype) / 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("orders", [(24, 24), (16, 36), (5, 64), (128, 16)], ids=str)
def test_the_operation_and_its_codes(orders: tuple[int, int], dtype: torch.dtype) -> None:
    x, left, right = operands(3, *orders, dtype)
    expected = apply_kronecker(x, left, right)
    assert torch.equal(kronecker.apply(x, left, right), expected)
    assert torch.equal(kronecker.apply(x, left, right, 0.75), apply_kronecker(x, left, right, 0.75))
    for bits, symmetric in ((8, True), (4, False)):
        offset = None if symmetric else torch.rand(x.shape[1], generator=torch.Generator().manual_seed(0)) - 0.5
        found = kronecker.quantize(x, left, right, bits, symmetric, offset)
        reference = token_codes(expected, bits, symmetric, offset)
        middle = 0 if symmetric else 1 << (bits - 1)
        assert torch.equal(found.codes, (reference.codes.short() - middle).to(torch.int8))
        assert torch.equal(found.scale, reference.scale[:, 0])
        assert torch.equal(found.sums, found.codes.sum(1, dtype=torch.int32))
        if found.zero_point is not None and reference.zero_point is not None:
            assert torch.equal(found.zero_point, reference.zero_point[:, 0].int() - middle)


def test_as_exact_as_two_products() -> None:
    torch.manual_seed(0)
    x, left, right = torch.randn(4, 480).bfloat16(), torch.randn(20, 20).bfloat16(), torch.randn(24, 24).bfloat16()
    exact = x.double() @ torch.kron(left.double().T.contiguous(), right.double())
    errors = [(y.double() - exact).norm() for y in (kronecker.apply(x, left, right), apply_kronecker(x, left, right))]
    assert errors[0] <= 1.01 * errors[1]


def test_what_does_not_fit_is_refused() -> None:
    x, left, right = operands(2, 16, 16, torch.float16)
    with pytest.raises(ValueError, match="larger than 128"):
        kronecker.apply(torch.zeros(1, 129 * 2).half(), torch.zeros(129, 129).half(), torch.zeros(2, 2).half())
    with pytest.raises(ValueError, match="is not rows"):
        kronecker.apply(x[:, 1:], left, right)
    with pytest.raises(ValueError, match="float32"):
        kronecker.apply(x, left.float(), right)
    with pytest.raises(ValueError, match="bits=9"):
        kronecker.quantize(x, left, right, 9)
