"""The ops ``torch.ops.plquant.*``: schemas, checks, shapes for the compiler, and the choice of a kernel by device.

Both take activations [..., K] of fp32, bf16 or fp16, and a weight as ``layout.lay_out`` makes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plquant.kernels import cpu, native, reference
from plquant.kernels.layout import TILE, UNIT, Shape, Weight

_WEIGHT = "Tensor codes, Tensor scale, Tensor? zero_point, Tensor? bias"
_SHAPE = "int out_features, int in_features, int bits, int group_size, bool along_out"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_library = torch.library.Library("plquant", "DEF")
_library.define(f"linear(Tensor x, {_WEIGHT}, {_SHAPE}) -> Tensor")
_library.define(
    f"quantized_linear(Tensor x, {_WEIGHT}, {_SHAPE}, int x_bits, bool x_symmetric, Tensor? x_offset) -> Tensor"
)


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a weight with scales of this dtype, on this device, has kernels of its own; else the reference is used."""
    return device.type == "cpu" and dtype in _DTYPES and native.available()


def _expect(condition: bool, name: str, expected: str, given: object) -> None:
    if not condition:
        raise ValueError(f"Expected argument `{name}` to be {expected}, but got {given}")


def _check(
    x: Tensor, weight: Weight, bias: Tensor | None, shape: Shape, x_bits: int = 8, x_offset: Tensor | None = None
) -> None:
    """Every argument fits the others."""
    n, k = shape.out_features, shape.in_features
    _expect(2 <= shape.bits <= 8, "bits", "2 to 8", shape.bits)
    width = n if shape.along_out else k
    _expect(0 < shape.group_size and width % shape.group_size == 0, "group_size", f"a divisor of {width}", shape.group_size)
    _expect(x.dtype in _DTYPES, "x", "float32, bfloat16 or float16", x.dtype)
    _expect(x.ndim > 0 and x.shape[-1] == k, "x", f"of shape [..., {k}]", list(x.shape))
    codes = (shape.padded_out // TILE, shape.padded_in // UNIT, shape.bits, UNIT)
    groups = (shape.groups, shape.padded_in if shape.along_out else shape.padded_out)
    tensors: list[tuple[str, Tensor | None, tuple[torch.dtype, ...], tuple[int, ...]]] = [
        ("codes", weight.codes, (torch.int16,), codes),
        ("scale", weight.scale, _DTYPES, groups),
        ("zero_point", weight.zero_point, (torch.uint8,), groups),
        ("bias", bias, (x.dtype,), (n,)),
        ("x_offset", x_offset, (torch.float32,), (k,)),
    ]
    _expect(2 <= x_bits <= 8, "x_bits", "2 to 8", x_bits)
    for name, tensor, dtypes, size in tensors:
        if tensor is not None:
            _expect(tensor.dtype in dtypes, name, " or ".join(map(str, dtypes)), tensor.dtype)
            _expect(tensor.shape == size, name, f"of shape {list(size)}", list(tensor.shape))
            _expect(tensor.device == x.device, name, f"on {x.device} as `x` is", tensor.device)
            _expect(tensor.is_contiguous(), name, "contiguous", f"strides {tensor.stride()}")


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
    _check(x, weight, bias, shape, inputs[0], inputs[2])
    if x.numel() == 0:
        return reference.linear(x, weight, bias, shape)
    if has_kernels(x.device, scale.dtype):
        rows = cpu.quantized_linear(_rows(x, shape), weight, bias, shape, *inputs)
        return rows.view(*x.shape[:-1], shape.out_features)
    return reference.quantized_linear(x, weight, bias, shape, *inputs)


def _fake(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, *rest: Any) -> Tensor:
    shape = Shape(*rest[:5])
    inputs = {"x_bits": rest[5], "x_offset": rest[7]} if len(rest) > 5 else {}
    _check(x, Weight(codes, scale, zero_point), bias, shape, **inputs)
    return x.new_empty(*x.shape[:-1], shape.out_features)


# Other devices' kernels are called from the same two functions: until there are any, the reference is.
for _name, _implementation in (("linear", _linear), ("quantized_linear", _quantized_linear)):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"plquant::{_name}", _fake, lib=_library)

linear = torch.ops.plquant.linear
quantized_linear = torch.ops.plquant.quantized_linear
