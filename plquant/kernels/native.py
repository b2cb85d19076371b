"""The compiled half of the CPU kernels: cpu.cpp, amx.cpp where the CPU has AMX, and dispatch.cpp for torch to call."""

from __future__ import annotations

import ctypes
import platform
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plquant.kernels.cpu_layout import Shape, Weight
from plquant.native import library, missing

SOURCE, AMX_SOURCE, DISPATCH_SOURCE = (
    Path(__file__).with_name(name) for name in ("cpu.cpp", "amx.cpp", "dispatch.cpp")
)
FLAGS = ["-O2", "-ffp-contract=off", "-mfma", "-mf16c"]
VECTORS = {  # of vectors.h, the better first: what a CPU must have besides FMA and F16C
    "AVX512": ["avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni"],
    "AVX2": ["avx2"],
}
AMX_FLAGS = ["-mamx-tile", "-mamx-int8", "-mamx-bf16"]
TORCH = Path(torch.__file__).parent
BUILT_FOR = torch.__version__.translate(str.maketrans(".+-", "___"))  # each torch has a library of its own
DISPATCH_FLAGS = [
    *[f"-DTORCH_{BUILT_FOR}", f"-ffile-prefix-map={DISPATCH_SOURCE.parent}=."],
    *[f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}"],
]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PARTS = {torch.float32: 3, torch.bfloat16: 1, torch.float16: 2}  # bf16 numbers whose sum an activation is
MOST_DENSE_ROWS = 4  # of bf16 that meet a weight of bf16, at once
MOST_DISPATCHED_ROWS = 4  # that ``ops.few_rows`` takes: more of them gain nothing
MOST_INTEGER_INPUTS = ((1 << 31) - 1) // 255**2  # whose sum of products fits 32 bits, whatever the codes
MOST_KRONECKER_ORDER = 128  # of a factor; the largest that fits in a GPU's registers


DISPATCHED = ("few_rows", "integer_rows", "quantize_rows", "kronecker")


class _Kernels(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in DISPATCHED],
        *[(name, ctypes.c_int64) for name in ("most_rows", "most_inputs", "most_order")],
    ]


class _Weight(ctypes.Structure):
    _fields_ = [
        *[("codes", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("zero_point", ctypes.c_void_p)],
        *[(name, ctypes.c_int64) for name in ("out_features", "in_features", "group_size")],
        *[(name, ctypes.c_int32) for name in ("bits", "along_out", "scale_dtype", "threads")],
    ]


def _described(weight: Weight, shape: Shape) -> _Weight:
    return _Weight(
        *[weight.codes.data_ptr(), weight.scale.data_ptr(), _pointer(weight.zero_point)],
        *[shape.out_features, shape.in_features, shape.group_size, shape.bits, shape.along_out],
        *[DTYPES[weight.scale.dtype], torch.get_num_threads()],
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def few_rows(
    x: Tensor,
    weight: Weight,
    shape: Shape,
    bias: Tensor | None,
    dtype: torch.dtype,
    parts: int,
    row_scale: Tensor | None = None,
) -> Tensor:
    """``x W^T row_scale + bias``.

    Args:
        x: [M, K], contiguous.
        weight: The weight.
        shape: Its shape.
        bias: [N] of ``dtype``, or ``None``.
        dtype: Of the result.
        parts: Numbers that each activation is split into, ``parts(x.dtype)``; 1 if they are integers below 257.
        row_scale: fp32 [M], or ``None``.

    Returns:
        [M, N].
    """
    out = x.new_empty(x.shape[0], shape.out_features, dtype=dtype)
    _library().plquant_few_rows(
        *[_described(weight, shape), x.data_ptr(), DTYPES[x.dtype], parts, x.shape[0], _pointer(row_scale)],
        *[_pointer(bias), out.data_ptr(), DTYPES[dtype]],
    )
    return out


def dense_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` of plain bf16, all contiguous: [M, K], [N, K], [N]; M from 1 to ``MOST_DENSE_ROWS``."""
    out = x.new_empty(len(x), len(weight))
    _library().plquant_dense_rows(
        *[x.data_ptr(), weight.data_ptr(), _pointer(bias), out.data_ptr(), *out.shape, x.shape[1]],
        torch.get_num_threads(),
    )
    return out


def dequantize(weight: Weight, shape: Shape, tiles: slice, out: Tensor) -> None:
    """Some tiles of the weight, transposed, into ``out``: [K, outputs of these tiles], contiguous."""
    _library().plquant_dequantize(
        *[_described(weight, shape), tiles.start, tiles.stop, out.shape[1], out.data_ptr(), DTYPES[out.dtype]]
    )


def quantize_rows(
    x: Tensor, bits: int, symmetric: bool, offset: Tensor | None, clip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Steps ``code - zero_point``, fp32 [M, K], and scales, fp32 [M], of rows [M, K], contiguous."""
    steps, scales = torch.empty_like(x, dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.float32)
    _library().plquant_quantize_rows(
        *[x.data_ptr(), DTYPES[x.dtype], *x.shape, bits, symmetric],
        *[_pointer(offset), _pointer(clip), steps.data_ptr(), scales.data_ptr(), None, None, None],
        torch.get_num_threads(),
    )
    return steps, scales


class Codes(NamedTuple):
    """Rows of activations as signed codes, x = scale (code - zero_point).

    Attributes:
        codes: int8 [M, K].
        scale: fp32 [M].
        zero_point: int32 [M].
        sums: int32 [M], of the codes of each row.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    sums: Tensor


def row_codes(x: Tensor, bits: int, symmetric: bool, offset: Tensor | None, clip: Tensor | None = None) -> Codes:
    """The codes behind ``quantize_rows``."""
    zero_point, sums = x.new_empty(2, x.shape[0], dtype=torch.int32)
    found = Codes(torch.empty_like(x, dtype=torch.int8), torch.empty_like(sums, dtype=torch.float32), zero_point, sums)
    _library().plquant_quantize_rows(
        *[x.data_ptr(), DTYPES[x.dtype], *x.shape, bits, symmetric],
        *[_pointer(offset), _pointer(clip), None, found.scale.data_ptr(), found.codes.data_ptr()],
        *[zero_point.data_ptr(), sums.data_ptr(), torch.get_num_threads()],
    )
    return found


def integer_rows(x: Codes, weight: Weight, shape: Shape, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x W^T + bias``, [M, N] of ``dtype``; groups along the input."""
    out = x.scale.new_empty(len(x.codes), shape.out_features, dtype=dtype)
    _library().plquant_integer_rows(
        *[_described(weight, shape), x.codes.data_ptr(), len(x.codes), x.scale.data_ptr(), x.zero_point.data_ptr()],
        *[_pointer(bias), out.data_ptr(), DTYPES[dtype]],
    )
    return out


def many_rows(
    x: Tensor | Codes,
    weight: Weight,
    shape: Shape,
    bias: Tensor | None,
    dtype: torch.dtype,
    row_scale: Tensor | None = None,
) -> Tensor:
    """``x W^T row_scale + bias`` with AMX: needs ``amx()``.

    Args:
        x: bf16 [M, K], contiguous, or codes, with one group along the input.
        weight: The weight.
        shape: Its shape.
        bias: [N] of ``dtype``, or ``None``.
        dtype: Of the result.
        row_scale: fp32 [M], or ``None``; codes have their own.

    Returns:
        [M, N].
    """
    values, scale, *more = x if isinstance(x, Codes) else (x, row_scale, None, None)
    assert values is not None
    out = values.new_empty(len(values), shape.out_features, dtype=dtype)
    _amx_library().plquant_many_rows(
        *[_described(weight, shape), values.data_ptr(), len(values), _pointer(scale), *map(_pointer, more)],
        *[_pointer(bias), out.data_ptr(), DTYPES[dtype]],
    )
    return out


def kronecker(x: Tensor, left: Tensor, right: Tensor, factor: float) -> Tensor:
    """``factor x (L^T kron R)``: x [M, n1 n2], L [n1, n1], R [n2, n2], all bf16 and contiguous."""
    out = torch.empty_like(x)
    _library().plquant_kronecker(
        *[tensor.data_ptr() for tensor in (x, left, right)],
        *[factor, out.data_ptr(), len(x), len(left), len(right), torch.get_num_threads()],
    )
    return out


@cache
def vectors() -> str:
    """Of ``VECTORS`` those that the kernels are compiled for, the best that the CPU has; empty: it has none."""
    return next((name for name, needed in VECTORS.items() if {"fma", "f16c", *needed} <= _cpu_flags()), "")


def parts(dtype: torch.dtype) -> int:
    """Into how many numbers an activation of this dtype is split; AVX2 multiplies in fp32."""
    return PARTS[dtype] if vectors() == "AVX512" else 1


@cache
def amx() -> bool:
    """Whether the CPU has AMX, the system lets us use it, and the compiler knows it."""
    has_tiles = vectors() == "AVX512" and {"amx_tile", "amx_int8", "amx_bf16"} <= _cpu_flags()
    try:
        return has_tiles and bool(_amx_library().plquant_amx_start())
    except (OSError, RuntimeError):
        return False


@cache
def available() -> bool:
    """Whether this machine has what the kernels need; if not a warning says, once, what is missing."""
    reason = _missing()
    if reason:
        warnings.warn(f"plquant runs its plain PyTorch path, which is slow: {reason}", stacklevel=2)
    return not reason


@cache
def dispatch_() -> None:
    """Have ops of few rows called without Python; where that cannot be had a warning says, once, why."""
    if not available():
        return
    too_old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10)
    reason = "that needs torch 2.10 or later" if too_old else missing(_dispatch_library)
    if reason:
        warnings.warn(f"plquant cannot have torch call its kernels directly, which is faster: {reason}", stacklevel=2)


@cache
def _dispatch_library() -> ctypes.CDLL:
    kernels = [ctypes.cast(getattr(_library(), f"plquant_{name}"), ctypes.c_void_p) for name in DISPATCHED]
    found = library(DISPATCH_SOURCE, *_flags(vectors()), *DISPATCH_FLAGS)
    found.plquant_dispatch.argtypes = [ctypes.POINTER(_Kernels)]
    found.plquant_dispatch(_Kernels(*kernels, MOST_DISPATCHED_ROWS, MOST_INTEGER_INPUTS, MOST_KRONECKER_ORDER))
    return found


def _missing() -> str:
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"it has kernels for x86, not for {platform.machine()}"
    if sys.platform != "linux":
        return f"it is built on Linux only, not on {sys.platform}"
    return missing(_library) if vectors() else "the CPU lacks AVX2, FMA or F16C"


@cache
def _cpu_flags() -> frozenset[str]:
    if sys.platform != "linux":
        return frozenset()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def _flags(vectors: str) -> list[str]:
    return [*FLAGS, *(f"-m{name.replace('_', '')}" for name in VECTORS[vectors])]


def _library() -> ctypes.CDLL:
    return _library_of(vectors())


@cache
def _library_of(vectors: str) -> ctypes.CDLL:
    found = library(SOURCE, *_flags(vectors))
    weight, pointer, wide, narrow = ctypes.POINTER(_Weight), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    few: list[Any] = [weight, pointer, narrow, narrow, wide, pointer, pointer, pointer, narrow]
    many: list[Any] = [weight, wide, wide, wide, pointer, narrow]
    rows: list[Any] = [pointer, narrow, wide, wide, narrow, narrow, *[pointer] * 7, narrow]
    integers: list[Any] = [weight, pointer, wide, *[pointer] * 4, narrow]
    dense: list[Any] = [*[pointer] * 4, *[wide] * 3, narrow]
    product: list[Any] = [*[pointer] * 3, ctypes.c_float, pointer, *[wide] * 3, narrow]
    found.plquant_dense_rows.argtypes = dense
    found.plquant_few_rows.argtypes = few
    found.plquant_dequantize.argtypes = many
    found.plquant_quantize_rows.argtypes = rows
    found.plquant_integer_rows.argtypes = integers
    found.plquant_kronecker.argtypes = product
    return found


@cache
def _amx_library() -> ctypes.CDLL:
    found = library(AMX_SOURCE, *_flags("AVX512"), *AMX_FLAGS)
    pointer, wide = ctypes.c_void_p, ctypes.c_int64
    found.plquant_many_rows.argtypes = [ctypes.POINTER(_Weight), pointer, wide, *[pointer] * 5, ctypes.c_int32]
    return found
