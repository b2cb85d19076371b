"""The integer kernel: y = x W^T on int8 tensor cores, x and the weight as codes, both zero-points taken off exactly.

Codes of 4 bits stay packed until they are in registers. There a nibble is used in the upper half of its byte, as 16
times the code: one mask, and a shift for every second, make four operands, and no sign has to be extended. The sum is a
multiple of 16 then, and is shifted back.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _keep(tile):
    """The tile itself, by an instruction that ptxas removes.

    Without something between the load and the product, triton moves the loads of the next step ahead of this one's
    products on sm_8x, which takes more registers than there are: 12 instructions a product instead of 2. It sees
    through anything with one operand.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [tile, tile], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def _nibbles(packed, PTX: tl.constexpr):
    """Signed lower and upper nibbles of int8, both times 16."""
    if not PTX:
        return packed << 4, packed & -16
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; shl.b32 t, $2, 4; and.b32 $0, t, 0xf0f0f0f0; and.b32 $1, $2, 0xf0f0f0f0; }",
        "=r,=r,r",
        [packed],
        dtype=(tl.int8, tl.int8),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _load_x(x_at, left, MASKED: tl.constexpr, K: tl.constexpr):
    if MASKED:
        return tl.load(x_at, mask=tl.arange(0, K)[None, :] < left, other=0)
    return tl.load(x_at)


@triton.jit
def int_gemm_kernel(
    x_ptr,
    x_scale_ptr,
    x_zero_ptr,
    x_sum_ptr,
    w_ptr,
    w_scale_ptr,
    w_zero_ptr,
    w_sum_ptr,
    out_ptr,
    rows,
    in_features,
    out_features,
    stride_x,
    stride_w,
    PACKED: tl.constexpr,
    X_ZERO: tl.constexpr,
    W_ZERO: tl.constexpr,
    MASKED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    STAGES: tl.constexpr,
    KEEP: tl.constexpr,
    PTX: tl.constexpr,
):
    """out[m, n] = x_scale[m] w_scale[n] sum over k of (x[m, k] - x_zero[m]) (w[n, k] - w_zero[n]).

    All that belongs to a row of x is ``stride_x`` bytes from what belongs to the row before.

    PACKED: a row of w is blocks of K / 2 bytes, byte j of which has inputs j and j + K / 2. MASKED: K does not divide
    ``in_features``; the rows of w are stored whole.
    """
    row_tiles = tl.cdiv(rows, M)
    first_m = tl.program_id(0) % row_tiles * M
    first_n = tl.program_id(0) // row_tiles * N
    m, n = tl.arange(0, M), tl.arange(0, N)  # of the tile: 64-bit offsets only where the tile starts
    m_read = tl.minimum(m, rows - 1 - first_m)
    n_read = tl.minimum(n, out_features - 1 - first_n)
    RUN: tl.constexpr = K // 2 if PACKED else K
    run = tl.arange(0, RUN)
    x_at = x_ptr + first_m.to(tl.int64) * stride_x + (m_read[:, None] * stride_x + run[None, :])
    w_at = w_ptr + first_n.to(tl.int64) * stride_w + (n_read[None, :] * stride_w + run[:, None])
    acc = tl.zeros((M, N), tl.int32)
    for k in tl.range(0, in_features, K, num_stages=STAGES):
        w = tl.load(w_at)
        x = _load_x(x_at, in_features - k, MASKED, RUN)
        if PACKED:
            x_upper = _load_x(x_at + RUN, in_features - k - RUN, MASKED, RUN)
            lower, upper = _nibbles(w, PTX)
            acc = tl.dot(x, lower, acc)
            acc = tl.dot(x_upper, upper, acc)
        else:
            acc = tl.dot(x, _keep(w) if KEEP else w, acc)
        x_at += K
        w_at += RUN
    if PACKED:
        acc = acc >> 4
    row_at = first_m.to(tl.int64) * (stride_x // 4) + m_read * (stride_x // 4)
    n_read += first_n
    if W_ZERO:
        acc -= tl.load(x_sum_ptr + row_at)[:, None] * tl.load(w_zero_ptr + n_read)[None, :]
    if X_ZERO:
        acc -= tl.load(x_zero_ptr + row_at)[:, None] * tl.load(w_sum_ptr + n_read)[None, :]
    out = acc.to(tl.float32) * tl.load(x_scale_ptr + row_at)[:, None] * tl.load(w_scale_ptr + n_read)[None, :]
    out_at = out_ptr + (first_m.to(tl.int64) * out_features + first_n) + (m[:, None] * out_features + n[None, :])
    inside = (m[:, None] < rows - first_m) & (n[None, :] < out_features - first_n)
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside)
