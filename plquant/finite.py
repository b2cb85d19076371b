"""Refuse a model with NaN or infinite numbers in it, by name, before anything is calibrated on them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from plquant.evaluating import evaluating


@torch.no_grad()
def require_finite(lm: nn.Module, ids: Tensor, named: Iterable[tuple[str, Tensor]]) -> None:
    """Look at every weight, and at what every module gives for some tokens.

    Args:
        lm: The model in full precision.
        ids: int64 [N, T].
        named: Its weights by name.

    Raises:
        ValueError: A number is NaN or infinite; the tensors, or the first module, are named.
    """
    wrong = [name for name, parameter in named if not parameter.isfinite().all()]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"--model.checkpoint has NaN or infinite weights: {', '.join(wrong[:3])}{more}; give a sound checkpoint"
        )
    first: list[str] = []

    def look(name: str, output: object) -> None:
        tensors = output if isinstance(output, tuple | list) else [output]
        if not first and any(isinstance(t, Tensor) and not t.isfinite().all() for t in tensors):
            first.append(name)

    hooks = [
        module.register_forward_hook(lambda _m, _args, output, name=name: look(name, output))
        for name, module in lm.named_modules()
        if name
    ]
    try:
        with evaluating(lm):
            lm(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if first:
        raise _no_activation(f"what {first[0]} gives")


def require_finite_stream(stream: Iterable[Tensor], name: str) -> None:
    """Look at what a block gives in full precision.

    Args:
        stream: Its batches, [B, T, H].
        name: Of the block.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    if not all(bool(x.isfinite().all()) for x in stream):
        raise _no_activation(f"what {name} gives")


def _no_activation(what: str) -> ValueError:
    return ValueError(
        f"{what} on the calibration text is NaN or infinite in full precision, there is nothing to fit to; "
        "use --model.dtype=float32 if it overflows, or give a sound checkpoint"
    )
