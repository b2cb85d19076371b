"""Weights of the decoder blocks, in memory for one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from plquant.blocks.nested import map_tensors
from plquant.blocks.stand_in import StandIn
from plquant.blocks.stream_files import pieces
from plquant.nn.online import Online
from plquant.nn.packed_linear import PackedLinear

Read: TypeAlias = Callable[[], Mapping[str, Tensor]]


class BlockWeights:
    """Gives blocks that are on the meta device their weights for a while; leaves alone those that have them.

    Args:
        parent: Name of the list of blocks in the model.
        layers: The decoder blocks.
        read: Number of a block -> its parameters and buffers by their names in it.
    """

    def __init__(self, parent: str, layers: nn.ModuleList, read: Callable[[int], Mapping[str, Tensor]]) -> None:
        self.parent, self.layers = parent, layers
        self._read: dict[nn.Module, Read] = {layer: partial(read, number) for number, layer in enumerate(layers)}

    def named(self) -> dict[str, nn.Module]:
        """Full name of every block -> the block."""
        return {f"{self.parent}.{number}": layer for number, layer in enumerate(self.layers)}

    def moved(self, layer: nn.Module, read: Read) -> None:
        """From now on the weights of a block, which is another one now, come from somewhere else."""
        self._read[layer] = read

    @contextmanager
    def held(self, *layers: nn.Module) -> Iterator[None]:
        """Within it these blocks have their weights."""
        away = [layer for layer in layers if is_away(layer)]
        try:
            for layer in away:
                self._take(layer)
            yield
        finally:
            for layer in away:
                give_back_(layer)

    @contextmanager
    def on_demand(self) -> Iterator[None]:
        """Within it a block that is called has its weights, until the next one is."""
        taken: list[nn.Module] = []

        def take(layer: nn.Module, *_: Any) -> None:
            if is_away(layer):
                give_back()
                taken.append(layer)
                self._take(layer)

        def give_back() -> None:
            while taken:
                give_back_(taken.pop())

        with ExitStack() as stack:
            stack.callback(give_back)
            for layer in self.layers:
                if is_away(layer):
                    stack.callback(layer.register_forward_pre_hook(take).remove)
            yield

    def _take(self, layer: nn.Module) -> None:
        give_(layer, self._read[layer]())
        assert not is_away(layer), "what was read is not all of the block"


def is_away(layer: nn.Module) -> bool:
    """Whether a block is without its weights."""
    return any(tensor.is_meta for _, _, _, tensor in _tensors(layer))


def give_(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors, by name, in the place of a block's parameters and buffers."""
    for name, own, key, old in _tensors(layer):
        if (new := tensors.get(name)) is not None:
            is_plain = isinstance(old, nn.Parameter) and not isinstance(new, nn.Parameter)
            own[key] = nn.Parameter(new, old.requires_grad) if is_plain else new


def give_back_(layer: nn.Module) -> None:
    """Put a block's parameters and saved buffers on the meta device; other buffers are small, and kept."""
    saved = layer.state_dict().keys()
    for name, own, key, old in _tensors(layer):
        if name in saved:
            new = old.detach().to("meta")
            own[key] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _tensors(layer: nn.Module) -> Iterator[tuple[str, dict[str, Any], str, Tensor]]:
    """Full name, the dictionary it is in, key and value of every parameter and buffer."""
    for path, module in layer.named_modules():
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                if tensor is not None:
                    yield (f"{path}.{key}" if path else key), own, key, tensor


@torch.no_grad()
def run_ahead(
    weights: BlockWeights, calls: Sequence[Mapping[str, Any]], x: Tensor, device: torch.device
) -> list[StandIn]:
    """Let all blocks work on ``x``, one block at a time, packed ones by the kernels of the device.

    Args:
        weights: Of the blocks.
        calls: Their other arguments.
        x: [N, T, H], the input of the first block; becomes the output of the last.
        device: Where they work.

    Returns:
        For each block what may stand for it.
    """
    known = []
    for layer, call in zip(weights.layers, calls, strict=True):
        there = map_tensors(lambda tensor: tensor.to(device), dict(call))
        with weights.held(layer):
            home = next(layer.parameters(), x).device
            layer.to(device)
            with ExitStack() as stack:
                for module in layer.modules():
                    if isinstance(module, PackedLinear | Online):
                        stack.enter_context(module.laid_out())
                for hidden in pieces(x, 1):
                    output = layer(hidden.to(device), **there)
                    hidden.copy_(output[0] if isinstance(output, tuple) else output)
            layer.to(home)
        known.append(StandIn(layer))
        known[-1].returns_like(output)
    return known
