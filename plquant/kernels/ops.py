"""The ops ``torch.ops.plquant.*``: schemas, checks, shapes for the compiler, and the choice of a kernel by device.

Both take activations [..., K] of fp32, bf16 or fp16, and a weight as ``cpu_layout.lay_out`` makes it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from plquant.kernels import cpu, native, reference
from plquant.kernels.cpu_layout import TILE, UNIT, Shape, Weight

_WEIGHT = "Tensor codes, Tensor scale, Tensor? zero_point, Tensor? bias"
_SHAPE = "int out_features, int in_features, int bits, int group_size, bool along_out"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_library = torch.library.Library("plquant", "DEF")
_library.define(f"linear(Tensor x, {_WEIGHT}, {_SHAPE}) -> Tensor")
_library.define(
    f"quantized_linear(Tensor x, {_WEIGHT}, {_SHAPE}, int x_bits, bool x_symmetric, Tensor? x_offset) -> Tensor"
)


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a weight with scales of this dtype has kernels on this device; without them the reference is used."""
    return device.type == "cpu" and dtype in _DTYPES and native.available()


def _expect(condition: bool, name: str, expected: str, given: object) -> None:
    if not condition:
        raise ValueError(f"Expected argument `{name}` to be {expected}, but got {given}")


@cache
def _sizes(shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the codes, and of the scale and zero-point; refuses what is no shape."""
    _expect(2 <= shape.bits <= 8, "bits", "2 to 8", shape.bits)
    width = shape.out_features if shape.along_out else shape.in_features
    fits = shape.group_size > 0 and width % shape.group_size == 0
    _expect(fits, "group_size", f"a divisor of {width}", shape.group_size)
    codes = (shape.padded_out // TILE, shape.padded_in // UNIT, shape.bits, UNIT)
    return codes, (shape.groups, shape.padded_in if shape.along_out else shape.padded_out)


def _check(x: Tensor, weight: Weight, bias: Tensor | None, shape: Shape, offset: Tensor | None = None) -> None:
    """Every argument fits the others."""
    if x.dtype not in _DTYPES:
        _expect(False, "x", "float32, bfloat16 or float16", x.dtype)
    codes, groups = _sizes(shape)
    if x.ndim == 0 or x.shape[-1] != shape.in_features:
        _expect(False, "x", f"of shape [..., {shape.in_features}]", list(x.shape))
    _check_tensor(x, "codes", weight.codes, (torch.int16,), codes)
    _check_tensor(x, "scale", weight.scale, _DTYPES, groups)
    if weight.zero_point is not None:
        _check_tensor(x, "zero_point", weight.zero_point, (torch.uint8,), groups)
    if bias is not None:
        _check_tensor(x, "bias", bias, (x.dtype,), (shape.out_features,))
    if offset is not None:
        _check_tensor(x, "x_offset", offset, (torch.float32,), (shape.in_features,))


def _check_tensor(x: Tensor, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], size: tuple[int, ...]) -> None:
    # The messages are made only when they are needed: at a token at a time all of this counts.
    if tensor.dtype not in dtypes:
        _expect(False, name, " or ".join(map(str, dtypes)), tensor.dtype)
    if tensor.shape != size:
        _expect(False, name, f"of shape {list(size)}", list(tensor.shape))
    if tensor.device != x.device:
        _expect(False, name, f"on {x.device} as `x` is", tensor.device)
    if not tensor.is_contiguous():
        _expect(False, name, "contiguous", f"strides {tensor.stride()}")


def _rows(x: Tensor, shape: Shape) -> Tensor:
    return x.reshape(-1, shape.in_features).contiguous()


def _linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, *sizes: Any
) -> Tensor:
    weight, shape = Weight(codes, scale, zero_point), Shape(*sizes)
    _check(x, weight, bias, shape)
    if x.numel() and has_kernels(x.device, scale.dtype):
        return cpu.linear(_rows(x, shape), weight, bias, shape).view(*x.shape[:-1], shape.out_features)
    return reference.linear(x, weight, bias, shape)


def _quantized_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, *sizes: Any
) -> Tensor:
    weight, shape, inputs = Weight(codes, scale, zero_point), Shape(*sizes[:5]), sizes[5:]
    _expect(2 <= inputs[0] <= 8, "x_bits", "2 to 8", inputs[0])
    _check(x, weight, bias, shape, inputs[2])
    if x.numel() == 0:
        return reference.linear(x, weight, bias, shape)
    if has_kernels(x.device, scale.dtype):
        rows = cpu.quantized_linear(_rows(x, shape), weight, bias, shape, *inputs)
        return rows.view(*x.shape[:-1], shape.out_features)
    return reference.quantized_linear(x, weight, bias, shape, *inputs)


def _fake(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, *rest: Any
) -> Tensor:
    shape = Shape(*rest[:5])
    _check(x, Weight(codes, scale, zero_point), bias, shape, rest[7] if len(rest) > 5 else None)
    return x.new_empty(*x.shape[:-1], shape.out_features)


# Other devices' kernels are called from the same two functions: until there are any, the reference is.
for _name, _implementation in (("linear", _linear), ("quantized_linear", _quantized_linear)):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"plquant::{_name}", _fake, lib=_library)

linear = torch.ops.plquant.linear
quantized_linear = torch.ops.plquant.quantized_linear
