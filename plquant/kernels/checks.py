"""What ops expect of their arguments: errors that name the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from plquant.kernels.cpu_layout import Shape
from plquant.kernels.native import MOST_KRONECKER_ORDER

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)


def expect(condition: bool, name: str, expected: str, given: object) -> None:
    """Raise if it does not hold."""
    if not condition:
        raise ValueError(f"Expected argument `{name}` to be {expected}, but got {given}")


def check_tensor(x: Tensor, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], size: tuple[int, ...]) -> None:
    """A contiguous tensor of one of these dtypes and this size, on the device of ``x``."""
    # The messages are made only when they are needed: at a token at a time all of this counts.
    if tensor.dtype not in dtypes:
        expect(False, name, " or ".join(map(str, dtypes)), tensor.dtype)
    if tensor.shape != size:
        expect(False, name, f"of shape {list(size)}", list(tensor.shape))
    if tensor.device != x.device:
        expect(False, name, f"on {x.device} as `x` is", tensor.device)
    if not tensor.is_contiguous():
        expect(False, name, "contiguous", f"strides {tensor.stride()}")


def check_factors(x: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """Of a Kronecker product with ``x``."""
    for name, matrix in (("left", left), ("right", right)):
        order = len(matrix)
        expect(order <= MOST_KRONECKER_ORDER, name, f"of at most {MOST_KRONECKER_ORDER} rows", order)
        check_tensor(x, name, matrix, (dtype,), (order, order))
    if x.shape[-1] != len(left) * len(right):
        expect(False, "x", f"of shape [..., {len(left) * len(right)}]", list(x.shape))


def check_kronecker(x: Tensor, left: Tensor, right: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """What a Kronecker product multiplies, all of one of these dtypes."""
    expect(x.dtype in dtypes, "x", " or ".join(map(str, dtypes)), x.dtype)
    check_factors(x, left, right, x.dtype)


def check_integer_weight(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    sums: Tensor,
    shape: Shape,
    dtype: torch.dtype,
) -> None:
    """The parts of an ``int_gemm.IntWeight``, and the dtype of the model, on the device of ``x``."""
    expect(dtype in HALVES, "dtype", "bfloat16 or float16", dtype)
    whole = not shape.along_out and shape.groups == 1
    expect(whole, "group_size", f"{shape.in_features}, one scale per output", shape.group_size)
    padded = -(-shape.in_features // 128) * 128
    check_tensor(x, "codes", codes, (torch.int8,), (shape.out_features, padded // 2 if shape.bits <= 4 else padded))
    check_tensor(x, "scale", scale, (torch.float32,), (shape.out_features,))
    check_tensor(x, "sums", sums, (torch.int32,), (shape.out_features,))
    if zero_point is not None:
        check_tensor(x, "zero_point", zero_point, (torch.int32,), (shape.out_features,))
