"""What is left of a transform at run time: modules without parameters, in the quantized model and its checkpoint.

An operation is named by its ``kind`` and made from its ``config``, sizes in JSON; its tensors are buffers like any
other. They are stored in fp32 unless the module is cast, and used in the dtype of what they are multiplied with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn


class OnlineOp(nn.Module):
    """Base of all run-time operations, [..., I] -> [..., I']."""

    kind: ClassVar[str]

    empty: ClassVar[Callable[..., OnlineOp]]  # a class method: one to load tensors into, of the sizes in ``config``

    def config(self) -> dict[str, Any]:
        """Arguments of ``empty``, to be written as JSON."""
        raise NotImplementedError(f"{type(self).__name__}.config gives the arguments of its empty()")

    @property
    def macs_per_token(self) -> int:
        """Multiply-adds for each token."""
        raise NotImplementedError(f"{type(self).__name__}.macs_per_token counts its multiply-adds")

    @property
    def stored_bits(self) -> int:
        """What its tensors take in the checkpoint, as they are now."""
        return sum(8 * buffer.nbytes for buffer in self.buffers())


def make_op(kind: str, config: dict[str, Any]) -> OnlineOp:
    """The operation that a checkpoint names, to load tensors into.

    Raises:
        ValueError: No such operation.
    """
    kinds = {op.kind: op for op in OnlineOp.__subclasses__()}
    if kind not in kinds:
        raise ValueError(
            f"the checkpoint needs a run-time operation {kind!r}, but this plquant has {', '.join(sorted(kinds))}. "
            "Open it with the version that wrote it, or a later one."
        )
    return kinds[kind].empty(**config)
