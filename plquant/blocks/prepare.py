"""From a language model to its blocks under calibration."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from plquant.blocks.capture import capture_calls, capture_inputs
from plquant.blocks.discovery import PROOF_TOKENS, Places, find_blocks, find_in_each, find_places
from plquant.blocks.quant_block import QuantBlock
from plquant.blocks.weights import BlockWeights
from plquant.quant.grid import ActivationGrid, IntGrid


def prepare_blocks(
    lm: nn.Module,
    grid: IntGrid,
    ids: Tensor,
    activations: ActivationGrid | None = None,
    blocks_per_fit: int = 1,
    weights: BlockWeights | None = None,
) -> list[QuantBlock]:
    """Turn the decoder blocks of ``lm`` into ``QuantBlock``s, in place, with the places for transforms proven.

    Blocks of the same structure share one proof.

    Args:
        lm: The language model, its experts unfused.
        grid: Grid of every linear, with its group size settled.
        ids: int64 [N, T], calibration ids; the blocks' arguments are captured for sequences of this length.
        activations: Grid of the activations, or ``None``.
        blocks_per_fit: Consecutive blocks that are fitted together; the last run may be shorter.
        weights: Of the blocks, if these do not have them.
    """
    parent, layers = find_blocks(lm)
    few = ids[:1, :PROOF_TOKENS]
    hidden, short = capture_inputs(lm, layers, few), capture_calls(lm, layers, few)

    def prove(layer: nn.Module, call: dict[str, Any]) -> Places:
        with nullcontext() if weights is None else weights.held(layer):
            return find_places(layer, hidden, call)

    proven = find_in_each(layers, short, prove)
    places = [found.inside(str(number)) for number, found in enumerate(proven)]
    if activations is not None and activations.in_attention and not any(place.attentions for place in places):
        raise ValueError(
            f"{type(lm).__name__} does not call transformers' attention interface, in which queries, keys and values "
            "would be quantized; use --model.activations=null"
        )
    calls = capture_calls(lm, layers, ids[:1])
    runs = [range(len(layers))[start : start + blocks_per_fit] for start in range(0, len(layers), blocks_per_fit)]
    return [
        QuantBlock(
            {str(number): layers[number] for number in numbers},
            grid,
            [site for number in numbers for site in places[number].sites],
            [calls[number] for number in numbers],
            index,
            parent,
            [site for number in numbers for site in places[number].query_sites],
            [attention for number in numbers for attention in places[number].attentions],
            activations,
        )
        for index, numbers in enumerate(runs)
    ]
