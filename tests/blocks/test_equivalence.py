"""What transforms change before anything is rounded: nothing, and a wrong one is seen."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from plquant.block_module import BlockModule
from plquant.blocks.capture import capture_inputs
from plquant.blocks.equivalence import equivalence_error
from plquant.blocks.prepare import prepare_blocks
from plquant.blocks.quant_block import QuantBlock
from plquant.parts.affine import Affine
from plquant.parts.low_rank import LowRank
from plquant.parts.rotation import Rotation
from plquant.parts.scale_shift import LET
from plquant.quant.grid import ActivationGrid, IntGrid
from plquant.transforms.base import Transforms
from plquant.transforms.dominant_matrix import DominantMatrix
from tests.families import VOCAB, tiny_model

PARTS: dict[str, list[Any]] = {
    "LET": [LET],
    "rotations, matrices": [partial(Rotation, places=["norms", "queries", "linears"]), Affine],
    "online matrices": [LET, partial(Affine, online="kronecker")],
    "with a correction, which is none": [LET, LowRank],
}


def fitted(family: str, parts: Sequence[Callable[[QuantBlock], Any]], dtype: torch.dtype) -> tuple[QuantBlock, Tensor]:
    """A block of which everything that is learned has moved."""
    lm = tiny_model(family).to(dtype)
    ids = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    block = prepare_blocks(lm, IntGrid(3, 16), ids, ActivationGrid(4))[0]
    module = BlockModule(block, [part(block) for part in parts])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, DominantMatrix):
                m.progress_(1)
        for parameters in module.learnables().values():
            for p in parameters:
                p.add_(torch.empty_like(p).uniform_(-1, 1, generator=generator))
    return block, capture_inputs(lm, list(block.layers.values()), ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
@pytest.mark.parametrize("parts", PARTS)
def test_transforms_leave_the_output_where_it_was(parts: str, family: str, dtype: torch.dtype) -> None:
    block, x = fitted(family, PARTS[parts], dtype)
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    with torch.no_grad():
        output = block(x)
        error = equivalence_error(block, x)
        assert error is not None and error < 1e-6  # 1e-15; where a norm in fp32 comes last 0
        assert torch.equal(block(x), output)
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.named_parameters())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("parts", PARTS)
def test_a_reader_without_the_transform_is_seen(parts: str, family: str) -> None:
    block, x = fitted(family, PARTS[parts], torch.float32)
    block.linears["0.self_attn.v_proj"].reads = Transforms()
    assert (equivalence_error(block, x) or 0) > 1e-2


def test_nothing_transformed_proves_nothing() -> None:
    assert equivalence_error(*fitted("llama", [], torch.float32)) is None
