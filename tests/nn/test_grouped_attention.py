"""A token's attention is that of transformers, whoever asks; anything else is left to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations import sdpa_attention

import plquant as pq
from plquant.nn import attention
from plquant.nn.grouped_attention import sdpa
from tests.test_packed_model import IDS, packed, save


class Attention(nn.Module):
    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


MASKS = {
    "none": None,
    "boolean": torch.rand(2, 1, 1, 40, generator=torch.Generator().manual_seed(0)) > 0.3,
    "added": torch.randn(2, 1, 1, 40, generator=torch.Generator().manual_seed(1)),
    "of each head": torch.randn(2, 6, 1, 40, generator=torch.Generator().manual_seed(2)),
}


def operands(kv_heads: int, tokens: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(kv_heads)
    query = torch.randn(2, 6, tokens, 16, generator=generator)
    key, value = torch.randn(2, 2, kv_heads, 40, 16, generator=generator)
    return query, key, value


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every call that transformers' own function gets from ours."""
    calls: list[int] = []
    own = sdpa_attention.sdpa_attention_forward
    monkeypatch.setattr(
        sdpa_attention,
        "sdpa_attention_forward",
        lambda module, query, *rest, **options: calls.append(query.shape[2]) or own(module, query, *rest, **options),
    )
    return calls


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_a_token_attends_as_in_transformers(kv_heads: int, mask: str, theirs: list[int]) -> None:
    module, options = Attention(6 // kv_heads), {"scaling": 0.3, "dropout": 0.0}
    output, weights = sdpa(module, *operands(kv_heads), MASKS[mask], **options)
    assert theirs == ([1] if kv_heads == 6 or mask == "of each head" else [])
    expected, _ = sdpa_attention.sdpa_attention_forward(module, *operands(kv_heads), MASKS[mask], **options)
    assert output.shape == (2, 1, 6, 16) and weights is None
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    torch.compiler.reset()  # it has seen it with other operands
    run = torch.compile(sdpa, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(run(module, *operands(kv_heads), MASKS[mask], **options)[0], output)


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"position_bias": torch.zeros(1, 6, 1, 40)}], ids=str)
def test_what_is_more_than_that_is_for_transformers(options: dict[str, Any], theirs: list[int]) -> None:
    sdpa(Attention(3), *operands(2), None, **options)
    sdpa(Attention(3), *operands(2, 40), None)
    assert theirs == [1, 40]


def test_a_loaded_model_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = save(packed("llama", torch.float32), tmp_path / "quantized")
    ours, found = [], []
    monkeypatch.setattr(
        attention, "sdpa", lambda module, *given, **options: ours.append(module) or sdpa(module, *given, **options)
    )
    for kernels in (True, False):
        lm = pq.load(folder, kernels=kernels)
        with torch.no_grad():
            cache = lm(IDS, use_cache=True).past_key_values
            ours.clear()
            found.append(lm(IDS[:, :1], past_key_values=cache).logits)
        assert len(ours) == (2 if kernels else 0)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gpu", [False, True])
def test_transformers_own_is_left_where_there_is_a_gpu_and_comes_back_by_name(
    gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    lm = pq.load(save(packed("llama", torch.float32), tmp_path / "quantized"))
    assert lm.config._attn_implementation == ("sdpa" if gpu else "plquant_sdpa")
    lm.set_attn_implementation("sdpa")
    assert lm.config._attn_implementation == "sdpa" and lm(IDS).logits.isfinite().all()
