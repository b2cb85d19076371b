"""f x (L^T kron R) as f (L X) R, X [n1, n2] the row x, and the codes of it: one launch, a row in registers each."""

from __future__ import annotations

import triton
import triton.language as tl

from plquant.kernels.token_quantize_kernel import choose_codes


@triton.jit
def kronecker_kernel(
    x_ptr,
    left_ptr,
    right_ptr,
    out_ptr,
    offset_ptr,
    scale_ptr,
    zero_ptr,
    sum_ptr,
    stride_x,
    stride_out,
    n1,
    n2,
    factor,
    QUANTIZE: tl.constexpr,
    OFFSET: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
):
    """``out``: the rows themselves, or int8 codes with QUANTIZE; N1 and N2 are powers of two and hold n1 and n2.

    Codes, and all that belongs to them, are ``stride_out`` bytes from those of the row before.

    ``factor`` is multiplied with the sums of the second product. Both products are rounded to the dtype of x, as two
    modules one after the other round them.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0)
    i, j = tl.arange(0, N1), tl.arange(0, N2)
    inside = (i < n1)[:, None] & (j < n2)[None, :]
    at = i[:, None] * n2 + j[None, :]
    x = tl.load(x_ptr + row.to(tl.int64) * stride_x + at, mask=inside, other=0.0)
    k = tl.arange(0, N1)
    left = tl.load(left_ptr + i[:, None] * n1 + k[None, :], mask=(i < n1)[:, None] & (k < n1)[None, :], other=0.0)
    k = tl.arange(0, N2)
    right = tl.load(right_ptr + k[:, None] * n2 + j[None, :], mask=(k < n2)[:, None] & (j < n2)[None, :], other=0.0)
    half = tl.dot(left, x).to(DTYPE)
    y = (tl.dot(half, right) * factor).to(DTYPE)
    out_at = out_ptr + row.to(tl.int64) * stride_out + at
    if not QUANTIZE:
        tl.store(out_at, y, mask=inside)
        return
    y = y.to(tl.float32)
    offset = y
    if OFFSET:
        offset = tl.load(offset_ptr + at, mask=inside, other=0.0)
    low = tl.min(tl.min(y, 1, keep_dims=True), 0, keep_dims=True)  # zero beyond n1 and n2: the range has a zero anyway
    high = tl.max(tl.max(y, 1, keep_dims=True), 0, keep_dims=True)
    codes, scale, zero = choose_codes(y, low, high, offset, OFFSET, QMIN, QMAX, SYMMETRIC)
    tl.store(out_at, codes.to(tl.int8), mask=inside)
    rest = row.to(tl.int64) * (stride_out // 4)
    one = tl.zeros((1, 1), tl.int32)
    tl.store(scale_ptr + rest + one, scale)
    if not SYMMETRIC:
        tl.store(zero_ptr + rest + one, zero)
    tl.store(sum_ptr + rest, tl.sum(tl.sum(tl.where(inside, codes, 0), 1), 0))
