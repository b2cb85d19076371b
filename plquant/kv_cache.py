"""KV caches of integers, for models whose keys and values are quantized.

Keys and values of a token and head become one row of bytes, codes and scale, as the model's own attention rounds them,
and transformers' layers keep these as they would keep numbers: growing or of a fixed length, with windows or without.
Attention gets the bytes and gives the values the model was evaluated with, to the bit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from plquant.nn.attention import CHILD, AttentionQuantizer


class _OfIntegers(Cache):
    """A cache whose layers keep bytes; that of an attention module without quantizer keeps numbers."""

    quantizers: dict[int, AttentionQuantizer]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """[B, H', T, d] each -> of all tokens, uint8 [B, H', S, N] each."""
        if layer_idx in self.quantizers:
            key_states, value_states = self.quantizers[layer_idx].to_cache(key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class IntegerCache(_OfIntegers, DynamicCache):
    """One that grows."""


class StaticIntegerCache(_OfIntegers, StaticCache):
    """One of a fixed length, which a compiled step needs."""


def integer_cache(lm: PreTrainedModel, max_cache_len: int | None = None) -> Cache:
    """A KV cache of integers for a model that quantizes its keys and values, to be its ``past_key_values``.

    Args:
        lm: The model, from ``plquant.load``.
        max_cache_len: Tokens at most, for which there is room from the start; a cache that grows if not given.

    Raises:
        ValueError: The model does not quantize its keys and values.
    """
    quantizers = _quantizers(lm)
    if not quantizers:
        raise ValueError(
            "this model keeps keys and values in floating point, and so does its cache; for integers calibrate with "
            "--model.activations.kv 2 to 8"
        )
    cache = (
        IntegerCache(config=lm.config)
        if max_cache_len is None
        else StaticIntegerCache(config=lm.config, max_cache_len=max_cache_len)
    )
    cache.quantizers = quantizers
    return cache


def quantizes_keys(lm: PreTrainedModel) -> bool:
    """Whether a model quantizes its keys and values, so that there is an ``integer_cache`` for it."""
    return bool(_quantizers(lm))


def _quantizers(lm: PreTrainedModel) -> dict[int, AttentionQuantizer]:
    """By the number of the layer."""
    found = {}
    for module in lm.modules():
        quantizer = getattr(module, CHILD, None)
        if isinstance(quantizer, AttentionQuantizer) and quantizer.grid.kv_bits is not None:
            index: Any = module.layer_idx
            found[index] = quantizer
    return found
