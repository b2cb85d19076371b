"""Where a Kronecker product of the run time is done: by a kernel, on a GPU with what follows if that can be."""

from __future__ import annotations

from torch import Tensor, nn

from plquant.kernels import run_time
from plquant.transforms.online import KroneckerOp


def applied(op: nn.Module, x: Tensor) -> Tensor:
    """A run-time operation, by its kernel where there is one for ``x``; [..., I] -> [..., I']."""
    product = run_time.kronecker_op(x, op.left, op.right) if isinstance(op, KroneckerOp) else None
    return op(x) if product is None else product(x, op.left, op.right, op.scale)


def factors_of(op: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """The two matrices and the scale of an operation that a kernel does to ``x``; ``None``: it is another."""
    if not isinstance(op, KroneckerOp) or run_time.kronecker_op(x, op.left, op.right) is None:
        return None
    return op.left, op.right, op.scale
