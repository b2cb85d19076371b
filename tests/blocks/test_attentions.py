"""Attention is found by its calls of transformers' interface, which is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from plquant.blocks.attentions import find_attentions, watching_attention
from plquant.blocks.sites import Attention
from tests.blocks.prepared import Toy, X, places_of, prepare
from tests.families import FAMILIES, tiny_model

SHAPES = {"llama_mha": (4, 4, 16), "llama_mqa": (4, 1, 8), "opt": (4, 4, 16)}
SHAPES |= dict.fromkeys(["qwen3", "gemma2", "gemma3", "qwen3_moe"], (4, 2, 8))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_found_with_its_heads(family: str, implementation: str) -> None:
    lm = tiny_model(family, attn_implementation="eager" if family == "gemma2" else implementation).bfloat16()
    blocks, x, calls = prepare(lm)
    expected = [Attention("self_attn", *SHAPES.get(family, (4, 2, 16)))]
    assert find_attentions(blocks[0], x, calls[0]) == expected
    assert list(places_of(family)[0].attentions) == expected


def test_a_block_without_the_interface_has_none() -> None:
    assert find_attentions(Toy(), X, {}) == []


def test_what_is_recorded_is_what_attention_reads_and_its_result_stays() -> None:
    lm = tiny_model("llama")
    ids = torch.arange(3, 9)[None]
    before = lm(ids).logits
    seen: list[tuple[nn.Module, Tensor, Tensor, Tensor]] = []
    with watching_attention(lambda *call: seen.append(call)):
        assert torch.equal(lm(ids).logits, before)
    assert [call[0] for call in seen] == [layer.self_attn for layer in lm.model.layers]
    assert [tuple(t.shape) for t in seen[0][1:]] == [(1, 4, 6, 16), (1, 2, 6, 16), (1, 2, 6, 16)]
    lm(ids)
    assert len(seen) == 2  # nobody watches any more


def test_the_interface_is_put_back_after_an_error() -> None:
    original = AttentionInterface.get_interface
    with pytest.raises(ZeroDivisionError), watching_attention(lambda *call: None):
        assert AttentionInterface.get_interface is not original
        raise ZeroDivisionError
    assert AttentionInterface.get_interface is original
