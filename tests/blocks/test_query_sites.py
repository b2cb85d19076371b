"""Between queries and keys: exactly what commutes with RoPE, found by looking and proven."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plquant.blocks.discovery import _pairs_tried, find_places, find_query_sites
from plquant.blocks.sites import QuerySite
from tests.blocks.prepared import places_of, prepare, proof_of
from tests.families import FAMILIES, tiny_model

ALL = slice(None)


def halves(rotary: int) -> list[list[int]]:
    return [[i, i + rotary // 2] for i in range(rotary // 2)]


def neighbours(rotary: int) -> list[list[int]]:
    return [[i, i + 1] for i in range(0, rotary, 2)]


def says(
    pairs: list[list[int]], head_dim: int = 16, kv_heads: int = 2, names: str = "proj", **others: Any
) -> dict[str, Any]:
    paired = {channel for pair in pairs for channel in pair}
    return {
        "query": f"self_attn.q_{names}",
        "key": f"self_attn.k_{names}",
        "query_rows": ALL,
        "key_rows": ALL,
        "heads": 4,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "pairs": pairs,
        "free": [channel for channel in range(head_dim) if channel not in paired],
        "kind": "norm" if names == "norm" else "linear",
        "gain_offset": 0.0,
        **others,
    }


LLAMA = says(halves(16))
FUSED = {"query": "self_attn.qkv_proj", "key": "self_attn.qkv_proj"}
QUERY_SITES = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "starcoder2", "mixtral", "qwen2_moe"], LLAMA),
    "llama_mha": says(halves(16), kv_heads=4),
    "llama_mqa": says(halves(8), head_dim=8, kv_heads=1),
    "gemma2": says(halves(8), head_dim=8),
    "qwen3": says(halves(8), head_dim=8, names="norm"),
    "qwen3_moe": says(halves(8), head_dim=8, names="norm"),
    "gemma3": says(halves(8), head_dim=8, names="norm", gain_offset=1.0),
    "phi3": says(halves(16), **FUSED, query_rows=slice(0, 64), key_rows=slice(64, 96)),
    "opt": says([], kv_heads=4),
    "stablelm": says(halves(4)),
    "glm": says(neighbours(8)),
}


def summary(site: QuerySite) -> dict[str, Any]:
    """What the tests compare: all but the error."""
    fields = {key: value for key, value in vars(site).items() if key != "error"}
    return fields | {"pairs": site.pairs.tolist(), "free": site.free.tolist()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_query_site_of_a_family_is_found(family: str) -> None:
    for places in places_of(family):
        (site,) = places.query_sites
        assert summary(site) == QUERY_SITES[family]
        assert site.pairs.dtype == site.free.dtype == torch.int64 and site.pairs.shape[1:] == (2,)
        assert site.error < 1e-13


@pytest.mark.parametrize("family", FAMILIES)
def test_a_query_site_with_something_wrong_moves_the_output(family: str) -> None:
    copy = proof_of(family)
    (site,) = places_of(family)[0].query_sites
    rotary = site.pairs.flatten().sort().values
    if len(rotary):
        nothing = torch.empty(0, 2, dtype=torch.int64)
        unpaired = replace(site, pairs=nothing, free=torch.arange(site.head_dim))
        assert copy.query_error(unpaired) > 1e-3  # a scale of each channel, as in the papers' code
        other = rotary.view(-1, 2) if summary(site)["pairs"] == halves(len(rotary)) else rotary.view(2, -1).T
        assert len(rotary) == 4 or copy.query_error(replace(site, pairs=other)) > 1e-3
        assert copy.query_error(replace(site, pairs=rotary.roll(1).view(-1, 2))) > 1e-3
    else:
        pairs = torch.tensor(halves(site.head_dim))  # without RoPE, pairs are a special case
        assert copy.query_error(replace(site, pairs=pairs, free=site.free[:0])) < 1e-13
    if site.query_rows != ALL:  # one head off
        rows = slice(site.query_rows.start + site.head_dim, site.query_rows.stop + site.head_dim)
        assert copy.query_error(replace(site, query_rows=rows)) > 1e-3


@pytest.mark.parametrize("factor", [0.5, 0.2, 0.4])
def test_any_part_of_a_head_may_be_rotary(factor: float) -> None:
    lm = tiny_model(
        "stablelm", partial_rotary_factor=factor, num_attention_heads=2, hidden_size=40, num_hidden_layers=1
    )
    blocks, x, calls = prepare(lm)
    (site,) = find_query_sites(blocks[0], x, calls[0])
    assert site.pairs.tolist() == halves(int(20 * factor))  # Phi-2 has 32 of 80
    assert site.free.tolist() == list(range(int(20 * factor), 20))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rotary_numbers_rounded_to_bf16_still_commute(attention: str) -> None:
    lm = tiny_model("llama", attn_implementation=attention).bfloat16()  # then cos^2 + sin^2 is not 1
    blocks, x, calls = prepare(lm)
    cos, sin = calls[0]["position_embeddings"]
    assert cos.dtype == torch.bfloat16 and ((cos.float() ** 2 + sin.float() ** 2) - 1).abs().max() > 1e-4
    (site,) = find_query_sites(blocks[0], x, calls[0])
    assert summary(site) == LLAMA and site.error < 1e-13


class SharedNorm(nn.Module):
    """Attention whose queries and keys pass one norm."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention
        attention.k_norm = attention.q_norm

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """[B, T, H] to [B, T, H]."""
        return x + self.self_attn(x, **kwargs)[0]


def test_one_norm_for_queries_and_keys_is_no_place() -> None:
    # what multiplies the gain for the queries and divides it for the keys leaves it alone, and would prove nothing
    blocks, x, calls = prepare(tiny_model("qwen3", num_hidden_layers=1))
    assert find_query_sites(blocks[0], x, calls[0])
    assert not find_query_sites(SharedNorm(blocks[0].self_attn), x, calls[0])


class Interleaved(nn.Linear):
    """Query, key and value heads in turns, as GPT-NeoX and BLOOM store them."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]: first the heads of the queries, then those of the keys, then those of the values."""
        heads = super().forward(x).unflatten(-1, (8, 16))
        return heads[..., [0, 2, 4, 6, 1, 5, 3, 7], :].flatten(-2)


def test_heads_in_turns_are_no_slice() -> None:
    blocks, x, calls = prepare(tiny_model("phi3", num_hidden_layers=1))
    blocks[0].self_attn.add_module("qkv_proj", Interleaved(64, 128, bias=False))
    places = find_places(blocks[0], x, calls[0])
    assert not places.query_sites
    assert "self_attn.qkv_proj" not in {site.source for site in places.sites}


def test_an_odd_number_of_channels_makes_no_pairs() -> None:
    assert list(_pairs_tried(torch.arange(3), 4)) == []
