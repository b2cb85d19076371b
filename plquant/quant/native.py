"""Quantize a weight on a CPU, by fake_quantize.cpp: a step's quantizers take a third of the time of ``in_pieces``."""

from __future__ import annotations

import ctypes
import sys
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from plquant.native import compiler, library
from plquant.quant.grid import IntGrid
from plquant.quant.grouped import Gradients, GroupedWeight, Ranges

SOURCE = Path(__file__).with_name("fake_quantize.cpp")
# No contraction: a * b + c in one rounding would give other codes than the operations that this repeats.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
VECTORS = {  # what torch itself found the CPU to have
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
FLOATS = (torch.float32, torch.bfloat16)


class _Weight(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("groups", "inner", "outer", "low", "high", "nudge", "ranges")],
        *[(name, ctypes.c_int64) for name in ("rows", "per_row", "size")],
        *[(name, ctypes.c_int32) for name in ("dtype", "scale_dtype", "qmin", "qmax", "symmetric", "threads")],
    ]


class _Gradients(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("groups", "inner", "outer", "low", "high", "nudge")]


def takes(weight: GroupedWeight, scale_dtype: torch.dtype, values: Tensor) -> bool:
    """Whether a weight of these dtypes, to be rounded to ``values`` or with their gradient, is for ``quantize``."""
    parameters = (tensor for tensor in weight[1:] if tensor is not None)
    return (
        weight.groups.device.type == "cpu"
        and weight.groups.dtype in FLOATS
        and scale_dtype in FLOATS
        and values.dtype in DTYPES
        and all(tensor.dtype == torch.float32 for tensor in parameters)
        and available()
    )


def quantize(weight: GroupedWeight, grid: IntGrid, scale_dtype: torch.dtype, out: Tensor) -> Ranges:
    """As ``in_pieces.quantize``, for weights that it ``takes``."""
    ranges = torch.empty(len(Ranges._fields), *weight.groups.shape[:2], 1)
    weight = _contiguous(weight)
    _library().plquant_quantize(_described(weight, ranges, grid, scale_dtype), out.data_ptr(), DTYPES[out.dtype])
    return Ranges(*ranges)


def gradients(
    weight: GroupedWeight, ranges: Ranges, grid: IntGrid, grad: Tensor, needed: tuple[bool, ...]
) -> Gradients:
    """As ``in_pieces.gradients``, for weights that it ``takes``."""
    weight, grad = _contiguous(weight), grad.contiguous()
    found = [torch.empty_like(t) if t is not None and asked else None for t, asked in zip(weight, needed, strict=True)]
    if needed[3] != needed[4]:  # both ends come from one sum
        found[3], found[4] = (torch.empty_like(ranges.low) for _ in range(2))
    threads = torch.get_num_threads()
    inner = None if found[1] is None else weight.groups.new_zeros(threads, *found[1].shape, dtype=torch.float32)
    pointers = _Gradients(*[_pointer(tensor) for tensor in (found[0], inner, *found[2:])])
    kept = torch.stack(ranges)
    described = _described(weight, kept, grid, torch.float32)  # whose scale is rounded already
    _library().plquant_quantize_backward(described, grad.data_ptr(), DTYPES[grad.dtype], pointers)
    if inner is not None and weight.inner is not None:
        found[1] = inner.sum(0).div_(weight.inner)
    if found[2] is not None and weight.outer is not None:
        found[2].div_(weight.outer)
    return tuple(tensor if asked else None for tensor, asked in zip(found, needed, strict=True))


@cache
def available() -> bool:
    """Whether this machine can build it; if not a warning says, once, what is missing."""
    missing = "" if sys.platform == "linux" else f"it is built on Linux only, not on {sys.platform}"
    if compiler() is None:
        missing = "there is no C++ compiler; install g++ or clang++, or name one in CXX"
    if missing:
        warnings.warn(
            f"a calibration step quantizes by plain PyTorch operations, which is slow: {missing}", stacklevel=2
        )
    return not missing


def _contiguous(weight: GroupedWeight) -> GroupedWeight:
    groups, *others = weight
    return GroupedWeight(groups.contiguous(), *(None if tensor is None else tensor.contiguous() for tensor in others))


def _described(weight: GroupedWeight, ranges: Tensor, grid: IntGrid, scale_dtype: torch.dtype) -> _Weight:
    return _Weight(
        *[_pointer(tensor) for tensor in weight],
        ranges.data_ptr(),
        *weight.groups.shape,
        *[DTYPES[weight.groups.dtype], DTYPES[scale_dtype]],
        *[grid.qmin, grid.qmax, grid.symmetric, torch.get_num_threads()],
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _library() -> ctypes.CDLL:
    found = library(SOURCE, *FLAGS, *VECTORS.get(torch.backends.cpu.get_cpu_capability(), []))
    weight, gradients, pointer, number = (
        ctypes.POINTER(_Weight),
        ctypes.POINTER(_Gradients),
        ctypes.c_void_p,
        ctypes.c_int32,
    )
    found.plquant_quantize.argtypes = [weight, pointer, number]
    found.plquant_quantize_backward.argtypes = [weight, pointer, number, gradients]
    return found
