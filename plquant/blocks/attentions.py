"""Watching attention from outside: which modules call transformers' attention interface, and with what."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from plquant.blocks.sites import Attention

# Called with the module and its queries [B, heads, T, d], keys and values [B, kv_heads, T, d], after RoPE.
Record: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Tensor], None]


@contextlib.contextmanager
def watching_attention(record: Record) -> Iterator[None]:
    """Within it, ``record`` sees every call of the interface, whatever implementation it goes to."""
    from transformers import AttentionInterface  # seconds to import

    get_interface = AttentionInterface.get_interface

    def watched(self: Any, implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        attend = get_interface(self, implementation, default)

        def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            record(module, query, key, value)
            return attend(module, query, key, value, *args, **kwargs)

        return attention

    AttentionInterface.get_interface = watched  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]


@torch.no_grad()
def find_attentions(block: nn.Module, x: Tensor, kwargs: Mapping[str, Any]) -> list[Attention]:
    """The attention modules of a block in the order they run; none if it does not use transformers' interface.

    Args:
        block: Decoder block.
        x: [B, T, H] hidden states, in its dtype and on its device.
        kwargs: The other arguments of a call.
    """
    names = {module: name for name, module in block.named_modules()}
    found: dict[str, Attention] = {}

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        found[names[module]] = Attention(names[module], query.shape[1], key.shape[1], query.shape[3])

    with watching_attention(record):
        block(x, **kwargs)
    return list(found.values())
