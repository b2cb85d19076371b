"""Clipping of activations that is learned."""

from functools import partial

import pytest
import torch

from plquant.blocks.errors import token_error
from plquant.methods import Composed
from plquant.nn.activation_quantizer import ActivationQuantizer
from plquant.nn.packed_linear import PackedLinear
from plquant.parts.activation_clipping import ActivationClipping
from plquant.parts.clipping import LWC
from plquant.quant.grid import ActivationGrid, IntGrid
from tests.methods.test_block import fit, make_block

A3 = ActivationGrid(3)


def test_it_learns_and_what_is_packed_is_what_was_trained() -> None:
    block, x = make_block("llama", grid=IntGrid(8, 16), activations=A3)
    with torch.no_grad(), block.full_precision():
        target = block(x)
    module = Composed(block, [partial(ActivationClipping, lr=5e-2)])
    with torch.no_grad():
        module.error_before = float(token_error(block(x), target))
    fit(module, x, target, 15)
    (part,) = module.parts
    assert isinstance(part, ActivationClipping) and len(part.clips) == len(block.linears)
    assert all(float((share - 4).abs()) > 0.05 for clip in part.clips for share in clip.parameters())
    with torch.no_grad():
        trained = block(x)
        error = float(token_error(trained, target))
        block.pack_()
        assert error < 0.9 * module.error_before
        assert torch.equal(block(x), trained)
    for linear in (m for m in block.modules() if isinstance(m, PackedLinear)):
        assert linear.inputs is not None and linear.inputs.clip is not None and not list(linear.parameters())


def test_codes_stand_for_the_values_and_folding_changes_nothing() -> None:
    torch.manual_seed(0)
    quantizer, x = ActivationQuantizer(4, clip=torch.tensor([0.5, 0.8])), torch.randn(5, 32)
    values = quantizer(x)
    assert torch.equal(quantizer.codes(x).dequantize(), values)
    assert torch.equal(quantizer.folded()(x), values)
    assert values.max() < x.max() and not torch.equal(ActivationQuantizer(4)(x), values)


def test_a_linear_that_saw_nothing_keeps_the_whole_range() -> None:
    block, _ = make_block("llama", activations=A3)
    Composed(block, [ActivationClipping])
    linear = next(iter(block.linears.values()))
    assert linear.inputs is not None and linear.inputs.shares() is not None
    linear.forget_corrections()
    assert linear.inputs.shares() is None


def test_with_16_bit_activations_it_is_refused() -> None:
    with pytest.raises(ValueError, match="--model.activations.bits"):
        Composed(make_block("llama")[0], [LWC, ActivationClipping])
