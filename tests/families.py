"""Tiny random models, one per family of architectures, nothing in them at a value that hides mistakes; a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from plquant.architectures.moe import unfuse_experts_
from plquant.nn.packed_linear import PackedLinear

VOCAB = 96
HIDDEN = 64

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Gemma attends over 4 tokens in every other layer; its heads are, as in the real ones, not hidden / num_heads wide.
_GEMMA: dict[str, Any] = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_mha": ("llama", {"num_key_value_heads": 4, "intermediate_size": HIDDEN}),
    "llama_mqa": ("llama", {"num_key_value_heads": 1, "hidden_size": 32, "num_hidden_layers": 3}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", _GEMMA),
    "phi3": ("phi3", {}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": HIDDEN}),
    "starcoder2": ("starcoder2", {}),  # biases everywhere, and RoPE
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.25}),
    "glm": ("glm", {"head_dim": 16}),  # RoPE turns neighbours, in one half of a head
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "num_experts": 8, "head_dim": 8}),
}


def stock(folder: str | Path) -> PreTrainedModel:
    """A folder opened by transformers' own quantizer, which ``import plquant`` does not replace where one is named."""
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=CompressedTensorsConfig()).eval()


def attention_names(lm: nn.Module) -> list[str]:
    """Names of a model's attention modules, the same in all families."""
    return [name for name, _ in lm.named_modules() if name.endswith(".self_attn")]


def tiny_model(family: str, seed: int = 0, fused: bool = False, **overrides: Any) -> PreTrainedModel:
    """A model of this family in evaluation mode, fp32, with every parameter random; the global RNG is left alone.

    Args:
        family: Key of ``FAMILIES``.
        seed: Of the parameters.
        fused: Leave experts as transformers stores them.
        overrides: Of the transformers config, or ``attn_implementation``, ``experts_implementation``.
    """
    model_type, family_config = _CONFIGS[family]
    implementations = {
        key: overrides.pop(key) for key in ("attn_implementation", "experts_implementation") if key in overrides
    }
    config = _COMMON | family_config | overrides
    if "layer_types" in config:
        kinds = config["layer_types"]
        config["layer_types"] = [kinds[i % len(kinds)] for i in range(config["num_hidden_layers"])]
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**config), **implementations)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=p.shape[-1] ** -0.5, generator=generator)
            else:  # around where it starts: gains 1 (or 0 where the norm adds the 1), biases 0
                p.add_(torch.empty_like(p).uniform_(-0.5, 0.5, generator=generator))
    if not fused:
        unfuse_experts_(model)
    return model.float().eval()


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {family: partial(tiny_model, family) for family in _CONFIGS}

BOS, EOS, VOCABULARY = 256, 257, 258


def byte_tokenizer(bos: bool = False, **options: Any) -> Any:
    """One token per byte of UTF-8, then BOS and EOS; ``bos`` puts BOS before every text."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", model_max_length=16, **options)


def prepare_linears_(lm: nn.Module) -> None:
    """Lay all packed linears out for the kernels of their devices."""
    for module in lm.modules():
        if isinstance(module, PackedLinear):
            module.prepare_()
