"""Blocks and sites are found without names, and only where folding changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from plquant.blocks.discovery import find_blocks, find_places, find_sites, structure
from plquant.blocks.prepare import prepare_blocks
from plquant.blocks.proof import Proof, _AllDouble
from plquant.blocks.sites import QuerySite, Site
from plquant.blocks.stream import rotate_stream_
from plquant.quant.grid import ActivationGrid, IntGrid
from plquant.quant.scaled_weight import ScaledWeight
from plquant.transforms.scale_shift import ScaleShift
from tests.blocks.prepared import NUM_TOKENS, READINGS, Toy, X, places_of, prepare, prepared
from tests.families import FAMILIES, VOCAB, tiny_model

ALL = slice(None)
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
O, DOWN = ("self_attn.o_proj",), ("mlp.down_proj",)  # noqa: E741

# source -> all that a site says about it, but the channels and the error
Expected = dict[str, dict[str, Any]]


def says(consumers: tuple[str, ...], **others: Any) -> dict[str, Any]:
    """What is not named is as in Llama's norms."""
    plain = {"admits_shift": False, "gain_offset": 0.0, "rows": ALL, "head_dim": None, "kept": set()}
    return {"consumers": set(consumers), **plain, **others}


def experts(count: int, shared: tuple[str, ...] = (), kept: set[str] | None = None) -> Expected:
    """From a mixture's norm on."""
    roots = [f"mlp.experts.{i}" for i in range(count)] + list(shared)
    readers = tuple(f"{root}.{name}" for root in roots for name in ("gate_proj", "up_proj"))
    norm: Expected = {"post_attention_layernorm": says(readers, kept=kept or {"mlp.gate"})}
    return norm | {f"{root}.up_proj": says((f"{root}.down_proj",)) for root in roots}


def llama(head_dim: int = 16, norm: str = "post_attention_layernorm", offset: float = 0.0) -> Expected:
    return {
        "input_layernorm": says(QKV, gain_offset=offset),
        "self_attn.v_proj": says(O, head_dim=head_dim),
        norm: says(GATE_UP, gain_offset=offset),
        "mlp.up_proj": says(DOWN),
    }


ATTENTION: Expected = {"input_layernorm": says(QKV), "self_attn.v_proj": says(O, head_dim=16)}
FUSED_MLP: Expected = {
    "post_attention_layernorm": says(("mlp.gate_up_proj",)),
    "mlp.gate_up_proj": says(DOWN, rows=slice(96, 192)),
}
GEMMA = llama(head_dim=8, norm="pre_feedforward_layernorm", offset=1.0)
SITES: dict[str, Expected] = {
    "llama": llama(),
    "llama_mha": llama(),
    "llama_mqa": llama(head_dim=8),
    "mistral": llama(),
    "qwen2": llama(),
    "qwen3": llama(head_dim=8),
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "phi3": {
        "input_layernorm": says(("self_attn.qkv_proj",)),
        "self_attn.qkv_proj": says(O, rows=slice(96, 128), head_dim=16),
        **FUSED_MLP,
    },
    "opt": {
        "self_attn_layer_norm": says(QKV, admits_shift=True),
        "self_attn.v_proj": says(("self_attn.out_proj",), admits_shift=True, head_dim=16),
        "final_layer_norm": says(("fc1",), admits_shift=True),
        "fc1": says(("fc2",)),  # ReLU commutes with a positive scale, not with a shift, not with a matrix
    },
    "starcoder2": {
        "input_layernorm": says(QKV, admits_shift=True),
        "self_attn.v_proj": says(O, admits_shift=True, head_dim=16),
        "post_attention_layernorm": says(("mlp.c_fc",), admits_shift=True),  # GELU lets nothing pass
    },
    "stablelm": llama(),
    "glm": {**ATTENTION, **FUSED_MLP},
    "mixtral": {**ATTENTION, **experts(4)},
    "qwen2_moe": {**ATTENTION, **experts(4, ("mlp.shared_expert",), {"mlp.gate", "mlp.shared_expert_gate"})},
    "qwen3_moe": {**ATTENTION, **experts(8), "self_attn.v_proj": says(O, head_dim=8)},
}


def summary(sites: Any) -> Expected:
    """What the tests compare."""
    return {
        site.source: {
            "consumers": set(site.consumers),
            "admits_shift": site.admits_shift,
            "gain_offset": site.gain_offset,
            "rows": site.rows,
            "head_dim": site.head_dim,
            "kept": set(site.kept),
        }
        for site in sites
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_of_a_family_is_found_and_no_other(family: str) -> None:
    for places in places_of(family):
        assert summary(places.sites) == SITES[family]
        assert {site.source for site in places.sites if site.kind == "norm"} == {
            n for n in SITES[family] if "norm" in n
        }
        if "moe" not in family and family != "mixtral":  # experts run in the order in which tokens come to them
            assert [site.source for site in places.sites] == list(SITES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_proofs_hold_to_float64_although_norms_and_softmax_compute_in_fp32(family: str) -> None:
    errors = [site.error for places in places_of(family) for site in (*places.sites, *places.query_sites)]
    assert max(errors) < 1e-13  # measured 1e-16 to 1e-15


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_everywhere_leaves_the_logits_of_the_real_model(family: str) -> None:
    lm = tiny_model(family, seed=1, attn_implementation="eager").double()
    ids = torch.randint(3, VOCAB, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    _, blocks = find_blocks(lm)
    with torch.no_grad(), _AllDouble():
        before = lm(ids).logits
        for block, places in zip(blocks, places_of(family), strict=True):
            for site in places.sites:
                fold_scale_(block, site, generator)
                fold_matrix_(block, site, generator)
            for query_site in places.query_sites:
                fold_query_(block, query_site, generator)
        after = lm(ids).logits
    assert (after - before).norm() / before.norm() < 1e-9  # measured 1e-15


def fold_scale_(block: nn.Module, site: Site, generator: torch.Generator) -> None:
    """Fold a random scale, and shift where admitted, in place."""
    weight, bias = parameters(block, site.source, site.rows)
    transform = ScaleShift(len(weight), site.channel, site.admits_shift).double()
    for parameter in transform.parameters():
        parameter.uniform_(-0.7, 0.7, generator=generator)
    if weight.ndim == 1:
        copy_((weight, bias), transform.write_norm(weight, bias, site.gain_offset))
    else:
        copy_((weight, bias), (transform.write_weight(ScaledWeight(weight)).dense(), transform.write_bias(bias)))
    for name in site.readers:
        weight, bias = parameters(block, name)
        new_bias = transform.read_bias(weight, bias)
        copy_((weight, bias), (transform.read_weight(ScaledWeight(weight)).dense(), new_bias))


def fold_matrix_(block: nn.Module, site: Site, generator: torch.Generator) -> None:
    """Fold a random matrix for each head where admitted, in place."""
    if site.head_dim is None:
        return
    weight, bias = parameters(block, site.source, site.rows)
    n = site.head_dim
    matrices = torch.randn(len(weight) // n, n, n, dtype=torch.float64, generator=generator) + 3 * torch.eye(n)
    for head, matrix in enumerate(matrices):
        channels = slice(head * n, (head + 1) * n)
        weight[channels] = matrix @ weight[channels]
        if bias is not None:
            bias[channels] = matrix @ bias[channels]
    for name in site.readers:
        weight, _ = parameters(block, name)
        for start in range(0, len(site.channel), n):
            weight[:, start : start + n] @= matrices[int(site.channel[start]) // n].inverse()


def fold_query_(block: nn.Module, site: QuerySite, generator: torch.Generator) -> None:
    """Fold a random complex number per key head and pair and a positive one per free channel, in place."""
    kv_heads, heads = (1, 1) if site.kind == "norm" else (site.kv_heads, site.heads)
    numbers = torch.empty(kv_heads, len(site.pairs) + len(site.free), dtype=torch.float64)
    numbers = numbers.uniform_(0.5, 2, generator=generator).to(torch.complex128)
    if site.kind == "linear":
        angle = torch.rand(kv_heads, len(site.pairs), dtype=torch.float64, generator=generator)
        numbers[:, : len(site.pairs)] *= torch.exp(6j * angle)
    for name, rows, count in ((site.query, site.query_rows, heads), (site.key, site.key_rows, kv_heads)):
        for values in parameters(block, name, rows):
            if values is None:
                continue
            per_head = (values + site.gain_offset).unflatten(0, (count, site.head_dim))
            for head in range(count):
                number = numbers[head * kv_heads // count]
                number = number if name == site.query and rows == site.query_rows else 1 / number.conj()
                for (real, imaginary), factor in zip(site.pairs.tolist(), number, strict=False):
                    turned = factor * torch.complex(per_head[head, real], per_head[head, imaginary])
                    if site.kind == "norm":
                        per_head[head, real] *= factor.real
                        per_head[head, imaginary] *= factor.real
                    else:
                        per_head[head, real], per_head[head, imaginary] = turned.real, turned.imag
                for channel, factor in zip(site.free.tolist(), number[len(site.pairs) :], strict=True):
                    per_head[head, channel] *= factor.real
            values.copy_(per_head.flatten(0, 1) - site.gain_offset)


def parameters(block: nn.Module, name: str, rows: slice = ALL) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a module, or views of some of their rows."""
    module = block.get_submodule(name)
    bias = getattr(module, "bias", None)
    return module.get_parameter("weight")[rows], None if bias is None else bias[rows]


def copy_(into: tuple[Tensor, Tensor | None], values: tuple[Tensor, Tensor | None]) -> None:
    for tensor, value in zip(into, values, strict=True):
        if tensor is not None and value is not None:
            tensor.copy_(value)


def test_norms_behind_the_residual_sum_are_no_sites() -> None:
    """OPT-350m: what a norm writes goes on in the residual stream too."""
    lm = tiny_model("opt", do_layer_norm_before=False, word_embed_proj_dim=32)
    blocks, x, calls = prepare(lm)
    for block, call in zip(blocks, calls, strict=True):
        places = find_places(block, x, call)
        assert summary(places.sites) == {name: SITES["opt"][name] for name in ("self_attn.v_proj", "fc1")}
        assert max(site.error for site in (*places.sites, *places.query_sites)) < 1e-13
        assert len(places.query_sites) == 1
    proof = Proof(blocks[0], x, calls[0])
    forced = Site("self_attn_layer_norm", ("fc1",), torch.arange(64), "norm", False, 0.0)
    assert proof.error(forced) > 1e-2
    with pytest.raises(ValueError, match="does not fold into the blocks of OPTForCausalLM"):
        rotate_stream_(lm, torch.arange(3, 19)[None])


@pytest.mark.parametrize(("family", "num_kv_heads"), [("llama", 2), ("llama_mha", 4), ("llama_mqa", 1), ("qwen3", 2)])
def test_channel_repeats_the_value_heads_of_a_query_group(family: str, num_kv_heads: int) -> None:
    for site in places_of(family)[0].sites:
        width = len(prepared(family)[0][0].get_parameter(f"{site.source}.weight"))
        expected = torch.arange(width)
        if site.source == "self_attn.v_proj":
            expected = expected.view(num_kv_heads, -1).repeat_interleave(4 // num_kv_heads, 0).flatten()
        assert site.channel.dtype == torch.int64
        assert torch.equal(site.channel, expected)


def test_channel_counts_within_the_rows_of_a_fused_source() -> None:
    value, up = (site for site in places_of("phi3")[0].sites if site.rows != ALL)
    assert torch.equal(value.channel, torch.arange(32).view(2, 16).repeat_interleave(2, 0).flatten())
    assert torch.equal(up.channel, torch.arange(96))


@settings(max_examples=10, deadline=None)
@given(num_kv_heads=st.integers(1, 3), group=st.integers(1, 3), head_dim=st.sampled_from([2, 4, 6]))
def test_head_sizes_are_found(num_kv_heads: int, group: int, head_dim: int) -> None:
    heads = {"num_attention_heads": num_kv_heads * group, "num_key_value_heads": num_kv_heads, "head_dim": head_dim}
    blocks, x, calls = prepare(tiny_model("llama", num_hidden_layers=1, hidden_size=36, **heads))
    places = find_places(blocks[0], x, calls[0])
    (site,) = (site for site in places.sites if site.source == "self_attn.v_proj")
    expected = torch.arange(num_kv_heads * head_dim).view(num_kv_heads, head_dim).repeat_interleave(group, 0).flatten()
    assert torch.equal(site.channel, expected)
    assert site.head_dim == head_dim
    (query_site,) = places.query_sites
    found = query_site.heads, query_site.kv_heads, query_site.head_dim
    assert found == (num_kv_heads * group, num_kv_heads, head_dim)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "qwen2_moe"])
def test_a_bf16_model_is_proven_in_float64_and_left_as_it_was(family: str) -> None:
    lm = tiny_model(family).bfloat16().train()
    lm.get_submodule(find_blocks(lm)[0])[0].requires_grad_(False)
    blocks, x, calls = prepare(lm)
    fired = []
    handle = blocks[0].register_forward_hook(lambda *args: fired.append(args))
    before = copy.deepcopy(lm.state_dict())
    rng = torch.get_rng_state()

    places = find_places(blocks[0], x, calls[0])

    assert summary(places.sites) == SITES[family]
    assert max(site.error for site in (*places.sites, *places.query_sites)) < 1e-13
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
    assert [site.error for site in again] == [site.error for site in places_of("llama")[0].sites]


def test_autocast_of_the_caller_does_not_reach_the_proof() -> None:
    blocks, x, calls = prepared("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert max(site.error for site in find_sites(blocks[0], x, calls[0])) < 1e-13


@given(
    st.sampled_from(
        [
            (F.relu, True, False, None),
            (F.leaky_relu, True, False, None),
            (lambda x: x, True, True, 16),
            (lambda x: 3 * x, True, False, 16),
            (lambda x: x.unflatten(-1, (2, 8)).flip(-2).flatten(-2), True, True, 8),
            (F.silu, False, False, None),
            (F.gelu, False, False, None),
            (torch.tanh, False, False, None),
            (lambda x: F.relu(x).square(), False, False, None),  # Nemotron
            (lambda x: x.softmax(-1), False, False, None),
        ]
    )
)
@settings(deadline=None)
def test_linear_to_linear_needs_an_activation_that_commutes(case: tuple[Any, bool, bool, int | None]) -> None:
    # 3 x: a consumer's input is 3 times the channel, but moves by the channel's factor; the shift is then 3 times too
    # small, so the proof refuses it
    activation, scales, shifts, head_dim = case
    sites = summary(find_sites(Toy(activation), X, {}))
    assert sites["norm"] == says(("up",), admits_shift=True)
    assert sites.get("up") == (says(("down",), admits_shift=shifts, head_dim=head_dim) if scales else None)


@pytest.mark.parametrize(
    ("extra", "norm"),
    [
        ("", says(("up",), admits_shift=True)),
        ("parallel", says(("up", "other"), admits_shift=True)),
        ("residual", None),
        ("nonlinear reader", None),
        ("reordered reader", None),
        ("wider reader", None),
    ],
)
def test_a_norm_is_a_site_only_with_all_its_readers(extra: str, norm: dict[str, Any] | None) -> None:
    assert summary(find_sites(Toy(extra=extra), X, {})).get("norm") == norm


class Product(nn.Module):
    """x + down(gate * up) with gate and up from one linear, one of them rectified, the other as it is or squared."""

    def __init__(self, order: int, square: bool = False) -> None:
        super().__init__()
        self.order, self.square = order, square
        self.fused, self.down = nn.Linear(8, 32, bias=False), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H] to [B, T, H]."""
        gate, up = self.fused(x).chunk(2, -1)[:: self.order]
        return x + self.down(gate.sigmoid() * (up.square() if self.square else up))


def test_of_a_fused_linear_the_half_that_passes_is_the_source() -> None:
    assert summary(find_sites(Product(1), X, {})) == {"fused": says(("down",), rows=slice(16, 32))}
    assert summary(find_sites(Product(-1), X, {})) == {"fused": says(("down",), rows=slice(0, 16))}
    assert not find_sites(Product(1, square=True), X, {})


def test_a_linear_that_never_runs_is_named() -> None:
    with pytest.raises(ValueError, match="did not run these linears of Toy.*: other"):
        find_sites(Toy(extra="unused"), X, {})


def test_one_token_proves_nothing() -> None:
    with pytest.raises(ValueError, match=r"shape \[1, 1, 8\].*two tokens"):
        find_sites(Toy(), X[:, :1], {})


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


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_prepared_blocks_carry_the_places_of_their_layers(family: str) -> None:
    lm = tiny_model(family, num_hidden_layers=3)
    ids = torch.randint(3, VOCAB, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    blocks = prepare_blocks(lm, IntGrid(4, 16), ids, ActivationGrid(4), blocks_per_fit=2)
    assert [len(block.sites) for block in blocks] == [2 * len(SITES[family]), len(SITES[family])]
    keys = [[site.key for site in block.query_sites] for block in blocks]
    assert keys == [["0.self_attn.k_proj", "1.self_attn.k_proj"], ["2.self_attn.k_proj"]]
    assert [list(block.structure().attention) for block in blocks] == [["0.self_attn", "1.self_attn"], ["2.self_attn"]]
    for block in blocks:
        for site in block.sites:
            assert block.num_channels(site) == int(site.channel.max()) + 1
            assert all(name in block.linears for name in site.consumers)
            assert not any(name in block.linears for name in site.kept)
            assert all(block.layers.get_submodule(name) is not None for name in (site.source, *site.kept))


def test_a_site_is_direct_where_its_readers_take_the_very_tensor() -> None:
    assert [site.direct for site in find_sites(Toy(extra="parallel"), X, {}) if site.kind == "norm"] == [True]
    assert [site.direct for site in places_of("llama")[0].sites] == [True, False, True, False]


@pytest.mark.parametrize("extra", READINGS)
def test_a_site_is_not_direct_where_anything_else_looks_at_it(extra: str) -> None:
    """Linears would be given bytes instead, with other dtypes and widths."""
    assert [site.direct for site in find_sites(Toy(extra=extra), X, {}) if site.kind == "norm"] == [False]
