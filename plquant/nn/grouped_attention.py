"""Attention of a token by torch on a CPU, where several heads of queries read one of keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

# Letters: B sequences, H heads, H' of keys and values, S keys, d channels of a head.


def sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls ``sdpa``; on a CPU a token's queries of one key head are the rows of one product.

    Without a mask, and in a compiled forward, transformers leaves it to torch to give every query head keys and values
    of its own: that takes several times as long, the more the longer the context is.

    Args:
        module: The attention module.
        query: [B, H, T, d].
        key: [B, H', S, d].
        value: [B, H', S, d].
        attention_mask: [B, 1 or H, T, S], or ``None``.
        options: What transformers passes on.

    Returns:
        [B, T, H, d], and no weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    (batch, heads, tokens, width), kv_heads = query.shape, key.shape[1]
    shared = attention_mask is None or attention_mask.shape[1] == 1
    plain = not options.get("dropout") and options.get("position_bias") is None and options.get("cache") is None
    if tokens > 1 or heads == kv_heads or not shared or not plain or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows = query.reshape(batch, kv_heads, heads // kv_heads, width)
    output = F.scaled_dot_product_attention(rows, key, value, attention_mask, scale=options.get("scaling"))
    return output.reshape(batch, 1, heads, -1), None
