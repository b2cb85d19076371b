"""Greedy generation in a lean loop: a static KV cache, one forward a token, nothing else.

transformers' ``generate`` works with our models as well; what it does around each forward costs as much as a small
model's forward itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Letters: B sequences, T tokens of the longest prompt.


def end_tokens(lm: PreTrainedModel) -> list[int]:
    """The tokens that end a text, as the model's generation config says."""
    end = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    return [] if end is None else [end] if isinstance(end, int) else list(end)


@torch.inference_mode()
def generate(
    lm: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    compiled: bool = False,
    integers: bool = False,
) -> Iterator[Tensor]:
    """The likeliest token of every sequence, one after the other, until all have ended.

    Args:
        lm: The model.
        ids: int64 [B, T], shorter prompts padded on the left.
        mask: int64 [B, T], 0 where padded.
        max_new_tokens: How many at most.
        compiled: Compile the forward of one token (takes about a minute and a C++ compiler).
        integers: Keep keys and values as integers, where the model quantizes them.

    Yields:
        int64 [B]; a sequence that has ended repeats its end.

    Raises:
        ValueError: ``integers`` of a model that does not quantize keys and values.
    """
    from transformers import StaticCache

    from plquant.kv_cache import integer_cache

    if compiled:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()  # refuses now where there is none
    (batch, length), device = ids.shape, ids.device
    room = length + max_new_tokens
    cache = integer_cache(lm, room) if integers else StaticCache(config=lm.config, max_cache_len=room)
    # One mask for all steps: causality hides the tokens that are not there yet.
    mask = torch.cat([mask, mask.new_ones(batch, max_new_tokens)], 1)
    position = (mask.cumsum(1) - 1).clamp_(min=0)
    step: Any = lm.forward
    padded = not bool(mask.all())
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    options |= {"attention_mask": mask} if padded else {}
    output = step(ids, position_ids=position[:, :length], **options)
    if compiled:
        step = torch.compile(lm.forward, dynamic=False)
    ends, ended = torch.tensor(end_tokens(lm), device=device), torch.zeros(batch, dtype=torch.bool, device=device)
    token = output.logits[:, -1].argmax(-1)
    for index in range(length, length + max_new_tokens):
        yield token
        ended |= torch.isin(token, ends)
        if index + 1 == length + max_new_tokens or bool(ended.all()):
            return
        output = step(token[:, None], position_ids=position[:, index : index + 1], **options)
        token = torch.where(ended, token, output.logits[:, -1].argmax(-1))
