"""From a language model to its blocks under calibration."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor, nn

from plquant.blocks.capture import capture_calls, capture_inputs
from plquant.blocks.discovery import Site, find_blocks, find_sites, structure
from plquant.blocks.quant_block import QuantBlock
from plquant.quant.grid import IntGrid

PROOF_TOKENS = 16


def prepare_blocks(lm: nn.Module, grid: IntGrid, ids: Tensor) -> list[QuantBlock]:
    """Turn every decoder block of ``lm`` into a ``QuantBlock``, in place, with its sites proven.

    Blocks of the same structure share one proof.

    Args:
        lm: The language model.
        grid: Grid of every linear, with its group size settled.
        ids: int64 [N, T], calibration ids; the blocks' arguments are captured for sequences of this length.
    """
    name, layers = find_blocks(lm)
    few = ids[:1, :PROOF_TOKENS]
    hidden, short = capture_inputs(lm, layers, few), capture_calls(lm, layers, few)
    sites: dict[Hashable, list[Site]] = {}
    for layer, call in zip(layers, short, strict=True):
        key = structure(layer)
        if key not in sites:
            sites[key] = find_sites(layer, hidden, call)
    calls = capture_calls(lm, layers, ids[:1])
    return [
        QuantBlock(layer, grid, sites[structure(layer)], call, index, f"{name}.{index}")
        for index, (layer, call) in enumerate(zip(layers, calls, strict=True))
    ]
