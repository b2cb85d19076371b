"""Where a Kronecker product of the run time is done: by one kernel on a GPU, with what follows if that can be."""

from __future__ import annotations

from torch import Tensor, nn

from plquant.kernels import ops, run_time
from plquant.transforms.online import KroneckerOp


def applied(op: nn.Module, x: Tensor) -> Tensor:
    """A run-time operation, by its kernel where there is one for ``x``; [..., I] -> [..., I']."""
    factors = factors_of(op, x)
    return op(x) if factors is None else ops.kronecker(x, *factors)


def factors_of(op: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The two matrices of an operation that a kernel does to ``x``; ``None``: it is another, or has a scale."""
    if not isinstance(op, KroneckerOp) or op.scale != 1 or not run_time.takes_kronecker(x, op.left, op.right):
        return None
    return op.left, op.right
