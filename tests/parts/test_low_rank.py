"""Low-rank correction in blocks: where it starts, and which norms it learns."""

import pytest
import torch
from torch import Tensor, nn

from plquant.blocks.quant_block import QuantBlock
from plquant.nn.lora import LoRA
from plquant.nn.norm_gain import NormGain
from plquant.nn.transformed_norm import TransformedNorm
from plquant.parts.low_rank import LowRank
from plquant.quant.grid import IntGrid
from tests.blocks.prepared import places_of
from tests.families import tiny_model


def starts(index: int, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    block = QuantBlock({"0": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))}, IntGrid(4, 8), index=index)
    LowRank(block)
    return [m.a.detach() for m in block.modules() if isinstance(m, LoRA)]


def test_every_linear_block_and_run_starts_elsewhere() -> None:
    found = [start for index in range(3) for seed in (0, 1, 2**64 - 1) for start in starts(index, seed)]
    assert len(found) == 18
    assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    assert all(torch.equal(a, b) for a, b in zip(starts(2, 1), starts(2, 1), strict=True))


@pytest.mark.parametrize(
    ("family", "norms"),
    [
        ("llama", ["input_layernorm", "post_attention_layernorm"]),
        ("gemma2", ["input_layernorm", "pre_feedforward_layernorm"]),
        ("qwen3", ["input_layernorm", "post_attention_layernorm"]),  # not q_norm and k_norm
        ("qwen3_moe", ["input_layernorm"]),  # the router reads the other
    ],
)
def test_norms_that_only_linears_read_are_learned(family: str, norms: list[str]) -> None:
    layer = tiny_model(family).model.layers[0]
    block = QuantBlock({"0": layer}, IntGrid(4, 16), places_of(family)[0].inside("0").sites)
    LowRank(block)
    found = {name: m for name, m in block.layers.named_modules() if isinstance(m, TransformedNorm)}
    assert list(found) == [f"0.{name}" for name in norms]
    assert all(isinstance(transform, NormGain) for m in found.values() for transform in m.transforms)
