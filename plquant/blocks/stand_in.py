"""What stands for a decoder block while the model around it runs."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn


class StandIn(nn.Module):
    """Gives what is known to be the block's output, or its input, and does no work.

    Args:
        block: The block, for what the model around it asks of it.

    Attributes:
        output: What is known; ``None`` gives the input.
        others: What the block returns after its hidden states, in a tuple; ``None`` if it returns these alone.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = (block,)  # in a tuple it is no child
        self._hidden = next(iter(inspect.signature(block.forward).parameters))
        self.output: Tensor | None = None
        self.others: tuple[Any, ...] | None = None

    def returns_like(self, output: Any) -> None:
        """Return such a thing as the block, or one of its kind, did."""
        self.others = output[1:] if isinstance(output, tuple) else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What is known, or the hidden states that came."""
        x = args[0] if args else kwargs[self._hidden]
        x = x if self.output is None else self.output.to(x.device)
        return x if self.others is None else (x, *self.others)

    def __getattr__(self, name: str) -> Any:
        """Anything else is the block's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)


def original(block: nn.Module) -> nn.Module:
    """The block that this one stands for, or the block itself."""
    return block._block[0] if isinstance(block, StandIn) else block
