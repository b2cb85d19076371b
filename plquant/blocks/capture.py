"""What the decoder blocks are called with: hidden states of the first, keyword arguments of each."""

# Letters: N sequences, T tokens, H hidden size.

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plquant.blocks.nested import map_tensors
from plquant.blocks.stand_in import StandIn, original
from plquant.blocks.stream_files import empty_on_disk, release
from plquant.evaluating import evaluating

_CACHES = ("past_key_values", "past_key_value", "layer_past")


class StopForward(Exception):  # noqa: N818
    """Ends a forward pass from inside a hook; a class of its own, so that no error of the model is mistaken for it."""


@torch.no_grad()
def capture_inputs(
    lm: nn.Module,
    blocks: nn.ModuleList | Sequence[nn.Module],
    ids: Tensor,
    batch_size: int = 8,
    folder: Path | None = None,
) -> Tensor:
    """Hidden states that enter the first block, [N, T, H] in the model's dtype, on the device of ``ids``.

    No block runs: the forward pass stops at the first one.

    Args:
        lm: Language model that takes token ids.
        blocks: Its decoder blocks.
        ids: int64 [N, T]; keep them on the CPU to keep the result there.
        batch_size: Sequences per forward pass.
        folder: Where a file is to hold the result; it is in memory if not given.
    """
    inputs: Tensor | None = None
    with evaluating(lm):
        for start in range(0, len(ids), batch_size):
            batch = ids[start : start + batch_size]
            hidden, _ = _calls(lm, blocks[:1], batch)[0]
            if inputs is None:
                shape, dtype = (len(ids), *hidden.shape[1:]), hidden.dtype
                in_memory = partial(torch.empty, device=ids.device)
                inputs = in_memory(shape, dtype=dtype) if folder is None else empty_on_disk(folder, shape, dtype)
            inputs[start : start + len(batch)] = hidden
            release(inputs)
    if inputs is None:
        raise ValueError(f"ids has shape {list(ids.shape)}; at least one sequence [N, T] is needed.")
    return inputs


@torch.no_grad()
def capture_calls(lm: nn.Module, blocks: nn.ModuleList, ids: Tensor) -> list[dict[str, Any]]:
    """Keyword arguments of every block, so that ``block(x, **call)`` runs it outside the model.

    Hidden states and KV cache are left out. Blocks may differ (Gemma's sliding and full attention have their own masks
    and rotary embeddings); equal tensors are stored once. Masks and position embeddings have a batch of one and
    broadcast to any batch of sequences of T tokens. Only the first block runs, to see what a block returns; the others
    need no weights, and hand on what they are given. So does a block in the calls that it is given here: what one may
    hand to the next beside hidden states (a state, a routing) is that of the first.

    Args:
        lm: Language model that takes token ids.
        blocks: Its decoder blocks.
        ids: int64 [1, T].
    """
    if len(ids) != 1:
        raise ValueError(f"ids has shape {list(ids.shape)}; pass one sequence [1, T], the calls serve any batch size.")
    known: list[Tensor] = []
    own = list(blocks)
    stand_ins = [StandIn(block).eval() for block in own[1:]]

    def look(_block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        for stand_in in stand_ins:
            stand_in.returns_like(output)

    with evaluating(lm), contextlib.ExitStack() as stack:
        for index, stand_in in enumerate(stand_ins, 1):
            stack.callback(blocks.__setitem__, index, own[index])
            blocks[index] = stand_in
        stack.callback(own[0].register_forward_hook(look).remove)
        calls = _calls(lm, [*own[:1], *stand_ins], ids)
    taken = [{key: value for key, value in arguments.items() if key not in _CACHES} for _, arguments in calls]
    return [map_tensors(lambda tensor: _shared(tensor, known), arguments) for arguments in taken]


def _calls(
    lm: nn.Module, blocks: nn.ModuleList | Sequence[nn.Module], ids: Tensor
) -> list[tuple[Tensor, dict[str, Any]]]:
    """Hidden states and other arguments, by name, of each block in one forward pass, which ends at the last one."""
    calls: dict[int, tuple[Tensor, dict[str, Any]]] = {}

    def record(index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(original(block).forward).parameters)
        arguments = dict(zip(names, args, strict=False)) | kwargs
        calls[index] = (arguments.pop(names[0]), arguments)
        if len(calls) == len(blocks):
            raise StopForward

    with contextlib.ExitStack() as stack:
        for index, block in enumerate(blocks):
            hook = partial(record, index)
            stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        with contextlib.suppress(StopForward):
            lm(ids.to(next(lm.parameters()).device), use_cache=False)
    if len(calls) < len(blocks):
        raise ValueError(
            f"a forward pass of {type(lm).__name__} ran {len(calls)} of the {len(blocks)} blocks given. Pass the "
            "blocks of this very model (find_blocks), and a model that runs all of them."
        )
    return [calls[index] for index in range(len(blocks))]


def _shared(tensor: Tensor, known: list[Tensor]) -> Tensor:
    """An equal one of ``known``, or the tensor itself, which then becomes known."""
    for other in known:
        is_alike = (other.shape, other.dtype, other.device) == (tensor.shape, tensor.dtype, tensor.device)
        if other is tensor or (is_alike and torch.equal(other, tensor)):
            return other
    known.append(tensor)
    return tensor
