"""A cache of integers gives the numbers of a cache of floating-point keys and values, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

import plquant as pq
from plquant.cli import main
from plquant.generation import generate
from plquant.nn.attention import AttentionQuantizer, quantize_attention_
from plquant.nn.online import attach_online_
from plquant.quant.grid import ActivationGrid
from tests.families import VOCAB, attention_names, byte_tokenizer, tiny_model
from tests.online_op import Mix
from tests.test_packed_model import packed, save

IDS = torch.randint(3, VOCAB, (2, 14), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
FAMILIES = ["llama", "opt", "gemma2", "gemma3", "mistral", "phi3", "qwen3", "starcoder2"]


def quantized(family: str, grid: ActivationGrid, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    lm = tiny_model(family).to(dtype)
    quantize_attention_(lm, attention_names(lm), grid)
    return lm


@torch.no_grad()
def logits(lm: nn.Module, cache: Cache) -> Tensor:
    """Of nine tokens at once, and of the rest one by one."""
    steps = [lm(IDS[:, :9], attention_mask=MASK[:, :9], past_key_values=cache, use_cache=True).logits]
    for end in range(10, IDS.shape[1] + 1):
        steps.append(lm(IDS[:, end - 1 : end], attention_mask=MASK[:, :end], past_key_values=cache).logits)
    return torch.cat(steps, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_a_cache_of_numbers(family: str, dtype: torch.dtype) -> None:
    """With and without windows, which are shorter than this text, and with padding on the left."""
    lm = quantized(family, ActivationGrid(8, kv=3), dtype)
    assert torch.equal(logits(lm, pq.integer_cache(lm)), logits(lm, DynamicCache(config=lm.config)))
    fixed = logits(lm, pq.integer_cache(lm, IDS.shape[1]))
    assert torch.equal(fixed, logits(lm, StaticCache(config=lm.config, max_cache_len=IDS.shape[1])))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_at_every_width_and_with_rotated_keys(bits: int, symmetric: bool) -> None:
    lm = quantized("llama", ActivationGrid(None, kv=bits, symmetric=symmetric))
    plain = logits(lm, pq.integer_cache(lm))
    for seed, module in enumerate(m for m in lm.modules() if isinstance(m, AttentionQuantizer)):
        attach_online_(module, [Mix.random(lm.config.head_dim, seed)])
    found = logits(lm, pq.integer_cache(lm))
    assert torch.equal(found, logits(lm, DynamicCache(config=lm.config))) and not torch.equal(found, plain)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_it_holds_the_bits_of_the_run_and_a_scale_and_zero_point(bits: int) -> None:
    lm = quantized("llama", ActivationGrid(8, kv=bits), torch.bfloat16)
    for cache in (pq.integer_cache(lm), pq.integer_cache(lm, IDS.shape[1])):
        logits(lm, cache)
        for layer in cache.layers:
            for kept in (layer.keys, layer.values):
                heads = (2, lm.config.num_key_value_heads, IDS.shape[1])
                assert kept.dtype == torch.uint8 and kept.shape == (*heads, lm.config.head_dim * bits // 8 + 5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_transformers_generates_the_same_text(options: dict[str, int]) -> None:
    lm = quantized("mistral", ActivationGrid(4))
    lm.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    options |= {"max_new_tokens": 8, "do_sample": False}
    expected = lm.generate(IDS, attention_mask=MASK, **options)
    for room in (None, 22):
        cache = pq.integer_cache(lm, room)
        assert torch.equal(lm.generate(IDS, attention_mask=MASK, past_key_values=cache, **options), expected)


def steps(lm: PreTrainedModel, **options: bool) -> Tensor:
    lm.generation_config = GenerationConfig(eos_token_id=None)
    return torch.stack([*generate(lm, IDS, MASK, 8, **options)], 1)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_lean_loop_generates_the_same_text(family: str) -> None:
    lm = quantized(family, ActivationGrid(4))
    assert torch.equal(steps(lm, integers=True), steps(lm))


@pytest.mark.slow
def test_a_compiled_step_generates_the_same_text() -> None:
    lm = quantized("llama", ActivationGrid(4))
    assert torch.equal(steps(lm, integers=True, compiled=True), steps(lm))


@pytest.mark.parametrize("grid", [None, ActivationGrid(8, kv=None), ActivationGrid(None, kv=None, probabilities=8)])
def test_a_model_without_quantized_keys_has_none(grid: ActivationGrid | None) -> None:
    lm = tiny_model("llama") if grid is None else quantized("llama", grid)
    with pytest.raises(ValueError, match="keeps keys and values in floating point.*--model.activations.kv 2 to 8"):
        pq.integer_cache(lm)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    texts, made = [], []
    kept = pq.integer_cache
    monkeypatch.setattr("plquant.kv_cache.integer_cache", lambda *args: made.append(1) or kept(*args))
    for name, activations in (("kv4", ActivationGrid(None, kv=4)), ("kv16", None)):
        folder = save(packed(dtype=torch.float32, activations=activations), tmp_path / name, activations)
        byte_tokenizer().save_pretrained(folder)
    line = ["generate", str(tmp_path / "kv4"), "--prompt", "!", "--max_new_tokens", "5", "--device", "cpu"]
    for option in (["--kv_cache", "float"], ["--kv_cache", "integer"], []):
        main([*line, *option])
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1 and len(made) == 2
    main(["generate", str(tmp_path / "kv16"), "--prompt", "!", "--max_new_tokens", "2", "--device", "cpu"])
    assert len(made) == 2
    with pytest.raises(
        SystemExit, match="--kv_cache=integer: .*kv16 keeps keys and values in floating point; choose fl"
    ):
        main(["generate", str(tmp_path / "kv16"), "--prompt", "!", "--kv_cache", "integer"])
    path = tmp_path / "kv16" / "config.json"
    foreign = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    path.write_text(json.dumps(foreign))
    for option in ([], ["--kv_cache", "integer"]):
        with pytest.raises(SystemExit, match="not in the format that plquant reads"):
            main(["generate", str(tmp_path / "kv16"), "--prompt", "!", "--device", "cpu", *option])
