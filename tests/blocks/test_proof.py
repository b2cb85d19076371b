"""The float64 copy: nothing in it loses precision, channels are told apart, wrong folds move the output."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from plquant.blocks import proof
from plquant.blocks.discovery import find_sites
from plquant.blocks.proof import Proof, match_channels
from plquant.blocks.sites import Site
from tests.blocks.prepared import Toy, X, places_of, prepared, proof_of
from tests.families import FAMILIES, HIDDEN

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def norm_site(source: str, consumers: tuple[str, ...], gain_offset: float = 0.0, channels: int = HIDDEN) -> Site:
    return Site(source, consumers, torch.arange(channels), "norm", False, float("nan"), gain_offset)


def linear_site(source: str, consumers: tuple[str, ...], channel: Tensor) -> Site:
    return Site(source, consumers, channel, "linear", False, float("nan"))


def test_without_the_widened_casts_a_proof_stops_at_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    # Gemma multiplies by its gain in fp32 (Llama after the cast back, so that only its inputs are rounded)
    blocks, x, calls = prepared("gemma2")
    monkeypatch.setattr(proof, "_AllDouble", nullcontext)
    error = Proof(blocks[0], x, calls[0]).error(norm_site("input_layernorm", QKV, gain_offset=1.0))
    assert 1e-9 < error < 1e-5  # measured 1.6e-7: what the tolerance would have to let through


@pytest.mark.parametrize(
    "cast",
    [
        Tensor.float,
        Tensor.bfloat16,
        lambda x: x.to(torch.float32),
        lambda x: x.to(dtype=torch.float16),
        lambda x: x.type(torch.float32),
        lambda x: F.softmax(x, -1, dtype=torch.float32),
        lambda x: x + torch.zeros(2, dtype=torch.float32),
        lambda x: x.double().to(torch.int64).float() * 0 + x,
    ],
)
def test_no_cast_loses_precision_in_a_proof(cast: Any) -> None:
    x = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    with proof._AllDouble():
        result = cast(x)
    assert result.dtype == torch.float64
    assert torch.equal(result, x.softmax(-1) if result[0] > 0.4 else x)
    assert x.float().dtype == torch.float32  # outside, casts are casts


@given(data=st.data(), num_channels=st.integers(1, 40), width=st.integers(1, 60))
def test_match_channels_recovers_any_map(data: st.DataObject, num_channels: int, width: int) -> None:
    channel = torch.tensor(data.draw(st.lists(st.integers(0, num_channels - 1), min_size=width, max_size=width)))
    generator = torch.Generator().manual_seed(width)
    before = torch.randn(7, width, generator=generator, dtype=torch.float64)
    factor = torch.linspace(0.1, 1, num_channels, dtype=torch.float64).exp()
    assert torch.equal(match_channels(before, before * factor[channel], factor), channel)
    nothing = torch.full((width,), -1)
    assert torch.equal(match_channels(before, before, factor), nothing)  # did not move
    assert torch.equal(match_channels(before, before[:3], factor), nothing)  # other tokens were sent here
    broken = before * factor[channel]
    broken[0, 0] *= 1 + 1e-6  # one token of one channel moved by something else
    assert torch.equal(match_channels(before, broken, factor), channel.index_fill(0, torch.tensor(0), -1))
    dead = before.clone()
    dead[:, -1] = 0  # says nothing about its channel
    assert match_channels(dead, dead * factor[channel], factor)[-1] == -1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_site_with_something_wrong_moves_the_output(family: str) -> None:
    for site in places_of(family)[0].sites:
        copy = proof_of(family)
        assert copy.error(site) < 1e-13
        first, *others = site.readers
        assert copy.error(replace(site, consumers=tuple(others), kept=())) > 1e-3  # one reader forgotten
        assert copy.error(replace(site, channel=site.channel.roll(1))) > 1e-3
        if site.kept:
            assert copy.error(replace(site, kept=())) > 1e-3  # the router would choose other experts
        if site.gain_offset:
            assert copy.error(replace(site, gain_offset=0.0)) > 1e-3
        if site.rows != slice(None):
            rows = slice(site.rows.start - 1, site.rows.stop - 1)
            assert copy.error(replace(site, rows=rows)) > 1e-3
        if not site.admits_shift and copy.has_biases(site.source, *site.readers):
            assert copy.error(site, with_shift=True) > 1e-3
        if site.kind == "linear":
            width = site.head_dim or 1
            assert width == 1 or copy.matrix_error(width, site) < 1e-13
            assert copy.matrix_error(2 * width, site) > 1e-3  # two heads mixed


def test_wrong_sites_move_the_output() -> None:
    gemma = proof_of("gemma2")
    assert gemma.error(norm_site("pre_feedforward_layernorm", GATE_UP, gain_offset=1.0)) < 1e-13
    assert gemma.error(norm_site("post_attention_layernorm", GATE_UP, gain_offset=1.0)) > 0.01  # measured 0.52
    llama = proof_of("llama_mha")  # here every matrix is square, so shapes forbid nothing
    identity = torch.arange(HIDDEN)
    assert llama.error(linear_site("mlp.up_proj", ("mlp.down_proj",), identity)) < 1e-13
    assert llama.error(linear_site("mlp.gate_proj", ("mlp.down_proj",), identity)) > 0.01  # measured 0.11
    assert llama.error(linear_site("self_attn.q_proj", ("self_attn.k_proj",), identity)) > 0.01  # measured 0.54


def test_a_shift_is_refused_at_relu() -> None:
    site = linear_site("fc1", ("fc2",), torch.arange(96))
    assert proof_of("opt").error(site) < 1e-13
    assert proof_of("opt").error(site, with_shift=True) > 0.01  # measured 0.35


def test_a_matrix_needs_whole_heads() -> None:
    site = linear_site("self_attn.v_proj", ("self_attn.o_proj",), torch.arange(HIDDEN))
    assert proof_of("llama_mha").matrix_error(16, site) < 1e-13
    assert proof_of("llama_mha").matrix_error(16, replace(site, channel=site.channel.roll(1))) == float("inf")
    assert proof_of("llama_mha").matrix_error(48, site) == float("inf")  # does not divide 64


class OddNorm(nn.Module):
    """Normalizes and multiplies by some function of the weight."""

    def __init__(self, gain: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        return F.rms_norm(x, (8,)) * self.gain(self.weight)


@pytest.mark.parametrize(
    ("gain", "offset"), [(lambda w: w, 0.0), (lambda w: 1 + w, 1.0), (lambda w: w - 0.5, -0.5), (torch.exp, None)]
)
def test_gain_offset_is_asked_of_the_norm(gain: Any, offset: float | None) -> None:
    block = Toy()
    block.add_module("norm", OddNorm(gain))
    assert Proof(block, X, {}).gain_offset("norm") == offset
    found = [(site.consumers, site.gain_offset) for site in find_sites(block, X, {}) if site.source == "norm"]
    assert found == ([] if offset is None else [(("up",), offset)])
