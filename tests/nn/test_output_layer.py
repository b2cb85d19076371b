"""The output layer of a loaded model: the same parameters, the same logits, gradients where they are wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import plquant as pq
from plquant.kernels import native, ops
from plquant.nn.output_layer import OutputLayer
from tests.test_packed_model import packed, save


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gemma2", True)])
def test_it_has_the_parameters_of_the_linear_it_was(family: str, tied: bool, tmp_path: Path) -> None:
    folder = save(packed(family), tmp_path / "out")
    lm, plain = pq.load(folder), pq.load(folder, kernels=False)
    head, theirs = lm.get_output_embeddings(), plain.get_output_embeddings()
    assert type(head) is OutputLayer and type(theirs) is nn.Linear
    assert torch.equal(head.weight, theirs.weight)
    assert (head.weight is lm.get_input_embeddings().weight) == tied
    assert {name for name, _ in lm.named_parameters()} == {name for name, _ in plain.named_parameters()}


def test_products_are_those_of_the_linear_it_was() -> None:
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        linear = nn.Linear(96, 40, dtype=dtype)
        layer = OutputLayer.of(linear)
        assert layer.weight is linear.weight and layer.bias is linear.bias
        for x in (torch.randn(1, 1, 96).to(dtype), torch.randn(3, 7, 96).to(dtype)):
            with torch.no_grad():
                torch.testing.assert_close(layer(x), linear(x), rtol=2 * bound, atol=2 * bound)
            theirs = torch.autograd.grad(linear(x).sum(), linear.weight)
            assert torch.equal(torch.autograd.grad(layer(x).sum(), linear.weight)[0], theirs[0])


def test_what_the_op_does_not_take_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = nn.Linear(96, 40), torch.randn(2, 96)
    called: list[int] = []
    monkeypatch.setattr(ops, "dense_linear", lambda *arguments: called.append(1) or linear(arguments[0]))
    layer = OutputLayer.of(linear)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x.bfloat16()), linear(x.bfloat16()))
    with torch.no_grad():
        assert torch.equal(OutputLayer.of(linear.double())(x.double()), linear(x.double()))
        linear.float().weight.data = torch.randn(96, 40).t()
        assert torch.equal(OutputLayer.of(linear)(x), linear(x))
        linear.weight.data = linear.weight.contiguous()
    layer = OutputLayer.of(linear)
    layer.weight.requires_grad_(False)
    assert layer(x).requires_grad and not called  # the bias wants a gradient
    with torch.no_grad():
        layer(x)
    assert called == [1]


def test_few_rows_of_bf16_read_the_weight_by_our_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.available():
        pytest.skip("needs a CPU with kernels")
    layer, rows = OutputLayer.of(nn.Linear(96, 40, dtype=torch.bfloat16)), []
    product = native.dense_rows
    monkeypatch.setattr(native, "dense_rows", lambda x, *others: rows.append(len(x)) or product(x, *others))
    with torch.no_grad():
        for count in (1, 4, 5):
            layer(torch.randn(1, count, 96).bfloat16())
    assert rows == [1, 4]
