"""A norm that quantizes for all who read it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from plquant.kernels import run_time, token_ops
from plquant.kernels.tokens import row_bytes, sources
from plquant.nn.kronecker import applied, factors_of
from plquant.nn.packed_linear import PackedLinear
from plquant.transforms.gather_op import GatherOp

EPSILONS = ("variance_epsilon", "eps")  # what modules call theirs
PROBES = 64  # rows on which a norm is compared with RMSNorm as it is done here


class TokenNorm(nn.Module):
    """RMSNorm in the place of a model's own, read by nothing but packed linears that quantize their input alike.

    On a GPU whose products with these linears are of integers it gives them codes, ``QuantizedTokens.rows`` in the
    place of activations: normed, gathered and quantized in one launch. Anywhere else it is what it was.

    Args:
        weight: The gain, [C].
        eps: Added to the mean of the squares.
        readers: The linears, which a copy of the norm alone has copies of.

    Attributes:
        online: Run-time operations on what is normed, or ``None``.
        gather: If that is one gather, what kernels take for it once ``prepare_`` was called.
    """

    gather: Tensor | None

    def __init__(self, weight: nn.Parameter, eps: float, readers: Sequence[PackedLinear]) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps
        self.readers = tuple(readers)  # not its children
        self.online: nn.Sequential | None = None
        self.register_buffer("gather", None, persistent=False)
        self.eval()  # as the model is that it comes into: dropout, in training, would see tokens

    @classmethod
    def of(cls, norm: nn.Module, readers: Sequence[nn.Module]) -> TokenNorm | None:
        """In the place of a norm, the same to the bit in every dtype; ``None`` if it, or a reader, does not allow it.

        Args:
            norm: The norm, itself without run-time operations.
            readers: All that reads its output.
        """
        weight = getattr(norm, "weight", None)
        eps = next((getattr(norm, name) for name in EPSILONS if hasattr(norm, name)), None)
        linears = [reader for reader in readers if isinstance(reader, PackedLinear)]
        if weight is None or eps is None or len(linears) < len(readers) or not _quantize_alike(linears):
            return None
        x = torch.randn(PROBES, len(weight), generator=torch.Generator().manual_seed(0))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):  # where it rounds shows in halves only
            theirs = copy.deepcopy(norm).cpu().to(dtype)
            own = cls(theirs.get_parameter("weight"), eps, ())
            with torch.autocast("cpu", enabled=False), torch.no_grad():
                if not torch.equal(own.normed(x.to(dtype)), theirs.forward(x.to(dtype))):  # without its hooks
                    return None
        return cls(weight, eps, linears)

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
        """Make what the kernels take of the run-time operations, which have their tensors by now.

        Raises:
            ValueError: The linears do not quantize alike, or a gather is not one of these channels.
        """
        if not _quantize_alike(self.readers):
            raise ValueError("linears that read one norm's tokens do not quantize alike: the folder is damaged")
        ops = list(self.online or ())
        if len(ops) == 1 and isinstance(ops[0], GatherOp):
            index, adds = ops[0].index, ops[0].adds
            for name, values, end in (("index", index, len(self.weight)), ("adds", adds[:, 0], len(self.weight))):
                if bool(((values < 0) | (values >= end)).any()):
                    raise ValueError(f"a gather's {name} are not of {end} channels: the folder is damaged")
            if bool(((adds[:, 1] < 0) | (adds[:, 1] >= len(index))).any()):
                raise ValueError(f"a gather adds to others than its {len(index)} channels: the folder is damaged")
            self.gather = sources(index, adds)

    def normed(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]: x / rms in fp32, rounded to the dtype of x, times the gain."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)

    def hands_tokens_on(self, x: Tensor) -> bool:
        """Whether the linears take codes of ``x``, where and as it is."""
        for linear in self.readers:
            if not isinstance(linear.prepared, run_time.Integers) or linear.prepared.dtype != x.dtype:
                return False
        wants_grad = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        plain = x.dtype == self.weight.dtype and not wants_grad and not self.training
        return plain and run_time.has_triton(x.device)

    def extra_repr(self) -> str:
        """Width and epsilon, for ``print(model)``."""
        return f"{len(self.weight)}, eps={self.eps}"


def tokens_like(x: Tensor) -> Tensor:
    """Random bytes of the shape that tokens of [..., C'] have."""
    size, generator = (*x.shape[:-1], row_bytes(x.shape[-1])), torch.Generator(x.device).manual_seed(0)
    return torch.randint(-128, 128, size, dtype=torch.int8, device=x.device, generator=generator)


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
