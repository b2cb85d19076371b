"""A weight at run time: laid out once for the kernels of its device, and back.

    Vectors      CPU: ``cpu_layout``
    Fragments    GPU: ``layout``, in the order in which matrix instructions take it
    Integers     GPU, quantized activations and one scale per output: ``int_gemm``, for products of integers

This is the place where a device gets its kernels. Which of them takes a product is up to its rows: ``cpu``, ``gpu``.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from plquant.kernels import cpu_layout, layout, native, ops, token_ops
from plquant.kernels.cpu_layout import Shape

Tensors = dict[str, Any]  # Tensor or None
# Multiply-adds; torch's products of bf16, which is quick with AVX512, have caught up with a CPU's kernel by then.
MOST_KRONECKER_WORK = 1 << 21


class Affine(NamedTuple):
    """A quantized weight as it is stored: w = (code - zero_point) scale.

    Attributes:
        codes: uint8 [N, K], from 0.
        scale: [N, K / g], or [N / g, K] with groups along the output.
        zero_point: uint8 as ``scale``; ``None``: 2^(bits - 1).
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


class Inputs(NamedTuple):
    """How activations are quantized, row by row.

    Attributes:
        bits: Width of a code.
        symmetric: No zero-point.
        offset: fp32 [K], added before rounding, or ``None``.
        clip: fp32 [2], share of the lower and of the upper end of every range that is kept, or ``None`` for all.
    """

    bits: int
    symmetric: bool
    offset: Tensor | None
    clip: Tensor | None = None


@dataclass(frozen=True)
class RunTime:
    """All of a weight at run time but its tensors, which belong to a module.

    Attributes:
        shape: Of the weight and its groups.
        dtype: Of the stored scale.
    """

    names: ClassVar[tuple[str, ...]]
    shape: Shape
    dtype: torch.dtype

    @classmethod
    def lay_out(cls, weight: Affine, shape: Shape) -> tuple[Self, Tensors]:
        """With the tensors, by ``names``."""
        raise NotImplementedError

    def restore(self, tensors: Tensors) -> Affine:
        """The inverse of ``lay_out``."""
        raise NotImplementedError

    def linear(self, x: Tensor, tensors: Tensors, bias: Tensor | None, inputs: Inputs | None) -> Tensor:
        """``x W^T + bias``, [..., K] -> [..., N], of the quantized ``x`` where ``inputs`` are given."""
        raise NotImplementedError


class Vectors(RunTime):
    """As a CPU's vectors take it."""

    names = ("codes", "scale", "zero_point")

    @classmethod
    def lay_out(cls, weight: Affine, shape: Shape) -> tuple[Self, Tensors]:
        """``cpu_layout.Weight``."""
        native.dispatch_()
        return cls(shape, weight.scale.dtype), cpu_layout.lay_out(*weight, shape)._asdict()

    def restore(self, tensors: Tensors) -> Affine:
        """The inverse."""
        weight = cpu_layout.Weight(**tensors)
        scale, zero_point = (
            None if values is None else cpu_layout.per_group_of(values, self.shape) for values in weight[1:]
        )
        assert scale is not None
        return Affine(cpu_layout.codes_of(weight, self.shape), scale, zero_point)

    def linear(self, x: Tensor, tensors: Tensors, bias: Tensor | None, inputs: Inputs | None) -> Tensor:
        """By ``cpu``."""
        weight = (*tensors.values(), bias, *self.shape)
        few = self._few(x)
        if inputs is None:
            return ops.few_rows(x, *weight) if few else ops.linear(x, *weight)
        return ops.few_quantized_rows(x, *weight, *inputs) if few else ops.quantized_linear(x, *weight, *inputs)

    def _few(self, x: Tensor) -> bool:
        width = self.shape.in_features
        rows_fit = 0 < x.numel() <= native.MOST_DISPATCHED_ROWS * width and x.ndim > 0 and x.shape[-1] == width
        return x.dtype == torch.bfloat16 and x.is_cpu and rows_fit and x.is_contiguous()


@dataclass(frozen=True)
class Fragments(RunTime):
    """As a GPU's matrix instructions take it.

    Attributes:
        gain: As in ``layout.PackedWeight``.
    """

    names = ("codes", "high", "scale", "zero_point")
    gain: float = 1.0

    @classmethod
    def lay_out(cls, weight: Affine, shape: Shape) -> tuple[Self, Tensors]:
        """``layout.PackedWeight``."""
        packed = layout.pack(*weight, shape.bits, shape.group_size, layout.axis_name(shape.along_out))
        if weight.scale.dtype == torch.float16:
            from plquant.kernels import decode

            decode.subnormals_survive(weight.codes.device)  # waits for the device: now, not while a graph is captured
        tensors = (packed.words, packed.high, packed.scale, packed.zero_point)
        return cls(shape, weight.scale.dtype, packed.gain), dict(zip(cls.names, tensors, strict=True))

    def restore(self, tensors: Tensors) -> Affine:
        """The inverse."""
        codes, scale, zero_point = layout.unpack(layout.packed_weight([*tensors.values()], self.shape, self.gain))
        zeros = None if zero_point is None else zero_point.to(torch.uint8).contiguous()
        return Affine(codes.contiguous(), scale.contiguous(), zeros)

    def linear(self, x: Tensor, tensors: Tensors, bias: Tensor | None, inputs: Inputs | None) -> Tensor:
        """By ``gpu``."""
        weight = (*tensors.values(), bias, *self.shape, self.gain)
        if inputs is None:
            return ops.fragment_linear(x, *weight)
        return ops.fragment_quantized_linear(x, *weight, *inputs)


class Integers(RunTime):
    """As a GPU's products of integers take it."""

    names = ("codes", "scale", "zero_point", "sums")

    @classmethod
    def lay_out(cls, weight: Affine, shape: Shape) -> tuple[Self, Tensors]:
        """``int_gemm.IntWeight``."""
        from plquant.kernels import int_gemm

        codes = weight.codes
        if weight.zero_point is None:
            codes = (codes - (1 << (shape.bits - 1))).view(torch.int8)
        packed = int_gemm.pack(codes, weight.scale, weight.zero_point, shape.bits)
        return cls(shape, weight.scale.dtype), {name: getattr(packed, name) for name in cls.names}

    def restore(self, tensors: Tensors) -> Affine:
        """The inverse."""
        from plquant.kernels import int_gemm

        bits = self.shape.bits
        weight, middle = int_gemm.int_weight(**tensors, bits=bits, in_features=self.shape.in_features), 1 << (bits - 1)
        zero_point = None if weight.zero_point is None else (weight.zero_point + middle).to(torch.uint8)[:, None]
        codes = int_gemm.unpack(weight).contiguous().view(torch.uint8) + middle
        return Affine(codes, weight.scale.to(self.dtype)[:, None], zero_point)

    def linear(
        self,
        x: Tensor,
        tensors: Tensors,
        bias: Tensor | None,
        inputs: Inputs | None,
        factors: tuple[Tensor, Tensor, float] | None = None,
    ) -> Tensor:
        """By ``gpu``; of ``s x (L^T kron R)`` with factors L, R and s, for which ``inputs`` have no ``clip``."""
        assert inputs is not None
        weight = (*tensors.values(), bias, *self.shape, self.dtype)
        return ops.integer_linear(x, *weight, *inputs, *(factors or ()))

    def of_tokens(self, tokens: Tensor, tensors: Tensors, bias: Tensor | None, symmetric: bool) -> Tensor:
        """``linear`` of activations that are quantized by now: ``QuantizedTokens.rows`` of any leading shape."""
        return token_ops.token_linear(tokens, *tensors.values(), bias, *self.shape, self.dtype, symmetric)


def kind(device: torch.device, dtype: torch.dtype, shape: Shape, quantized_inputs: bool) -> type[RunTime] | None:
    """What a weight with scales of this dtype becomes on this device; ``None``: there are no kernels for it.

    A warning says, once, what keeps a device that has kernels from using them.
    """
    if device.type == "cpu":
        return Vectors if dtype in native.DTYPES and native.available() else None
    if device.type != "cuda":
        return None
    missing = _missing(dtype, shape)
    if missing:
        _warn(missing)
        return None
    per_output = not shape.along_out and shape.groups == 1
    fits = per_output and shape.in_features <= native.MOST_INTEGER_INPUTS
    return Integers if quantized_inputs and fits else Fragments


def kronecker_op(x: Tensor, left: Tensor, right: Tensor) -> Callable[..., Tensor] | None:
    """``ops.kronecker`` or ``ops.cpu_kronecker``, whichever is for these; ``None``: torch's products are."""
    if x.dtype != left.dtype or x.dtype != right.dtype or max(len(left), len(right)) > native.MOST_KRONECKER_ORDER:
        return None
    if torch.is_grad_enabled() and x.requires_grad:  # they have none
        return None
    if x.dtype in (torch.float16, torch.bfloat16) and has_triton(x.device):
        return ops.kronecker
    orders = len(left), len(right)
    quick = max(orders) <= 8 or x.numel() * sum(orders) <= MOST_KRONECKER_WORK or native.vectors() == "AVX2"
    return ops.cpu_kronecker if quick and x.dtype == torch.bfloat16 and x.is_cpu else None


def has_triton(device: torch.device) -> bool:
    """Whether it is a device that Triton's kernels run on."""
    return device.type == "cuda" and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _missing(dtype: torch.dtype, shape: Shape) -> str | None:
    if not _triton_is_installed():
        return "its kernels for GPUs need triton, which is not installed"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"its kernels for GPUs compute in float16 or bfloat16, not in {dtype}"
    axis = layout.axis_name(shape.along_out)
    return layout.why_not((shape.out_features, shape.in_features), shape.bits, shape.group_size, axis)


@cache
def _warn(missing: str) -> None:
    warnings.warn(f"plquant runs its plain PyTorch path, which is slow: {missing}", stacklevel=3)
