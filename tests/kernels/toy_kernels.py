"""Small kernels that the test tools are tested with."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def arithmetic(x_ptr, y_ptr, o_ptr, SIZE: tl.constexpr):
    """o = 2 x y - int(y) in the dtype of o."""
    offsets = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offsets)
    y = tl.load(y_ptr + offsets)
    tl.store(o_ptr + offsets, _twice(x) * y - y.to(tl.int32).to(x.dtype))


@triton.jit
def row_sums(x_ptr, o_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """o[r] = sum of x[r]."""
    rows = tl.arange(0, ROWS)
    x = tl.load(x_ptr + rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    tl.store(o_ptr + rows, tl.sum(x, axis=1))


@triton.jit
def product(x_ptr, y_ptr, o_ptr, SIZE: tl.constexpr):
    """o = x y, all [SIZE, SIZE], accumulated in the dtype of o (fp32 or int32)."""
    r = tl.arange(0, SIZE)
    at = r[:, None] * SIZE + r[None, :]
    tl.store(o_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at), out_dtype=o_ptr.dtype.element_ty))


@triton.jit
def halves_swapped(x_ptr, o_ptr, SIZE: tl.constexpr):
    """Both fp16 of an int32 swapped, then the low half cleared, by inline PTX."""
    offsets = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offsets)
    x = tl.inline_asm_elementwise(
        "{ .reg .b32 t; prmt.b32 t, $1, 0, 0x1032; and.b32 $0, t, 0xffff0000; }",
        "=r,r",
        [x],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
    tl.store(o_ptr + offsets, x)


@triton.jit
def copy_rows(x_ptr, o_ptr, columns, stride, BLOCK: tl.constexpr):
    """A program copies one row, masked to its columns; every program reads the first row too."""
    offsets = tl.arange(0, BLOCK)
    mask = offsets < columns
    first = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    x = tl.load(x_ptr + tl.program_id(0) * stride + offsets, mask=mask, other=0.0)
    tl.store(o_ptr + tl.program_id(0) * stride + offsets, x + 0.0 * first, mask=mask)
