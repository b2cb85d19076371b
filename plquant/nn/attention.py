"""Attention whose queries, keys, values and, on demand, softmax probabilities are quantized.

transformers' attention modules call what ``config._attn_implementation`` names, with queries and keys after RoPE and
with whatever the KV cache holds. ``quantize_attention_`` names ours there; it quantizes, then calls the implementation
the model had, with the mask that one would get. So no attention class is copied, and softcapping, sliding windows,
sinks and grouped queries stay the model's own business. A module without quantizer, or with ``enabled = False``, gives
the original's output to the last bit, but for a single token on a CPU (``grouped_attention``).

A cache of transformers keeps keys and values as they come, in floating point, and they are quantized when they are
read. Since the grid of a token and head depends on that token and head alone, the numbers are those of a cache of
integers. One that keeps these (``kv_cache``) hands over bytes in the place of keys and values, as ``to_cache`` made
them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from plquant.nn.grouped_attention import sdpa
from plquant.quant.grid import ActivationGrid
from plquant.quant.token_bytes import tokens_from_bytes, tokens_to_bytes
from plquant.quant.token_quantize import quantize_tokens

PREFIX = "plquant_"  # the name of ours goes on with that of the implementation it calls: plquant_sdpa, plquant_eager
CHILD = "attention_quantizer"

# Letters: B sequences, H heads, H' of keys and values, T queries, S keys, d channels of a head, N bytes of them.


class AttentionQuantizer(nn.Module):
    """Child of an attention module: how its inner activations are quantized.

    Args:
        grid: Widths; queries have ``bits``, keys and values ``kv``.
        heads: Of queries and of keys, together.

    Attributes:
        enabled: ``False`` gives the original attention.
        online: A rotation of every head of queries and keys, [..., d] -> [..., d], before they are rounded; scores do
            not see it. ``None`` for none.
    """

    def __init__(self, grid: ActivationGrid, heads: int) -> None:
        super().__init__()
        self.grid, self.heads = grid, heads
        self.enabled = True
        self.online: nn.Module | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, T, d], [B, H', S, d], [B, H', S, d] -> the same, rounded token by token and head by head.

        Keys and values may be given as ``to_cache`` made them; they come back in the dtype of the queries.
        """
        query = self._rounded(self._rotated(query), self.grid.bits)
        if key.dtype == torch.uint8:
            assert self.grid.kv_bits is not None
            bits, symmetric = self.grid.kv_bits, self.grid.symmetric
            return query, *(tokens_from_bytes(rows, bits, symmetric, query.dtype) for rows in (key, value))  # type: ignore[return-value]
        return query, self._rounded(self._rotated(key), self.grid.kv_bits), self._rounded(value, self.grid.kv_bits)

    def to_cache(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H', S, d] each -> the integers that ``forward`` would round them to, uint8 [B, H', S, N] each."""
        assert self.grid.kv_bits is not None
        bits, symmetric = self.grid.kv_bits, self.grid.symmetric
        return tokens_to_bytes(self._rotated(key), bits, symmetric), tokens_to_bytes(value, bits, symmetric)

    def _rotated(self, x: Tensor) -> Tensor:
        return x if self.online is None else self.online(x)

    def _rounded(self, x: Tensor, bits: int | None) -> Tensor:
        return x if bits is None else quantize_tokens(x, bits, self.grid.symmetric)

    def extra_repr(self) -> str:
        """Widths, for ``print(model)``."""
        return f"{self.grid}"


def quantize_attention_(model: nn.Module, names: Iterable[str], grid: ActivationGrid) -> None:
    """Quantize what happens inside of attention modules.

    The model's configuration, which its blocks share, names our implementation from then on; to name another one
    (``set_attn_implementation``) turns all of this off.

    Args:
        model: A language model, or some blocks of one.
        names: Its attention modules, as ``blocks.attentions`` finds them.
        grid: What to quantize; nothing is done if that is nothing inside of attention.
    """
    if not grid.in_attention:
        return
    for name in names:
        module = model.get_submodule(name)
        config: Any = module.config
        former = config._attn_implementation.removeprefix(PREFIX)
        if former not in ("sdpa", "eager"):
            raise ValueError(
                f"{name} computes attention with {former}, but queries, keys and values can be quantized with sdpa or "
                'eager; load the model with attn_implementation="sdpa"'
            )
        if grid.probabilities is not None:
            _eager(module)  # refuses now
        config._attn_implementation = _registered(former)
        heads = config.num_attention_heads
        heads += getattr(config, "num_key_value_heads", None) or heads
        setattr(module, CHILD, AttentionQuantizer(grid, heads))


def serve_attention_(model: nn.Module) -> None:
    """Let attention that is not quantized, where it is sdpa, be ``grouped_attention``'s on a machine without a GPU.

    It has a name of its own then, which transformers' continuous batching refuses; ``set_attn_implementation("sdpa")``
    gives the model transformers' own again.
    """
    if torch.cuda.is_available():
        return
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = _registered("sdpa")


def _registered(former: str) -> str:
    """Name, in transformers, of the quantized variant of an implementation; its masks are the original's."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = PREFIX + former
    ALL_ATTENTION_FUNCTIONS.register(name, partial(_quantized_attention, former))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[former])
    return name


def _quantized_attention(
    former: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What an attention module calls."""
    quantizer: AttentionQuantizer | None = getattr(module, CHILD, None)
    if quantizer is None or not quantizer.enabled:
        return _implementation(former, module)(module, query, key, value, attention_mask, **kwargs)
    query, key, value = quantizer(query, key, value)
    if quantizer.grid.probabilities is None:
        return _implementation(former, module)(module, query, key, value, attention_mask, **kwargs)
    if former == "sdpa":
        attention_mask = _additive_mask(module, query, key, attention_mask, **kwargs)
    with _QuantizedSoftmax(quantizer.grid.probabilities) as softmax:
        output = _eager(module)(module, query, key, value, attention_mask, **kwargs)
    assert softmax.calls == 1, f"{type(module).__name__} has {softmax.calls} softmax"
    return output


def _implementation(former: str, module: nn.Module) -> Callable[..., Any]:
    if former == "eager":
        return _eager(module)
    return sdpa


def _eager(module: nn.Module) -> Callable[..., Any]:
    """Plain attention as the model's own file defines it."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ValueError(
            f"{type(module).__module__} has no eager_attention_forward, which the softmax probabilities of "
            f"{type(module).__name__} would be quantized in; use --model.activations.probabilities null"
        )
    return eager


def _additive_mask(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None = None, **kwargs: Any
) -> Tensor | None:
    """The mask that sdpa is called with ([B, 1, T, S], boolean, or ``None`` for causal) as plain attention adds it."""
    if mask is None:
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if query.shape[2] == 1 or not is_causal:
            return None
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)


class _QuantizedSoftmax(TorchFunctionMode):
    """Within it the result of a softmax is quantized, row by row, before anything else sees it.

    Args:
        bits: Width; the grid starts at zero, since no probability is below.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.calls = bits, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called in the place of every torch function."""
        result = func(*args, **(kwargs or {}))
        if func not in (F.softmax, torch.softmax, Tensor.softmax):
            return result
        self.calls += 1
        return quantize_tokens(result, self.bits)
