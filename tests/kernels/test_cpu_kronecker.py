"""Kronecker products of activations on a CPU, and where a model takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plquant.kernels import native, ops, reference, run_time
from plquant.nn.online import Online, attach_online_
from plquant.transforms.online import KroneckerOp, apply_kronecker
from tests.kernels.test_ops import needs_kernels

ORDERS = [(24, 24), (32, 48), (8, 8), (1, 7), (128, 3), (9, 33)]


def operands(rows: tuple[int, ...], n1: int, n2: int) -> tuple[Tensor, Tensor, Tensor]:
    """Small integers: all sums are exact, whatever their order."""
    generator = torch.Generator().manual_seed(n1)
    x = torch.randint(-9, 10, (*rows, n1 * n2), generator=generator)
    left, right = (torch.randint(-1, 2, (n, n), generator=generator).bfloat16() for n in (n1, n2))
    return x.bfloat16(), left, right / 8


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("orders", ORDERS, ids=str)
def test_the_product_is_that_of_the_operation(orders: tuple[int, int], threads: int) -> None:
    native.dispatch_()
    torch.set_num_threads(threads)
    for rows in ((1,), (2, 3), (19,), (0, 4)):
        x, left, right = operands(rows, *orders)
        for factor in (1.0, 0.75):
            found = ops.cpu_kronecker(x, left, right, factor)
            assert torch.equal(found, apply_kronecker(x, left, right, factor)), rows
            assert torch.equal(found, ops._cpu_kronecker(x, left, right, factor))
            assert torch.equal(found, reference.kronecker(x, left, right, factor))
    x, left, right = operands((3, 5), *orders)
    assert torch.equal(
        ops.cpu_kronecker(x.transpose(0, 1), left, right), apply_kronecker(x, left, right).transpose(0, 1)
    )


@needs_kernels
@pytest.mark.parametrize("orders", ORDERS, ids=str)
def test_it_is_as_exact_as_two_products(orders: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, left, right = (
        torch.randn(*size, generator=generator).bfloat16()
        for size in ((64, orders[0] * orders[1]), *((n, n) for n in orders))
    )
    exact = x.double() @ torch.kron(left.double().T.contiguous(), right.double())
    errors = [(y.double() - exact).norm() for y in (ops.cpu_kronecker(x, left, right), apply_kronecker(x, left, right))]
    assert errors[0] <= 1.01 * errors[1]


def test_without_kernels_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_has_kernels", lambda device: False)
    x, left, right = operands((4,), 9, 33)
    assert torch.equal(ops._cpu_kronecker(x, left, right, 0.75), apply_kronecker(x, left, right, 0.75))


@pytest.mark.parametrize("python", [True, pytest.param(False, marks=needs_kernels)], ids=["python", "dispatched"])
def test_a_wrong_argument_is_named(python: bool) -> None:
    if not python:
        native.dispatch_()
    product: Any = ops._cpu_kronecker if python else ops.cpu_kronecker
    x, left, right = operands((2,), 8, 6)
    wrong = {
        "x": [(x[:, 1:], left, right), (x.float(), left, right)],
        "left": [
            (x, left.float(), right),
            (torch.zeros(2, 129 * 2).bfloat16(), torch.eye(129).bfloat16(), torch.eye(2).bfloat16()),
        ],
        "right": [(x, left, right[:, 1:]), (x, left, right.half())],
    }
    for name, cases in wrong.items():
        for arguments in cases:
            with pytest.raises((ValueError, RuntimeError), match=f"argument `{name}`"):
                product(*arguments, 1.0)


@pytest.mark.parametrize("vectors", native.VECTORS)
def test_many_rows_of_large_factors_are_for_torch(vectors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "vectors", lambda: vectors)
    for rows, order, taken in ((1, 64, True), (16, 64, False), (10_000, 8, True)):
        x, factor = torch.zeros(rows, order * order).bfloat16(), torch.eye(order).bfloat16()
        assert (run_time.kronecker_op(x, factor, factor) is ops.cpu_kronecker) == (taken or vectors == "AVX2")


@needs_kernels
def test_a_model_takes_it_once_it_is_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while it is fitted: blocks are folded to what training computed, in its order of sums."""
    generator = torch.Generator().manual_seed(0)
    x, left, right = (torch.randn(*size, generator=generator).bfloat16() for size in ((5, 54), (6, 6), (9, 9)))
    norm, op = nn.Identity(), KroneckerOp(left, right, 0.75)
    attach_online_(norm, [op])
    online = norm.online
    assert isinstance(online, Online)
    called: list[int] = []
    product = ops.cpu_kronecker
    monkeypatch.setattr(ops, "cpu_kronecker", lambda x, *rest: called.append(len(x)) or product(x, *rest))
    assert torch.equal(norm(x), op(x)) and not called
    with online.laid_out():
        assert torch.equal(norm(x), product(x, left, right, 0.75)) and called == [5]
        norm(x.float()), norm(x.clone().requires_grad_())  # neither other dtypes nor gradients
    norm(x)
    assert called == [5]


def test_the_compiler_sees_through() -> None:
    x, left, right = operands((5,), 6, 9)
    norm = nn.Identity()
    attach_online_(norm, [KroneckerOp(left, right, 0.5)])
    norm.online.kernels = True
    called: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        called.extend(node.target for node in graph.graph.nodes)
        return graph

    run = torch.compile(lambda x: norm(x + 1) * 2, fullgraph=True, backend=backend)
    assert torch.equal(run(x), norm(x + 1) * 2) and ops.cpu_kronecker in called
    torch.library.opcheck(
        ops.cpu_kronecker.default, (x, left, right, 0.5), test_utils=("test_schema", "test_faketensor")
    )
