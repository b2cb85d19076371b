"""Fixed rotations in a block."""

from functools import partial

import pytest
import torch
from torch import nn

from plquant.blocks.proof import _AllDouble
from plquant.methods import Composed
from plquant.nn.attention import AttentionQuantizer
from plquant.nn.cost import Cost
from plquant.nn.online import Online
from plquant.nn.packed_structure import PackedStructure
from plquant.parts.rotation import Rotation
from plquant.quant.grid import ActivationGrid
from plquant.transforms.online import KroneckerOp
from tests.families import FAMILIES
from tests.methods.test_block import make_block


def quantizers(block: nn.Module) -> list[AttentionQuantizer]:
    return [m for m in block.modules() if isinstance(m, AttentionQuantizer)]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_see_a_rotation_of_queries_and_keys(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = make_block(family, torch.float64, activations=ActivationGrid(4))
    for m in block.linears.values():
        m.inputs, m.enabled = None, False
    Rotation(block, places=["queries"])
    monkeypatch.setattr("plquant.nn.attention.quantize_tokens", lambda x, *_: x)
    with torch.no_grad(), _AllDouble():  # some families compute attention in fp32
        rotated = block(x)
        with block.full_precision():
            plain = block(x)
        assert (rotated - plain).norm() / plain.norm() < 1e-9
        for quantizer in quantizers(block):
            assert isinstance(quantizer.online, Online)
            (op,) = quantizer.online
            assert isinstance(op, KroneckerOp)
            op.left.mul_(1.1)  # negative control: no longer orthogonal
        assert (block(x) - plain).norm() / plain.norm() > 1e-4


def test_what_is_written_is_what_ran() -> None:
    """Every rotation is in the block's tensors, and a block made from them gives the same output."""
    activations = ActivationGrid(4)
    block, x = make_block("llama", torch.bfloat16, activations=activations)
    module = Composed(block, [Rotation])
    module.fold()
    kinds = [type(m).__name__ for m in block.modules() if isinstance(m, Online)]
    assert len(kinds) == 2 + 1 + 1  # norms, the input of down_proj, queries and keys
    structure = PackedStructure.from_dict(block.structure().as_dict())
    other, _ = make_block("llama", torch.bfloat16, activations=activations)
    other.load_(structure, block.tensors())
    with torch.no_grad():
        assert torch.equal(other(x), block(x))


def test_a_rotation_of_every_head_is_counted() -> None:
    """Four heads of queries and two of keys, 16 channels each: 16 (4 + 4) multiply-adds a head."""
    block, _ = make_block("llama", activations=ActivationGrid(4))
    Composed(block, [partial(Rotation, places=["queries"])]).fold()
    assert Cost.of(block).online_macs == (4 + 2) * 16 * (4 + 4)


def test_places_can_be_left_out() -> None:
    block, _ = make_block("llama", activations=ActivationGrid(4))
    Composed(block, [partial(Rotation, places=["values"])]).fold()
    assert not any(isinstance(m, Online) for m in block.modules())
