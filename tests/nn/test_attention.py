"""Quantized attention, on every family, through transformers' interface."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from plquant.nn.attention import AttentionQuantizer, quantize_attention_
from plquant.quant.grid import ActivationGrid
from plquant.quant.token_quantize import quantize_tokens
from tests.families import FAMILIES, VOCAB, attention_names

T = 12
IDS = torch.randint(3, VOCAB, (2, T), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones(2, T, dtype=torch.long)
PADDED[1, :5] = 0
CASES = [
    *[(family, "sdpa") for family in [*FAMILIES, "mixtral"] if family != "gemma2"],  # whose soft cap sdpa cannot do
    *[(family, "eager") for family in ("llama", "gemma2", "gemma3", "opt")],
]
BITS8 = ActivationGrid(8)


def mixtral(attn_implementation: str) -> PreTrainedModel:
    config = CONFIG_MAPPING["mixtral"](
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()


@functools.cache
def built(family: str, implementation: str) -> PreTrainedModel:
    if family == "mixtral":
        return mixtral(implementation)
    caps = {"attn_logit_softcapping": 0.5} if family == "gemma2" else {}  # low enough to matter
    return FAMILIES[family](attn_implementation=implementation, **caps)


def model(family: str, implementation: str = "sdpa") -> PreTrainedModel:
    return copy.deepcopy(built(family, implementation))


def logits(lm: nn.Module, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return lm(IDS, attention_mask=mask, use_cache=False).logits


def quantized(family: str, implementation: str, grid: ActivationGrid) -> PreTrainedModel:
    lm = model(family, implementation)
    quantize_attention_(lm, attention_names(lm), grid)
    return lm


def switch(lm: nn.Module, enabled: bool) -> None:
    for module in lm.modules():
        if isinstance(module, AttentionQuantizer):
            module.enabled = enabled


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("probabilities", [None, 8])
@pytest.mark.parametrize("mask", [None, PADDED], ids=["no mask", "padding"])
@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_disabled_is_the_original_to_the_last_bit(
    family: str, implementation: str, mask: Tensor | None, probabilities: int | None
) -> None:
    original = logits(model(family, implementation), mask)
    lm = quantized(family, implementation, ActivationGrid(4, probabilities=probabilities))
    assert not torch.equal(logits(lm, mask), original)
    switch(lm, False)
    assert torch.equal(logits(lm, mask), original)


@pytest.mark.parametrize("mask", [None, PADDED], ids=["no mask", "padding"])
@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_more_bits_are_nearer_to_the_original(family: str, implementation: str, mask: Tensor | None) -> None:
    original, kept = logits(model(family, implementation), mask), slice(5, None)  # tokens that are not padding
    errors = [
        distance(logits(quantized(family, implementation, grid), mask)[:, kept], original[:, kept])
        for grid in (BITS8, ActivationGrid(8, probabilities=8), ActivationGrid(3), ActivationGrid(2, probabilities=2))
    ]
    assert 0 < errors[0] < 0.02 and 0 < errors[1] < 0.02  # 0.001 to 0.007
    assert max(errors[:2]) * 5 < min(errors[2:])


class Recorder:
    """Stands in for sdpa; keeps what it was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.integrations import sdpa_attention

        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        sdpa = sdpa_attention.sdpa_attention_forward

        def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls.append((query, key, value))
            return sdpa(module, query, key, value, *args, **kwargs)

        monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", record)


@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "qwen3"])
def test_every_token_and_head_has_its_own_range(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    symmetric = family == "opt"
    lm, recorder = quantized(family, "sdpa", ActivationGrid(3, kv=4, symmetric=symmetric)), Recorder(monkeypatch)
    switch(lm, False)
    logits(lm)
    original = recorder.calls[0]
    recorder.calls.clear()
    switch(lm, True)
    logits(lm)
    for ours, x, bits in zip(recorder.calls[0], original, (3, 4, 4), strict=True):
        assert x.ndim == 4 and x.shape[0] == 2 and x.shape[2] == T
        one_by_one = torch.stack([quantize_tokens(row, bits, symmetric) for row in x.reshape(-1, x.shape[-1])])
        assert torch.equal(ours, one_by_one.view(x.shape))
        over_heads = quantize_tokens(x.transpose(1, 2).flatten(-2), bits, symmetric).unflatten(-1, (-1, x.shape[-1]))
        assert not torch.allclose(ours, over_heads.transpose(1, 2), atol=1e-3)
        over_tokens = quantize_tokens(x.flatten(-2), bits, symmetric).view(x.shape)
        assert not torch.allclose(ours, over_tokens, atol=1e-3)


def test_queries_keys_and_values_have_the_widths_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for grid, widths in (
        (ActivationGrid(2, kv=None), (2, None, None)),
        (ActivationGrid(None, kv=3), (None, 3, 3)),
        (ActivationGrid(4), (4, 4, 4)),
    ):
        lm, recorder = quantized("llama", "sdpa", grid), Recorder(monkeypatch)
        logits(lm)
        for x, bits in zip(recorder.calls[0], widths, strict=True):
            levels = max(len(row.unique()) for row in x.reshape(-1, x.shape[-1]))
            assert levels <= 2**bits if bits else levels == x.shape[-1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "mixtral"])
@pytest.mark.parametrize("probabilities", [None, 8])
def test_gradients_reach_all_projections(family: str, probabilities: int | None) -> None:
    implementation = "eager" if family == "gemma2" else "sdpa"
    lm = quantized(family, implementation, ActivationGrid(8, probabilities=probabilities))
    original = model(family, implementation)
    for m in (lm, original):
        m.requires_grad_(True)
        m(IDS, use_cache=False).logits.square().mean().backward()
    for (name, parameter), (_, expected) in zip(lm.named_parameters(), original.named_parameters(), strict=True):
        assert parameter.grad is not None
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            assert distance(parameter.grad, expected.grad) < 0.3, name


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_probabilities_are_quantized_alike_whatever_the_implementation(family: str) -> None:
    grid = ActivationGrid(None, kv=None, probabilities=3)
    for mask, kept in ((None, slice(None)), (PADDED, slice(5, None))):
        through_sdpa = logits(quantized(family, "sdpa", grid), mask)[:, kept]
        through_eager = logits(quantized(family, "eager", grid), mask)[:, kept]
        assert distance(through_sdpa, through_eager) < 1e-5
        assert distance(through_sdpa, logits(model(family), mask)[:, kept]) > 1e-2


def test_probabilities_have_their_own_range_per_query_and_head() -> None:
    lm = quantized("llama", "eager", ActivationGrid(None, kv=None, probabilities=3))
    with torch.no_grad():
        lm.config._attn_implementation = "eager"
        original = lm(IDS, output_attentions=True, use_cache=False).attentions[0]
        lm.config._attn_implementation = "plquant_eager"
        ours: list[Tensor] = []
        lm.model.layers[0].self_attn.register_forward_hook(lambda _, args, out: ours.append(out[1]))
        lm(IDS, use_cache=False)
    assert torch.equal(ours[0], quantize_tokens(original, 3))
    assert not torch.equal(ours[0], original) and (ours[0].triu(1) == 0).all()


@pytest.mark.parametrize(("family", "implementation"), [("llama", "sdpa"), ("mistral", "sdpa"), ("gemma2", "eager")])
def test_a_cache_gives_the_logits_of_the_whole_text(family: str, implementation: str) -> None:
    lm = quantized(family, implementation, ActivationGrid(3))
    with torch.no_grad():
        whole = lm(IDS, use_cache=False).logits
        first = lm(IDS[:, : T - 3], use_cache=True)
        cache, steps = first.past_key_values, [first.logits]
        for i in range(T - 3, T):
            steps.append(lm(IDS[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_generation_runs() -> None:
    lm = quantized("llama", "sdpa", ActivationGrid(4, probabilities=8))
    assert lm.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, T + 3)


def test_the_configuration_that_is_saved_knows_nothing_of_it(tmp_path: Any) -> None:
    lm = quantized("llama", "sdpa", BITS8)
    lm.config.save_pretrained(tmp_path)
    assert "plquant" not in (tmp_path / "config.json").read_text()


def test_quantizing_again_replaces() -> None:
    lm = quantized("llama", "sdpa", ActivationGrid(2))
    quantize_attention_(lm, ["model.layers.0.self_attn", "model.layers.1.self_attn"], BITS8)
    assert lm.config._attn_implementation == "plquant_sdpa"
    assert torch.equal(logits(lm), logits(quantized("llama", "sdpa", BITS8)))


def test_other_implementations_are_refused() -> None:
    lm = model("llama")
    lm.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="layers.0.self_attn computes attention with flex_attention.*sdpa"):
        quantize_attention_(lm, ["model.layers.0.self_attn"], BITS8)
    assert not any(isinstance(m, AttentionQuantizer) for m in lm.modules())


def test_probabilities_without_plain_attention_are_refused() -> None:
    class Attention(nn.Module):
        config = model("llama").config

    with pytest.raises(ValueError, match="no eager_attention_forward.*--model.activations.probabilities null"):
        quantize_attention_(nn.Sequential(Attention()), ["0"], ActivationGrid(4, probabilities=8))
