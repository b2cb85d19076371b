"""What stands for modules while a proof asks what becomes of something else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plquant.blocks.nested import map_tensors


class Replay:
    """A forward hook that gives recorded outputs in their order, times a factor."""

    def __init__(self, outputs: Sequence[Any], factor: Tensor | float) -> None:
        self._outputs, self._factor = iter(outputs), factor

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Of the next call."""
        return map_tensors(self._scaled, next(self._outputs))

    def _scaled(self, recorded: Tensor) -> Tensor:
        return recorded * self._factor if recorded.is_floating_point() else recorded.clone()


class Instead:
    """A forward hook that gives these in their order."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        self._given = iter(given)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor:
        """The next one."""
        return next(self._given)


class Knows:
    """A forward that gives an output for each of these very inputs, as they are now, in their order."""

    def __init__(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self._calls = iter(zip(inputs, [x.clone() for x in inputs], outputs, strict=True))

    def __call__(self, x: Tensor) -> Tensor:
        """The next output, if it is for this."""
        expected, as_it_was, output = next(self._calls)
        if x is not expected or not torch.equal(x, as_it_was):
            raise ValueError("something else came")
        return output
