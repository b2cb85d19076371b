"""Where a Kronecker product of the run time is done: by one kernel on a GPU, with what follows if that can be."""

from __future__ import annotations

from torch import Tensor, nn

from plquant.kernels import ops, run_time
from plquant.transforms.online import KroneckerOp


def applied(op: nn.Module, x: Tensor) -> Tensor:
    """A run-time operation, by its kernel where there is one for ``x``; [..., I] -> [..., I']."""
    if isinstance(op, KroneckerOp) and run_time.takes_kronecker(x, op.left, op.right):
        return ops.kronecker(x, op.left, op.right)
    return op(x)


def factors_of(op: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The two matrices of an operation that a kernel does to ``x`` as it quantizes it; ``None``: it is another."""
    fits = isinstance(op, KroneckerOp) and run_time.takes_kronecker(x, op.left, op.right)
    return (op.left, op.right) if isinstance(op, KroneckerOp) and fits else None
