import numpy as np
import pytest
import torch

from bench import ptx
from bench.interpreter import interpreted
from tests.kernels import toy_kernels as toy


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_rounds_as_torch_does(dtype: torch.dtype) -> None:
    x, y = random(64, dtype=dtype), random(64, dtype=dtype).flip(0)
    out = torch.empty_like(x)
    with interpreted(toy):
        toy.arithmetic[(1,)](x, y, out, SIZE=64)
    assert torch.equal(out, (x + x) * y - y.int().to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums(dtype: torch.dtype) -> None:
    x = random(4, 32, dtype=dtype)
    out = torch.empty(4, dtype=dtype)
    with interpreted(toy):
        toy.row_sums[(1,)](x, out, ROWS=4, COLUMNS=32)
    torch.testing.assert_close(out.double(), x.double().sum(1), rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products(dtype: torch.dtype) -> None:
    x, y = random(16, 16, dtype=dtype), random(16, 16, dtype=dtype).T.contiguous()
    out = torch.empty(16, 16)
    with interpreted(toy):
        toy.product[(1,)](x, y, out, SIZE=16)
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-6, atol=1e-5)


def test_integer_products_are_exact() -> None:
    x = torch.full((16, 16), -127, dtype=torch.int8)
    out = torch.empty(16, 16, dtype=torch.int32)
    with interpreted(toy):
        toy.product[(1,)](x, -x, out, SIZE=16)
    assert torch.equal(out, torch.full_like(out, -127 * 127 * 16))


def test_inline_ptx() -> None:
    x = torch.tensor([0x12345678, 0x0000FFFF, -1, 0x00010000], dtype=torch.int32)
    out = torch.empty_like(x)
    with interpreted(toy):
        toy.halves_swapped[(1,)](x, out, SIZE=4)
    assert out.tolist() == [0x56780000, -65536, -65536, 0]


def test_instructions() -> None:
    lanes = {"$1": np.array([0x89ABCDEF, 0x3C004000], np.uint32), "$2": np.array([0x01234567, 0x40003C00], np.uint32)}

    def one(text: str) -> list[int]:
        return [int(v) for v in ptx.run(text, lanes, 2)["$0"]]

    assert one("prmt.b32 $0, $1, $2, 0x7b54;")[0] == 0x01FF4567
    assert one("lop3.b32 $0, $1, 0x000f000f, 0x64006400, 0xEA;")[0] == 0x640B640F
    assert one("shl.b32 $0, $1, 33;") == [0, 0]
    assert one("fma.rn.f16x2 $0, $1, $2, $1;")[1] == 0x42004400  # 1 * 2 + 1 and 2 * 1 + 2
    with pytest.raises(NotImplementedError, match=r"cvt\.rna"):
        one("cvt.rna.tf32.f32 $0, $1;")


def test_triton_compiles_again_afterwards() -> None:
    import triton
    import triton.language as tl

    before = {name: dict(vars(space)) for name, space in {"tl": tl, "core": tl.core, "tensor": tl.tensor}.items()}
    kernel = toy.row_sums
    test_sums(torch.bfloat16)
    after = {name: dict(vars(space)) for name, space in {"tl": tl, "core": tl.core, "tensor": tl.tensor}.items()}
    assert before == after
    assert toy.row_sums is kernel
    assert not triton.knobs.runtime.interpret
