"""Run-time operations: made from JSON, loaded, counted."""

import json

import pytest
import torch
from torch import Tensor

from plquant.transforms.hadamard import orthogonal, split_width
from plquant.transforms.online import KroneckerOp, MatrixOp, OnlineOp, apply_kronecker, apply_matrix, make_op

OPS = {
    "matrix": lambda: MatrixOp(torch.randn(1, 6, 6)),
    "matrix with shift": lambda: MatrixOp(torch.randn(1, 6, 6), torch.randn(6)),
    "matrices": lambda: MatrixOp(torch.randn(3, 2, 2), torch.randn(6)),
    "kronecker": lambda: KroneckerOp(torch.randn(2, 2), torch.randn(3, 3)),
    "kronecker with scale": lambda: KroneckerOp(torch.randn(2, 2), torch.randn(3, 3), 0.7),
}


@pytest.mark.parametrize("name", OPS)
def test_a_checkpoint_says_what_to_make_and_holds_what_to_load(name: str) -> None:
    torch.manual_seed(0)
    op = OPS[name]()
    loaded = make_op(op.kind, json.loads(json.dumps(op.config())))
    assert type(loaded) is type(op) and loaded.config() == op.config()
    assert (loaded.macs_per_token, loaded.stored_bits) == (op.macs_per_token, op.stored_bits)
    loaded.load_state_dict(op.state_dict())
    x = torch.randn(2, 5, 6)
    assert torch.equal(loaded(x), op(x)) and not list(op.parameters())


def test_costs() -> None:
    assert MatrixOp(torch.zeros(1, 576, 576)).macs_per_token == 576**2
    assert MatrixOp(torch.zeros(9, 64, 64)).macs_per_token == 576 * 64
    assert MatrixOp(torch.zeros(1, 576, 576), torch.zeros(576)).bfloat16().stored_bits == 16 * (576**2 + 576)
    op = KroneckerOp(torch.zeros(32, 32), torch.zeros(48, 48))
    assert (op.macs_per_token, op.stored_bits) == (1536 * (32 + 48), 32 * (32**2 + 48**2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPS)
def test_works_in_the_dtype_of_its_input(name: str, dtype: torch.dtype) -> None:
    assert OPS[name]()(torch.randn(4, 6, dtype=dtype)).dtype == dtype


def test_blocks_stay_among_themselves() -> None:
    torch.manual_seed(0)
    matrix, shift, x = torch.randn(3, 2, 2).double(), torch.randn(6).double(), torch.randn(4, 5, 6).double()
    expected = (x - shift) @ torch.block_diag(*matrix)
    torch.testing.assert_close(apply_matrix(x, matrix, shift), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_two_small_products_are_the_kronecker_product(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    left, right, x = torch.randn(2, 2).double(), torch.randn(3, 3).double(), torch.randn(shape).double()
    found = apply_kronecker(x, left, right)
    torch.testing.assert_close(found, x @ torch.kron(left.mT.contiguous(), right), rtol=1e-13, atol=1e-13)
    assert not torch.allclose(found, x @ torch.kron(left, right))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("n", [8, 16, 64, 80, 96, 112, 128, 256, 576])
def test_a_rotation_is_orthogonal_in_any_dtype(n: int, dtype: torch.dtype) -> None:
    """Heads of 64, 80, 96, 112, 128 channels, and a stream of 576; a scale only where n is no power of four."""

    def error(op: KroneckerOp) -> float:
        dense = op.to(dtype).double()(torch.eye(n, dtype=torch.float64))
        return float((dense @ dense.T - torch.eye(n, dtype=torch.float64)).abs().max())

    generator = torch.Generator().manual_seed(0)
    factors = [orthogonal(width, generator) for width in split_width(n)]
    op = KroneckerOp.rotation(*factors)
    assert error(op) < 1e-12 and (op.scale == 1) == (n in (16, 64, 256))
    eye = torch.eye(n, dtype=torch.float64)
    assert torch.allclose(KroneckerOp.rotation(*factors)(eye), KroneckerOp(*factors)(eye), rtol=1e-12)
    assert 2**-0.5 <= op.scale <= 2**0.5
    if dtype == torch.bfloat16 and n not in (16, 256):
        assert error(KroneckerOp(*factors)) > 2e-4  # 5e-3 at 112: entries over sqrt(n), which bf16 does not have


def test_a_scale_is_multiplied_before_rounding() -> None:
    torch.manual_seed(0)
    x, left, right = torch.randn(50, 96).bfloat16(), torch.eye(8).bfloat16(), torch.randn(12, 12).sign().bfloat16()
    exact = 0.3 * apply_kronecker(x.double(), left.double(), right.double())
    once, ours, twice = (
        float((y.double() - exact).norm())
        for y in (exact.bfloat16(), apply_kronecker(x, left, right, 0.3), 0.3 * apply_kronecker(x, left, right))
    )
    assert ours < 1.001 * once < 0.8 * twice


def test_an_operation_of_another_version_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'hadamard', but this plquant has .*kronecker, matrix"):
        make_op("hadamard", {"size": 4})


def test_another_file_can_add_one() -> None:
    class Negation(OnlineOp):
        kind = "negation"
        macs_per_token = 0

        @classmethod
        def empty(cls) -> "Negation":
            return cls()

        def config(self) -> dict[str, int]:
            return {}

        def forward(self, x: Tensor) -> Tensor:
            return -x

    assert isinstance(make_op("negation", {}), Negation)
