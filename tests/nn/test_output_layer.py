"""The output layer of a loaded model: the same parameters, the same logits, gradients where they are wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import plquant as pq
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
