"""A norm that quantizes for all who read it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from plquant.kernels import run_time, token_ops
from plquant.kernels.tokens import sources
from plquant.nn.kronecker import applied, factors_of
from plquant.nn.packed_linear import PackedLinear
from plquant.transforms.gather_op import GatherOp

if TYPE_CHECKING:
    from plquant.nn.online import Online

EPSILONS = ("variance_epsilon", "eps")  # what modules call theirs
PROBES = 64  # rows on which a norm is compared with RMSNorm as it is done here


class TokenNorm(nn.Module):
    """RMSNorm in the place of a model's own, read by nothing but packed linears that quantize their input alike.

    On a GPU whose products with these linears are of integers it gives them codes, ``QuantizedTokens.rows`` in the
    place of activations: normed, gathered and quantized in one launch. Anywhere else it is what it was.

    Args:
        weight: The gain, [C].
        eps: Added to the mean of the squares.
        readers: The linears.

    Attributes:
        online: Run-time operations on what is normed, or ``None``.
        gather: If that is one gather, what kernels take for it once ``prepare_`` was called.
    """

    gather: Tensor | None

    def __init__(self, weight: nn.Parameter, eps: float, readers: Sequence[PackedLinear]) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps
        self.readers = tuple(readers)  # not its children
        self.online: Online | None = None
        self.register_buffer("gather", None, persistent=False)

    @classmethod
    def of(cls, norm: nn.Module, readers: Sequence[nn.Module]) -> TokenNorm | None:
        """The same as a norm, bit by bit; ``None`` if it is another, or what reads it does not quantize alike.

        Args:
            norm: The norm, itself without run-time operations.
            readers: All that reads its output.
        """
        weight = getattr(norm, "weight", None)
        eps = next((getattr(norm, name) for name in EPSILONS if hasattr(norm, name)), None)
        linears = [reader for reader in readers if isinstance(reader, PackedLinear)]
        if weight is None or eps is None or len(linears) < len(readers) or not _quantize_alike(linears):
            return None
        own = cls(nn.Parameter(weight.detach().cpu(), requires_grad=False), eps, ())
        x = torch.randn(PROBES, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
        with torch.autocast("cpu", enabled=False):
            same = torch.equal(own.normed(x), copy.deepcopy(norm).cpu().forward(x))  # not its hooks
        return cls(weight, eps, linears) if same else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C'], or int8 tokens of C' channels."""
        if not self.hands_tokens_on(x):
            y = self.normed(x)
            return y if self.online is None else self.online(y)
        inputs = self.readers[0].inputs
        assert inputs is not None
        how = inputs.bits, inputs.symmetric, inputs.offset
        if self.online is None or self.gather is not None:
            return token_ops.norm_tokens(x, self.weight, self.eps, self.gather, *how)
        *before, last = self.online
        y = self.normed(x)
        for op in before:
            y = applied(op, y)
        factors = factors_of(last, y)
        return applied(last, y) if factors is None else token_ops.kronecker_tokens(y, *factors, *how)

    def prepare_(self) -> None:
        """Make what the kernels take of the run-time operations, which have their tensors by now."""
        ops = list(self.online or ())
        if len(ops) == 1 and isinstance(ops[0], GatherOp):
            self.gather = sources(ops[0].index, ops[0].adds)

    def normed(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]: x / rms in fp32, rounded to the dtype of x, times the gain."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)

    def hands_tokens_on(self, x: Tensor) -> bool:
        """Whether the linears take codes of ``x``, where and as it is."""
        laid_out = all(isinstance(linear.prepared, run_time.Integers) for linear in self.readers)
        wants_grad = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        return laid_out and x.dtype == self.weight.dtype and run_time.has_triton(x.device) and not wants_grad

    def extra_repr(self) -> str:
        """Width and epsilon, for ``print(model)``."""
        return f"{len(self.weight)}, eps={self.eps}"


def _quantize_alike(linears: Sequence[PackedLinear]) -> bool:
    inputs = [linear.inputs for linear in linears]
    if not inputs or inputs[0] is None or any(linear.online is not None for linear in linears):
        return False
    first = inputs[0]
    return all(
        own is not None
        and own.clip is None
        and (own.bits, own.symmetric) == (first.bits, first.symmetric)
        and _same(own.offset, first.offset)
        for own in inputs
    )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
