"""What is left of a transform at run time: modules without parameters, in the quantized model and its checkpoint.

An operation is named by its ``kind`` and made from its ``config``, sizes in JSON; its tensors are buffers like any
other. Matrices are used in the dtype of what they are multiplied with, and stored in that of the model: rounding a
matrix before it is stored or when it is used gives the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from plquant.transforms.hadamard import near_root

# Letters: I input channels of a linear; h blocks of n channels, or n1 x n2 channels of a Kronecker product.


def _name(dtype: torch.dtype) -> str:
    """As JSON: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


_DTYPES = {_name(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


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


def apply_matrix(x: Tensor, matrix: Tensor, shift: Tensor | None = None) -> Tensor:
    """``(x - shift) M`` block by block, in the dtype of ``x``.

    Args:
        x: [..., h n].
        matrix: M, [h, n, n].
        shift: [h n].
    """
    x = x if shift is None else x - shift.to(x.dtype)
    blocks = x.unflatten(-1, matrix.shape[:2])
    return torch.einsum("...hd,hde->...he", blocks, matrix.to(x.dtype)).flatten(-2)


def apply_kronecker(x: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """``scale x (L^T kron R)`` as ``L X R`` with X [n1, n2] the row x, in the dtype of ``x``.

    Args:
        x: [..., n1 n2].
        left: L, [n1, n1].
        right: R, [n2, n2].
        scale: Multiplied with the sums of the second product before they are rounded.
    """
    n1, n2 = len(left), len(right)
    rows = x.reshape(-1, n1, n2)
    # Not torch.matmul, which chooses its way by whether a gradient is wanted: the fold would not repeat the training
    # forward to the bit.
    half = torch.bmm(left.to(x.dtype).expand(len(rows), n1, n1), rows)
    half, right = half.view(-1, n2), right.to(x.dtype)
    if scale == 1:
        return half.mm(right).view(x.shape)
    return torch.addmm(half.new_zeros(()), half, right, beta=0, alpha=scale).view(x.shape)


class MatrixOp(OnlineOp):
    """``(x - shift) M``, block-diagonal if there are several M; what an affine matrix leaves.

    Args:
        matrix: M, [h, n, n].
        shift: [h n] or ``None``.
    """

    kind = "matrix"
    matrix: Tensor
    shift: Tensor | None

    def __init__(self, matrix: Tensor, shift: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix.contiguous())  # as it is loaded: strides choose how it is multiplied
        self.register_buffer("shift", shift)

    @classmethod
    def empty(cls, blocks: int, size: int, shift: bool, dtype: str) -> MatrixOp:
        """One to load tensors into: ``blocks`` matrices of width ``size``."""
        return cls(torch.empty(blocks, size, size), torch.empty(blocks * size) if shift else None).to(_DTYPES[dtype])

    def config(self) -> dict[str, Any]:
        """Sizes and dtype."""
        sizes = {"blocks": len(self.matrix), "size": self.matrix.shape[1], "shift": self.shift is not None}
        return {**sizes, "dtype": _name(self.matrix.dtype)}

    @property
    def macs_per_token(self) -> int:
        """One for each entry of the matrices."""
        return self.matrix.numel()

    def forward(self, x: Tensor) -> Tensor:
        """[..., h n] -> [..., h n]."""
        return apply_matrix(x, self.matrix, self.shift)


class KroneckerOp(OnlineOp):
    """``scale x (L^T kron R)`` by two small products; what a Kronecker-factored matrix leaves.

    Args:
        left: L, [n1, n1].
        right: R, [n2, n2].
        scale: A number, kept in full precision.
    """

    kind = "kronecker"
    left: Tensor
    right: Tensor

    def __init__(self, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("left", left.contiguous())
        self.register_buffer("right", right.contiguous())

    @classmethod
    def rotation(cls, left: Tensor, right: Tensor) -> KroneckerOp:
        """``x (L^T kron R)`` of two orthogonal matrices, fp64, orthogonal in any dtype if they are Hadamard matrices.

        The entries of a Hadamard matrix over sqrt(n) are no numbers of bf16, and all of them are off by one and the
        same factor: 1.001 at n = 12. Powers of two are, and the rest is a ``scale``.
        """
        n1, n = len(left), len(left) * len(right)
        first, both = near_root(n1), near_root(n)
        left, right = left * (math.sqrt(n1) / first), right * (math.sqrt(n // n1) * first / both)
        return cls(left, right, both / math.sqrt(n))

    @classmethod
    def empty(cls, left: int, right: int, dtype: str, scale: float = 1.0) -> KroneckerOp:
        """One to load tensors into, of these widths."""
        return cls(torch.empty(left, left), torch.empty(right, right), scale).to(_DTYPES[dtype])

    def config(self) -> dict[str, Any]:
        """Widths of the factors, dtype, and the scale if there is one."""
        sizes = {"left": len(self.left), "right": len(self.right), "dtype": _name(self.left.dtype)}
        return sizes if self.scale == 1 else {**sizes, "scale": self.scale}

    @property
    def macs_per_token(self) -> int:
        """n1 n2 (n1 + n2)."""
        left, right = len(self.left), len(self.right)
        return left * right * (left + right)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n1 n2] -> [..., n1 n2]."""
        return apply_kronecker(x, self.left, self.right, self.scale)
