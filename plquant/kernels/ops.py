"""The ops ``torch.ops.plquant.*``: schemas, checks, and shapes for the compiler.

All take activations [..., K] of fp32, bf16 or fp16, and a weight in one of the layouts of ``run_time``:

    linear, quantized_linear                      ``cpu_layout.Weight``; in plain PyTorch where a CPU has no kernels
    few_rows, few_quantized_rows                  the same, of the few that ``run_time`` sends here; dispatch.cpp
    fragment_linear, fragment_quantized_linear    ``layout.PackedWeight``
    integer_linear                                ``int_gemm.IntWeight``; left, right and factor are of a Kronecker
                                                  product that activations are multiplied with before they are quantized

``kronecker`` is that product alone, on a GPU; ``cpu_kronecker`` on a CPU. ``dense_linear`` takes a plain weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plquant.kernels import cpu, layout, native, reference
from plquant.kernels.checks import (
    DTYPES,
    HALVES,
    check_factors,
    check_integer_weight,
    check_kronecker,
    check_tensor,
    expect,
)
from plquant.kernels.cpu_layout import TILE, UNIT, Shape, Weight

_WEIGHT = "Tensor codes, Tensor scale, Tensor? zero_point, Tensor? bias"
_FRAGMENTS = "Tensor codes, Tensor? high, Tensor scale, Tensor? zero_point, Tensor? bias"
INTEGERS = "Tensor codes, Tensor scale, Tensor? zero_point, Tensor sums, Tensor? bias"
SHAPE = "int out_features, int in_features, int bits, int group_size, bool along_out"
_INPUTS = "int x_bits, bool x_symmetric, Tensor? x_offset, Tensor? x_clip=None"

LIBRARY = torch.library.Library("plquant", "DEF")
LIBRARY.define(f"linear(Tensor x, {_WEIGHT}, {SHAPE}) -> Tensor")
LIBRARY.define(f"few_rows(Tensor x, {_WEIGHT}, {SHAPE}) -> Tensor")
LIBRARY.define(f"quantized_linear(Tensor x, {_WEIGHT}, {SHAPE}, {_INPUTS}) -> Tensor")
LIBRARY.define(f"few_quantized_rows(Tensor x, {_WEIGHT}, {SHAPE}, {_INPUTS}) -> Tensor")
LIBRARY.define(f"fragment_linear(Tensor x, {_FRAGMENTS}, {SHAPE}, float gain) -> Tensor")
LIBRARY.define(f"fragment_quantized_linear(Tensor x, {_FRAGMENTS}, {SHAPE}, float gain, {_INPUTS}) -> Tensor")
_FACTORS = "Tensor? left=None, Tensor? right=None, float factor=1.0"
LIBRARY.define(f"integer_linear(Tensor x, {INTEGERS}, {SHAPE}, ScalarType dtype, {_INPUTS}, {_FACTORS}) -> Tensor")
LIBRARY.define("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
for _name in ("kronecker", "cpu_kronecker"):
    LIBRARY.define(f"{_name}(Tensor x, Tensor left, Tensor right, float factor=1.0) -> Tensor")


@cache
def _sizes(shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the codes, and of the scale and zero-point; refuses what is no shape."""
    expect(2 <= shape.bits <= 8, "bits", "2 to 8", shape.bits)
    width = shape.out_features if shape.along_out else shape.in_features
    fits = shape.group_size > 0 and width % shape.group_size == 0
    expect(fits, "group_size", f"a divisor of {width}", shape.group_size)
    tiles = shape.padded_out // TILE
    scale = (shape.groups, shape.padded_in) if shape.along_out else (tiles, shape.groups, TILE)
    return (tiles, shape.padded_in // UNIT, shape.bits, UNIT), scale


def _check(x: Tensor, weight: Weight, bias: Tensor | None, shape: Shape, inputs: Sequence[Any] = ()) -> None:
    """Every argument fits the others."""
    codes, groups = _sizes(shape)
    _check_others(x, bias, shape, inputs)
    check_tensor(x, "codes", weight.codes, (torch.int16,), codes)
    check_tensor(x, "scale", weight.scale, DTYPES, groups)
    if weight.zero_point is not None:
        check_tensor(x, "zero_point", weight.zero_point, (torch.uint8,), groups)


def _check_others(x: Tensor, bias: Tensor | None, shape: Shape, inputs: Sequence[Any]) -> None:
    """What is no part of the weight; ``inputs`` are as ``run_time.Inputs``, or none."""
    if x.dtype not in DTYPES:
        expect(False, "x", "float32, bfloat16 or float16", x.dtype)
    if x.ndim == 0 or x.shape[-1] != shape.in_features:
        expect(False, "x", f"of shape [..., {shape.in_features}]", list(x.shape))
    if bias is not None:
        check_tensor(x, "bias", bias, (x.dtype,), (shape.out_features,))
    if not inputs:
        return
    bits, _, offset, clip = (*inputs, None)[:4]  # a default is not passed on
    if not 2 <= bits <= 8:
        expect(False, "x_bits", "2 to 8", bits)
    if offset is not None:
        check_tensor(x, "x_offset", offset, (torch.float32,), (shape.in_features,))
    if clip is not None:
        check_tensor(x, "x_clip", clip, (torch.float32,), (2,))


def _rows(x: Tensor, shape: Shape) -> Tensor:
    return x.reshape(-1, shape.in_features).contiguous()


def _linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, *sizes: Any
) -> Tensor:
    weight, shape = Weight(codes, scale, zero_point), Shape(*sizes)
    _check(x, weight, bias, shape)
    if x.numel() and _has_kernels(x.device):
        return cpu.linear(_rows(x, shape), weight, bias, shape).view(*x.shape[:-1], shape.out_features)
    return reference.linear(x, weight, bias, shape)


def _quantized_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, *sizes: Any
) -> Tensor:
    weight, shape, inputs = Weight(codes, scale, zero_point), Shape(*sizes[:5]), sizes[5:]
    _check(x, weight, bias, shape, inputs)
    if x.numel() == 0:
        return reference.linear(x, weight, bias, shape)
    if _has_kernels(x.device):
        rows = cpu.quantized_linear(_rows(x, shape), weight, bias, shape, *inputs)
        return rows.view(*x.shape[:-1], shape.out_features)
    return reference.quantized_linear(x, weight, bias, shape, *inputs)


def _fake(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, *rest: Any
) -> Tensor:
    shape = Shape(*rest[:5])
    _check(x, Weight(codes, scale, zero_point), bias, shape, rest[5:])
    return x.new_empty(*x.shape[:-1], shape.out_features)


def _check_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    expect(x.dtype in DTYPES, "x", "float32, bfloat16 or float16", x.dtype)
    expect(weight.ndim == 2, "weight", "of two dimensions", list(weight.shape))
    fits = x.ndim > 0 and x.shape[-1] == weight.shape[1]
    expect(fits, "x", f"of shape [..., {weight.shape[1]}]", list(x.shape))
    check_tensor(x, "weight", weight, (x.dtype,), (*weight.shape,))
    if bias is not None:
        check_tensor(x, "bias", bias, (x.dtype,), (len(weight),))


def _dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check_dense(x, weight, bias)
    rows = x.reshape(-1, weight.shape[1]).contiguous()  # of more dimensions torch may copy the weight
    product = cpu.dense_linear if _has_kernels(x.device) else F.linear
    return product(rows, weight, bias).view(*x.shape[:-1], len(weight))


def _fake_dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check_dense(x, weight, bias)
    return x.new_empty(*x.shape[:-1], len(weight))


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cpu" and native.available()


# ---- GPU -------------------------------------------------------------------------------------------------------------


def _fragments(
    x: Tensor, parts: tuple[Tensor, Tensor | None, Tensor, Tensor | None], bias: Tensor | None, *rest: Any
) -> layout.PackedWeight:
    """The weight of these arguments, checked."""
    shape, gain, inputs = Shape(*rest[:5]), rest[5], rest[6:]
    _check_others(x, bias, shape, inputs)
    axis = layout.axis_name(shape.along_out)
    problem = layout.why_not((shape.out_features, shape.in_features), shape.bits, shape.group_size, axis)
    if problem is not None:
        raise ValueError(f"Expected arguments that the kernels' layout allows, but {problem}")
    codes, high, scale, zero_point = parts
    sizes = layout.plane_sizes(*shape[:3])
    planes = [plane for plane in (codes, high) if plane is not None]
    expect(len(planes) == len(sizes), "high", f"{'a' if len(sizes) == 2 else 'no'} second plane", high)
    for name, plane, size in zip(("codes", "high"), planes, sizes, strict=False):
        check_tensor(x, name, plane, (torch.int32,), size)
    rows, columns = layout.padded_size(*shape[:3])
    groups = (shape.groups, columns if shape.along_out else rows)
    check_tensor(x, "scale", scale, HALVES, groups)
    if zero_point is not None:
        check_tensor(x, "zero_point", zero_point, (scale.dtype,), groups)
    return layout.packed_weight(parts, shape, gain)


def _fragment_linear(
    x: Tensor,
    codes: Tensor,
    high: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> Tensor:
    weight, inputs = _fragments(x, (codes, high, scale, zero_point), bias, *rest), rest[6:]
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:-1], weight.out_features)
    from plquant.kernels import gpu  # needs triton

    rows = x.reshape(-1, weight.in_features).contiguous()
    out = gpu.quantized_linear(rows, weight, bias, *inputs) if inputs else gpu.linear(rows, weight, bias)
    return out.view(*x.shape[:-1], weight.out_features)


def _fake_fragment_linear(
    x: Tensor,
    codes: Tensor,
    high: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], _fragments(x, (codes, high, scale, zero_point), bias, *rest).out_features)


def _check_integers(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    sums: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> Shape:
    shape, dtype, inputs = Shape(*rest[:5]), rest[5], rest[6:]
    _check_others(x, bias, shape, inputs)
    check_integer_weight(x, codes, scale, zero_point, sums, shape, dtype)
    left, right = (*inputs, None, None, None)[4:6]
    if left is not None and right is not None:
        check_factors(x, left, right, dtype)
        expect(len(inputs) < 4 or inputs[3] is None, "x_clip", "None beside `left`", "a tensor")
    return shape


def _kronecker(x: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    check_kronecker(x, left, right, HALVES)
    if x.numel() == 0:
        return torch.empty_like(x)
    from plquant.kernels import kronecker  # needs triton

    return kronecker.apply(x.reshape(-1, x.shape[-1]), left, right, factor).view(x.shape)


def _cpu_kronecker(x: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    check_kronecker(x, left, right, (torch.bfloat16,))
    product = native.kronecker if x.numel() and _has_kernels(x.device) else reference.kronecker
    return product(x.reshape(-1, x.shape[-1]).contiguous(), left, right, factor).view(x.shape)


def _fake_kronecker(x: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    check_kronecker(x, left, right, HALVES)
    return x.new_empty(x.shape)


def _fake_cpu_kronecker(x: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    check_kronecker(x, left, right, (torch.bfloat16,))
    return x.new_empty(x.shape)


def _integer_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    sums: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> Tensor:
    shape = _check_integers(x, codes, scale, zero_point, sums, bias, *rest)
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:-1], shape.out_features)
    from plquant.kernels import gpu, int_gemm  # need triton

    weight = int_gemm.int_weight(codes, scale, zero_point, sums, shape.bits, shape.in_features)
    return gpu.integer_linear(_rows(x, shape), weight, bias, *rest[5:]).view(*x.shape[:-1], shape.out_features)


def _fake_integer_linear(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], _check_integers(x, *arguments).out_features)


def implement(name: str, implementation: Callable[..., Tensor], shapes: Callable[..., Tensor]) -> None:
    """Give an op of the library what it does, and what tells the compiler the shape of the result."""
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"plquant::{name}", shapes, lib=LIBRARY)


implement("linear", _linear, _fake)
implement("few_rows", _linear, _fake)
implement("quantized_linear", _quantized_linear, _fake)
implement("few_quantized_rows", _quantized_linear, _fake)
implement("fragment_linear", _fragment_linear, _fake_fragment_linear)
implement("fragment_quantized_linear", _fragment_linear, _fake_fragment_linear)
implement("integer_linear", _integer_linear, _fake_integer_linear)
implement("kronecker", _kronecker, _fake_kronecker)
implement("cpu_kronecker", _cpu_kronecker, _fake_cpu_kronecker)
implement("dense_linear", _dense_linear, _fake_dense_linear)

linear = torch.ops.plquant.linear
few_rows = torch.ops.plquant.few_rows
quantized_linear = torch.ops.plquant.quantized_linear
few_quantized_rows = torch.ops.plquant.few_quantized_rows
fragment_linear = torch.ops.plquant.fragment_linear
fragment_quantized_linear = torch.ops.plquant.fragment_quantized_linear
integer_linear = torch.ops.plquant.integer_linear
kronecker = torch.ops.plquant.kronecker
cpu_kronecker = torch.ops.plquant.cpu_kronecker
dense_linear = torch.ops.plquant.dense_linear
