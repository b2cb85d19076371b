"""Refuse a model with NaN or infinite numbers in it, by name, before anything is calibrated on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from plquant.bfloat16 import quick_products
from plquant.evaluating import evaluating


@torch.no_grad()
def require_finite(
    lm: nn.Module, ids: Tensor, layers: Mapping[str, nn.Module], seen: Callable[[str, Tensor], None]
) -> None:
    """Look at every weight, and at what every module gives for some tokens, in one pass through the model.

    Args:
        lm: The model in full precision.
        ids: int64 [N, T].
        layers: Its decoder blocks by name, in their order. Each is looked at when it is called and has its weights.
        seen: Called with the name and value of every weight that was looked at.

    Raises:
        ValueError: A number is NaN or infinite; the tensors, or the first module, are named.
    """
    inside = tuple(f"{name}." for name in layers)
    _look(((name, weight) for name, weight in lm.named_parameters() if not name.startswith(inside)), seen)
    first: list[str] = []

    def look_inside(name: str, layer: nn.Module) -> None:
        _look(((f"{name}.{own}", weight) for own, weight in layer.named_parameters()), seen)

    def look(name: str, output: object) -> None:
        tensors = output if isinstance(output, tuple | list) else [output]
        if not first and any(isinstance(t, Tensor) and not t.isfinite().all() for t in tensors):
            first.append(name)

    with ExitStack() as stack, evaluating(lm), quick_products(ids.device):
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda layer, _args, name=name: look_inside(name, layer))
            stack.callback(hook.remove)
        for name, module in lm.named_modules():
            if name:
                hook = module.register_forward_hook(lambda _m, _args, output, name=name: look(name, output))
                stack.callback(hook.remove)
        lm(ids, use_cache=False)
    if first:
        raise _no_activation(f"what {first[0]} gives")


def _look(named: Iterable[tuple[str, Tensor]], seen: Callable[[str, Tensor], None]) -> None:
    wrong = []
    for name, weight in named:
        if not weight.isfinite().all():
            wrong.append(name)
        seen(name, weight)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"--model.checkpoint has NaN or infinite weights: {', '.join(wrong[:3])}{more}; give a sound checkpoint"
        )


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
