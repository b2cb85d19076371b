"""Blocks and sites are found without names, and only where folding changes nothing."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from plquant.blocks import discovery
from plquant.blocks.capture import capture_calls
from plquant.blocks.discovery import Proof, Site, find_blocks, find_sites, match_channels, structure
from plquant.transforms.scale_shift import fold_consumer, fold_source
from tests.families import FAMILIES, HIDDEN, VOCAB, tiny_model

NUM_TOKENS = 12

# source: (consumers, kind, admits_shift, gain_offset)
Expected = dict[str, tuple[tuple[str, ...], str, bool, float]]
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
LLAMA: Expected = {
    "input_layernorm": (QKV, "norm", False, 0.0),
    "self_attn.v_proj": (("self_attn.o_proj",), "linear", False, 0.0),
    "post_attention_layernorm": (GATE_UP, "norm", False, 0.0),
    "mlp.up_proj": (("mlp.down_proj",), "linear", False, 0.0),
}
GEMMA: Expected = {
    "input_layernorm": (QKV, "norm", False, 1.0),
    "self_attn.v_proj": (("self_attn.o_proj",), "linear", False, 0.0),
    "pre_feedforward_layernorm": (GATE_UP, "norm", False, 1.0),
    "mlp.up_proj": (("mlp.down_proj",), "linear", False, 0.0),
}
PHI3: Expected = {
    "input_layernorm": (("self_attn.qkv_proj",), "norm", False, 0.0),
    "post_attention_layernorm": (("mlp.gate_up_proj",), "norm", False, 0.0),
}
OPT: Expected = {
    "self_attn_layer_norm": (QKV, "norm", True, 0.0),
    "self_attn.v_proj": (("self_attn.out_proj",), "linear", True, 0.0),
    "final_layer_norm": (("fc1",), "norm", True, 0.0),
    "fc1": (("fc2",), "linear", False, 0.0),  # ReLU commutes with a positive scale, not with a shift
}
SITES = {family: LLAMA for family in FAMILIES} | {"gemma2": GEMMA, "gemma3": GEMMA, "phi3": PHI3, "opt": OPT}


def prepare(lm: PreTrainedModel) -> tuple[nn.ModuleList, Tensor, list[dict[str, Any]]]:
    """Blocks, an input and the arguments of each block."""
    _, blocks = find_blocks(lm)
    ids = torch.randint(3, VOCAB, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    dtype = next(lm.parameters()).dtype
    return blocks, torch.zeros(1, NUM_TOKENS, lm.config.hidden_size, dtype=dtype), capture_calls(lm, blocks, ids)


@cache
def prepared(family: str) -> tuple[nn.ModuleList, Tensor, list[dict[str, Any]]]:
    """The same for a tiny model which nobody changes."""
    return prepare(tiny_model(family))


@cache
def sites_of(family: str) -> list[list[Site]]:
    """Sites of every block of a tiny model."""
    blocks, x, calls = prepared(family)
    return [find_sites(block, x, call) for block, call in zip(blocks, calls, strict=True)]


def summary(sites: list[Site]) -> Expected:
    """What the tests compare."""
    return {site.source: (site.consumers, site.kind, site.admits_shift, site.gain_offset) for site in sites}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_of_a_family_is_found_and_no_other(family: str) -> None:
    for sites in sites_of(family):
        assert summary(sites) == SITES[family]
        assert list(summary(sites)) == list(SITES[family])  # in running order


@pytest.mark.parametrize("family", FAMILIES)
def test_proofs_hold_to_float64_although_norms_and_softmax_compute_in_fp32(family: str) -> None:
    errors = [site.error for sites in sites_of(family) for site in sites]
    assert max(errors) < 1e-13  # measured 2e-16 to 7e-16


def test_without_the_widened_casts_a_proof_stops_at_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    # Gemma multiplies by its gain in fp32 (Llama after the cast back, so that only its inputs are rounded)
    blocks, x, calls = prepared("gemma2")
    monkeypatch.setattr(discovery, "_AllDouble", nullcontext)
    error = Proof(blocks[0], x, calls[0]).error("input_layernorm", QKV, torch.arange(HIDDEN), gain_offset=1.0)
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
    with discovery._AllDouble():
        result = cast(x)
    assert result.dtype == torch.float64
    assert torch.equal(result, x.softmax(-1) if result[0] > 0.4 else x)
    assert x.float().dtype == torch.float32  # outside, casts are casts


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_at_every_site_leaves_the_logits_of_the_real_model(family: str) -> None:
    lm = tiny_model(family, seed=1, attn_implementation="eager").double()
    ids = torch.randint(3, VOCAB, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    _, blocks = find_blocks(lm)
    with torch.no_grad():
        before = lm(ids).logits
        for block, sites in zip(blocks, sites_of(family), strict=True):
            for site in sites:
                fold_(block, site, generator)
        after = lm(ids).logits
    assert (after - before).norm() / before.norm() < 1e-5  # measured 0 to 2e-7: norms compute in fp32


def fold_(block: nn.Module, site: Site, generator: torch.Generator) -> None:
    """Fold a random scale, and shift where admitted, in place."""
    parameters = dict(block.named_parameters())
    weight, bias = parameters[f"{site.source}.weight"], parameters.get(f"{site.source}.bias")
    scale = torch.empty(len(weight), dtype=torch.float64).uniform_(0.5, 2, generator=generator)
    shift = torch.empty_like(scale).uniform_(-1, 1, generator=generator) if site.admits_shift else None
    new = {site.source: fold_source(weight, bias, scale, shift, site.gain_offset)}
    for name in site.consumers:
        weight, bias = parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
        shift_in = None if shift is None else shift[site.channel]
        new[name] = fold_consumer(weight, bias, scale[site.channel], shift_in)
    for name, (new_weight, new_bias) in new.items():
        parameters[f"{name}.weight"].copy_(new_weight)
        if new_bias is not None:
            parameters[f"{name}.bias"].copy_(new_bias)


@pytest.mark.parametrize(("family", "num_kv_heads"), [("llama", 2), ("llama_mha", 4), ("llama_mqa", 1), ("qwen3", 2)])
def test_channel_repeats_the_value_heads_of_a_query_group(family: str, num_kv_heads: int) -> None:
    for site in sites_of(family)[0]:
        width = len(prepared(family)[0][0].get_parameter(f"{site.source}.weight"))
        expected = torch.arange(width)
        if site.source == "self_attn.v_proj":
            expected = expected.view(num_kv_heads, -1).repeat_interleave(4 // num_kv_heads, 0).flatten()
        assert site.channel.dtype == torch.int64
        assert torch.equal(site.channel, expected)


@settings(max_examples=10, deadline=None)
@given(num_kv_heads=st.integers(1, 3), group=st.integers(1, 3), head_dim=st.sampled_from([2, 4, 6]))
def test_channel_map_needs_no_head_size(num_kv_heads: int, group: int, head_dim: int) -> None:
    heads = {"num_attention_heads": num_kv_heads * group, "num_key_value_heads": num_kv_heads, "head_dim": head_dim}
    blocks, x, calls = prepare(tiny_model("llama", num_hidden_layers=1, hidden_size=36, **heads))
    (site,) = (site for site in find_sites(blocks[0], x, calls[0]) if site.source == "self_attn.v_proj")
    expected = torch.arange(num_kv_heads * head_dim).view(num_kv_heads, head_dim).repeat_interleave(group, 0).flatten()
    assert torch.equal(site.channel, expected)


@given(data=st.data(), num_channels=st.integers(1, 40), width=st.integers(1, 60))
def test_match_channels_recovers_any_map(data: st.DataObject, num_channels: int, width: int) -> None:
    channel = torch.tensor(data.draw(st.lists(st.integers(0, num_channels - 1), min_size=width, max_size=width)))
    generator = torch.Generator().manual_seed(width)
    before = torch.randn(7, width, generator=generator, dtype=torch.float64)
    factor = torch.linspace(0.1, 1, num_channels, dtype=torch.float64).exp()
    found = match_channels(before, before * factor[channel], factor)
    assert found is not None and torch.equal(found, channel)
    assert match_channels(before, before, factor) is None  # did not move
    assert match_channels(before, before[:3], factor) is None  # other tokens were sent here
    broken = before * factor[channel]
    broken[0, 0] *= 1 + 1e-6  # one token of one channel moved by something else
    assert match_channels(before, broken, factor) is None
    dead = before.clone()
    dead[:, -1] = 0  # says nothing about its channel
    assert match_channels(dead, dead * factor[channel], factor) is None


def test_wrong_sites_move_the_output() -> None:
    blocks, x, calls = prepared("gemma2")
    gemma = Proof(blocks[0], x, calls[0])
    identity = torch.arange(HIDDEN)
    assert gemma.error("pre_feedforward_layernorm", GATE_UP, identity, gain_offset=1.0) < 1e-13
    assert gemma.error("post_attention_layernorm", GATE_UP, identity, gain_offset=1.0) > 0.01  # measured 0.52
    assert gemma.error("pre_feedforward_layernorm", GATE_UP, identity, gain_offset=0.0) > 0.01  # measured 0.28
    assert gemma.error("pre_feedforward_layernorm", GATE_UP[:1], identity, gain_offset=1.0) > 0.01  # measured 0.35
    blocks, x, calls = prepared("llama_mha")  # here every matrix is square, so shapes forbid nothing
    llama = Proof(blocks[0], x, calls[0])
    assert llama.error("mlp.up_proj", ("mlp.down_proj",), identity) < 1e-13
    assert llama.error("mlp.gate_proj", ("mlp.down_proj",), identity) > 0.01  # measured 0.11
    assert llama.error("self_attn.q_proj", ("self_attn.k_proj",), identity) > 0.01  # measured 0.54
    assert llama.error("self_attn.v_proj", ("self_attn.o_proj",), identity.roll(1)) > 0.01  # measured 0.95


def test_a_shift_is_refused_at_relu() -> None:
    blocks, x, calls = prepared("opt")
    proof = Proof(blocks[0], x, calls[0])
    identity = torch.arange(96)
    assert proof.error("fc1", ("fc2",), identity) < 1e-13
    assert proof.error("fc1", ("fc2",), identity, with_shift=True) > 0.01  # measured 0.35


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_a_bf16_model_is_proven_in_float64_and_left_as_it_was(family: str) -> None:
    lm = tiny_model(family).bfloat16().train()
    lm.get_submodule(find_blocks(lm)[0])[0].requires_grad_(False)
    blocks, x, calls = prepare(lm)
    fired = []
    handle = blocks[0].register_forward_hook(lambda *args: fired.append(args))
    before = copy.deepcopy(lm.state_dict())
    rng = torch.get_rng_state()

    sites = find_sites(blocks[0], x, calls[0])

    assert summary(sites) == SITES[family]
    assert max(site.error for site in sites) < 1e-13
    assert not fired  # nor did a watcher of the original see the copy
    handle.remove()
    assert torch.equal(torch.get_rng_state(), rng)
    after = lm.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == torch.bfloat16 for key in before)
    assert all(module.training for module in lm.modules())
    assert not any(p.requires_grad for p in blocks[0].parameters())
    assert all(p.requires_grad for p in blocks[1].parameters())
    # transformers leaves hooks of its own that record hidden states, on other modules than these
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in blocks[0].modules())


def test_a_second_run_proves_the_same() -> None:
    blocks, x, calls = prepared("llama")
    again = find_sites(blocks[0], x, calls[0])
    assert [site.error for site in again] == [site.error for site in sites_of("llama")[0]]


def test_autocast_of_the_caller_does_not_reach_the_proof() -> None:
    blocks, x, calls = prepared("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert max(site.error for site in find_sites(blocks[0], x, calls[0])) < 1e-13


class Toy(nn.Module):
    """x + down(activation(up(norm(x)))), with what else a test wants to read the norm's output."""

    def __init__(self, activation: Any = F.silu, extra: str = "") -> None:
        super().__init__()
        self.activation, self.extra = activation, extra
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.other = nn.Linear(16 if extra == "wider reader" else 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H] to [B, T, H]."""
        normed = self.norm(x)
        y = self.down(self.activation(self.up(normed)))
        if self.extra == "parallel":
            return x + y + self.other(normed)
        if self.extra == "residual":  # BLOOM, optionally: the residual is taken after the norm
            return normed + y + self.other(x)
        if self.extra == "nonlinear reader":
            return x + y + self.other(torch.tanh(normed))
        if self.extra == "reordered reader":
            return x + y + self.other(normed.flip(-1))
        if self.extra == "wider reader":
            return x + y + self.other(torch.cat([normed, normed], -1))
        if self.extra == "unused":
            return x + y
        return x + y + self.other(x)


X = torch.zeros(1, NUM_TOKENS, 8)


@given(
    st.sampled_from(
        [
            (F.relu, True, False),
            (F.leaky_relu, True, False),
            (lambda x: x, True, True),
            (lambda x: 3 * x, True, True),
            (F.silu, False, False),
            (F.gelu, False, False),
            (torch.tanh, False, False),
            (lambda x: F.relu(x).square(), False, False),  # Nemotron
            (lambda x: x.softmax(-1), False, False),
        ]
    )
)
@settings(deadline=None)
def test_linear_to_linear_needs_an_activation_that_commutes(case: tuple[Any, bool, bool]) -> None:
    activation, scales, shifts = case
    sites = summary(find_sites(Toy(activation), X, {}))
    assert sites["norm"] == (("up",), "norm", True, 0.0)
    # 3 x: a consumer's input is 3 times the channel, but moves by the channel's factor; the shift is then 3 times too
    # small, so the proof refuses it
    shifts = shifts and float(activation(torch.ones(1, 1))) == 1
    assert sites.get("up") == ((("down",), "linear", shifts, 0.0) if scales else None)


@pytest.mark.parametrize(
    ("extra", "norm"),
    [
        ("", (("up",), "norm", True, 0.0)),
        ("parallel", (("up", "other"), "norm", True, 0.0)),
        ("residual", None),
        ("nonlinear reader", None),
        ("reordered reader", None),
        ("wider reader", None),
    ],
)
def test_a_norm_is_a_site_only_with_all_its_readers(extra: str, norm: tuple[Any, ...] | None) -> None:
    assert summary(find_sites(Toy(extra=extra), X, {})).get("norm") == norm


def test_a_linear_that_never_runs_is_named() -> None:
    with pytest.raises(ValueError, match="did not run these linears of Toy.*: other"):
        find_sites(Toy(extra="unused"), X, {})


def test_one_token_proves_nothing() -> None:
    with pytest.raises(ValueError, match=r"shape \[1, 1, 8\].*two tokens"):
        find_sites(Toy(), X[:, :1], {})


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
    sites = summary(find_sites(block, X, {}))
    assert sites.get("norm") == (None if offset is None else (("up",), "norm", False, offset))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_the_decoder_layers(family: str) -> None:
    lm = tiny_model(family)
    name, blocks = find_blocks(lm)
    assert name == ("model.decoder.layers" if family == "opt" else "model.layers")
    assert blocks is lm.get_submodule(name) and len(blocks) == lm.config.num_hidden_layers
    assert len({structure(block) for block in blocks}) == 1  # sliding or full attention is the same structure


def test_blocks_are_not_the_experts_inside_them() -> None:
    def layer() -> nn.ModuleDict:
        return nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2) for _ in range(9)])})

    model = nn.ModuleDict({"vision": nn.ModuleList([nn.Linear(2, 2)]), "text": nn.ModuleList([layer(), layer()])})
    assert find_blocks(model) == ("text", model["text"])
    assert find_blocks(model["text"]) == ("", model["text"])
    with pytest.raises(ValueError, match="ModuleDict has no .*ModuleList"):
        find_blocks(nn.ModuleDict({"a": nn.ModuleList([nn.LayerNorm(2)])}))


def test_structure_tells_biases_shapes_and_classes_apart() -> None:
    base, same, biasless, wider, other = Toy(), Toy(), Toy(), Toy(), Toy()
    biasless.up = nn.Linear(8, 16, bias=False)
    wider.other = nn.Linear(8, 9)
    other.add_module("norm", nn.GroupNorm(2, 8))
    assert structure(base) == structure(same)
    assert len({structure(block) for block in (base, biasless, wider, other)}) == 4
