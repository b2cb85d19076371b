"""What stands for a decoder block while the model around it runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class StandIn(nn.Module):
    """Gives what is known to be the block's output, or its input, and does no work.

    Args:
        block: The block, for what the model around it asks of it.
        as_tuple: It returns a tuple.
    """

    def __init__(self, block: nn.Module, as_tuple: bool = False) -> None:
        super().__init__()
        self._block = (block,)  # in a tuple it is no child
        self.as_tuple = as_tuple
        self.output: Tensor | None = None

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        """What is known, or ``x``."""
        x = x if self.output is None else self.output.to(x.device)
        return (x,) if self.as_tuple else x

    def __getattr__(self, name: str) -> Any:
        """Anything else is the block's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)


def original(block: nn.Module) -> nn.Module:
    """The block that this one stands for, or the block itself."""
    return block._block[0] if isinstance(block, StandIn) else block
