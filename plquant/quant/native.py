"""Quantize weights and activations on a CPU, by quantize.cpp, in a third of the time of plain operations."""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from plquant.native import library, missing
from plquant.quant.grid import IntGrid
from plquant.quant.grouped import Gradients, GroupedWeight, Ranges

SOURCE = Path(__file__).with_name("quantize.cpp")
# No contraction: a * b + c in one rounding would give other codes than the operations that this repeats.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
VECTORS = {  # what torch itself found the CPU to have
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
FLOATS = (torch.float32, torch.bfloat16)
STRETCHES = 64  # as in the C++


class _Grid(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("qmin", "qmax", "symmetric", "scale_dtype")]

    @classmethod
    def of(cls, grid: IntGrid, scale_dtype: torch.dtype) -> _Grid:
        return cls(grid.qmin, grid.qmax, grid.symmetric, DTYPES[scale_dtype])


class _Weight(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("groups", "inner", "outer", "low", "high", "nudge", "ranges")],
        *[(name, ctypes.c_int64) for name in ("rows", "per_row", "size")],
        *[("grid", _Grid), ("dtype", ctypes.c_int32), ("threads", ctypes.c_int32)],
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("values", "offset", "low", "high")],
        *[(name, ctypes.c_int64) for name in ("rows", "size")],
        *[("grid", _Grid), ("dtype", ctypes.c_int32), ("threads", ctypes.c_int32)],
    ]


class _WeightGradients(ctypes.Structure):
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
    ranges = _floats(len(Ranges._fields), *weight.groups.shape[:2], 1)
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
    inner = None if found[1] is None else _floats(STRETCHES, *found[1].shape).zero_()
    pointers = _WeightGradients(*[_pointer(tensor) for tensor in (found[0], inner, *found[2:])])
    kept = torch.stack(ranges)
    described = _described(weight, kept, grid, torch.float32)  # whose scale is rounded already
    _library().plquant_quantize_backward(described, grad.data_ptr(), DTYPES[grad.dtype], pointers)
    if inner is not None and weight.inner is not None:
        found[1] = inner.sum(0).div_(weight.inner)
    if found[2] is not None and weight.outer is not None:
        found[2].div_(weight.outer)
    return tuple(tensor if asked else None for tensor, asked in zip(found, needed, strict=True))


def takes_rows(rows: Tensor, parameters: Iterable[Tensor | None], values: Tensor) -> bool:
    """Whether activations of this dtype, with such an offset and clipping, are for ``quantize_rows``."""
    return (
        rows.device.type == "cpu"
        and rows.dtype in FLOATS
        and values.dtype in DTYPES
        and all(tensor is None or tensor.dtype == torch.float32 for tensor in parameters)
        and available()
    )


def quantize_rows(
    rows: Tensor, offset: Tensor | None, low: Tensor | None, high: Tensor | None, grid: IntGrid, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Round every row to the grid of its own range, for rows that it ``takes_rows``.

    Args:
        rows: [R, K], contiguous.
        offset: [K], added to ``x / scale`` before rounding.
        low: Kept share of the lower end of every range, a scalar.
        high: Of the upper end.
        grid: Bits and symmetry.
        out: [R, K], becomes the values n s, or the codes n + z if its dtype is one of integers.

    Returns:
        Scale and zero-point, each fp32 [R, 1].
    """
    found = _floats(2, len(rows), 1)
    offset = None if offset is None else offset.contiguous()
    described = _described_rows(rows, offset, low, high, grid)
    pointers = out.data_ptr(), DTYPES[out.dtype], found[0].data_ptr(), found[1].data_ptr()
    _library().plquant_quantize_rows(described, *pointers)
    return found[0], found[1]


def rows_to_bytes(rows: Tensor, grid: IntGrid, out: Tensor) -> None:
    """As ``token_bytes``, for rows that it ``takes_rows``.

    Args:
        rows: [R, K], contiguous.
        grid: Bits and symmetry.
        out: uint8 [R, N], contiguous.
    """
    described = _described_rows(rows, None, None, None, grid)
    _library().plquant_rows_to_bytes(described, out.data_ptr(), out.shape[1], grid.bits)


def rows_from_bytes(rows: Tensor, grid: IntGrid, out: Tensor) -> None:
    """The inverse: ``rows`` is [R, N], ``out`` [R, K]."""
    described = _described_rows(out, None, None, None, grid)
    _library().plquant_rows_from_bytes(described, rows.data_ptr(), rows.shape[1], grid.bits, out.data_ptr())


def row_gradients(
    rows: Tensor, offset: Tensor | None, low: Tensor | None, high: Tensor | None, grid: IntGrid, grad: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the rows and of the two shares.

    Args:
        rows: As for ``quantize_rows``.
        offset: As there.
        low: As there.
        high: As there.
        grid: As there.
        grad: That of the values, in the dtype of the rows.
    """
    g_rows, shares = torch.empty_like(rows), None if low is None else _floats(2, len(rows))
    offset, grad = None if offset is None else offset.contiguous(), grad.contiguous()
    pointers = (None, None) if shares is None else (shares[0].data_ptr(), shares[1].data_ptr())
    described = _described_rows(rows, offset, low, high, grid)
    _library().plquant_quantize_rows_backward(described, grad.data_ptr(), g_rows.data_ptr(), *pointers)
    return g_rows, *((None, None) if shares is None else shares.sum(1))


@cache
def available() -> bool:
    """Whether this machine can build it; if not a warning says, once, what is missing."""
    reason = missing(_library) if sys.platform == "linux" else f"it is built on Linux only, not on {sys.platform}"
    if reason:
        warnings.warn(
            f"a calibration step quantizes by plain PyTorch operations, which is slow: {reason}", stacklevel=2
        )
    return not reason


def _floats(*shape: int) -> Tensor:
    """Memory for what C++ writes, whatever the default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _contiguous(weight: GroupedWeight) -> GroupedWeight:
    groups, *others = weight
    return GroupedWeight(groups.contiguous(), *(None if tensor is None else tensor.contiguous() for tensor in others))


def _described(weight: GroupedWeight, ranges: Tensor, grid: IntGrid, scale_dtype: torch.dtype) -> _Weight:
    return _Weight(
        *[_pointer(tensor) for tensor in weight],
        ranges.data_ptr(),
        *weight.groups.shape,
        *[_Grid.of(grid, scale_dtype), DTYPES[weight.groups.dtype], torch.get_num_threads()],
    )


def _described_rows(
    rows: Tensor, offset: Tensor | None, low: Tensor | None, high: Tensor | None, grid: IntGrid
) -> _Rows:
    return _Rows(
        *[_pointer(tensor) for tensor in (rows, offset, low, high)],
        *rows.shape,
        *[_Grid.of(grid, torch.float32), DTYPES[rows.dtype], torch.get_num_threads()],
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _library() -> ctypes.CDLL:
    found = library(SOURCE, *FLAGS, *VECTORS.get(torch.backends.cpu.get_cpu_capability(), []))
    weight, rows, pointer, number = ctypes.POINTER(_Weight), ctypes.POINTER(_Rows), ctypes.c_void_p, ctypes.c_int32
    found.plquant_quantize.argtypes = [weight, pointer, number]
    found.plquant_quantize_backward.argtypes = [weight, pointer, number, ctypes.POINTER(_WeightGradients)]
    found.plquant_quantize_rows.argtypes = [rows, pointer, number, pointer, pointer]
    found.plquant_quantize_rows_backward.argtypes = [rows, pointer, pointer, pointer, pointer]
    found.plquant_rows_to_bytes.argtypes = [rows, pointer, ctypes.c_int64, number]
    found.plquant_rows_from_bytes.argtypes = [rows, pointer, ctypes.c_int64, number, pointer]
    return found
