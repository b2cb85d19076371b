"""The prefill kernel: y = x W^T for some dozens to hundreds of rows, the weight dequantized in registers.

Words come from memory as the left operand of the products lies over a warp; there they become numbers, scale included:
what is multiplied is what dequantizing first would give. x goes through shared memory, its inputs in the order in which
a warp has those of the weight: that of ``layout`` within 32, which the addresses of its loads bring about.
"""

from __future__ import annotations

import triton
import triton.language as tl

from plquant.kernels.pairs import code_pairs, times, twice


@triton.jit
def _rows(tensor, W: tl.constexpr):
    """Words of 32 W rows, [W, 128 (g c r h)] -> [32 W, 4 (c)], rows in the order (r w h g)."""
    tensor = tl.permute(tl.reshape(tensor, (W, 8, 4, 2, 2)), (3, 0, 4, 1, 2))
    return tl.reshape(tensor, (32 * W, 4))


@triton.jit
def _load_words(at, alive, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(at, mask=alive, other=0)
    return tl.load(at)


@triton.jit
def _load_scales(at, alive, W: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(at, mask=alive, other=0)
    return tl.load(at)


@triton.jit
def _numbers(pairs, DTYPE: tl.constexpr):
    """Pairs [N, K / 2] as numbers [N, K]."""
    low = pairs.to(tl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.reshape(tl.join(low, high), (pairs.shape[0], 2 * pairs.shape[1]))


@triton.jit
def _block(
    words,
    second,
    high,
    scale,
    zero,
    cls: tl.constexpr,
    sharer: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """A block of 32 inputs, [N, 32] in the order (b a c e); ``second`` has the words of b = 1."""
    N: tl.constexpr = words.shape[0]
    y00 = times(code_pairs(words, high, zero, 0, cls, sharer, LOW_BITS, HIGH_BITS, DTYPE, PTX), scale, DTYPE, PTX)
    y01 = times(code_pairs(words, high, zero, 1, cls, sharer, LOW_BITS, HIGH_BITS, DTYPE, PTX), scale, DTYPE, PTX)
    y10 = times(code_pairs(second, high, zero, 0, cls + 1, sharer, LOW_BITS, HIGH_BITS, DTYPE, PTX), scale, DTYPE, PTX)
    y11 = times(code_pairs(second, high, zero, 1, cls + 1, sharer, LOW_BITS, HIGH_BITS, DTYPE, PTX), scale, DTYPE, PTX)
    y = tl.join(tl.join(y00, y10), tl.join(y01, y11))  # c b a
    y = tl.reshape(tl.permute(y, (0, 2, 3, 1)), (N, 16))
    return _numbers(y, DTYPE)


@triton.jit
def prefill_kernel(
    words_ptr,
    high_ptr,
    scale_ptr,
    zero_ptr,
    x_ptr,
    out_ptr,
    rows,
    in_features,
    out_features,
    padded_in,
    padded_out,
    stride_x,
    BITS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    MASKED: tl.constexpr,
    M: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
    OPAQUE: tl.constexpr,
):
    """out[m, n] = sum over k of x[m, k] scale (code[n, k] - zero_point) for M rows and 32 W outputs.

    GROUP is inputs that share a scale, 0: one scale per channel. MASKED: K does not divide the inputs, or the last tile
    of outputs is not whole. OPAQUE hides from triton how the weight was made, which would choose an order of inputs
    within lanes by it (``kWidth`` 4) that x cannot have by ``ldmatrix``.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    N: tl.constexpr = 32 * W
    WORD_BLOCKS: tl.constexpr = 2 if LOW_BITS == 2 else 1  # blocks of 32 inputs to a word of the first plane
    SHARING: tl.constexpr = LOW_BITS // HIGH_BITS if HIGH_BITS else 1  # words of the first plane to one of the second
    HIGH_BLOCKS: tl.constexpr = WORD_BLOCKS * SHARING
    SPAN: tl.constexpr = K if GROUP == 0 or GROUP % K == 0 else 32  # inputs between two loads of scales
    row_tiles = tl.cdiv(rows, M)
    m = tl.program_id(0) % row_tiles * M + tl.arange(0, M)
    first_tile = tl.program_id(0) // row_tiles * W
    tile = first_tile + tl.arange(0, W)[:, None]
    lane = tl.arange(0, 128)[None, :]
    there = tile * 32 < padded_out
    words_at = words_ptr + tile.to(tl.int64) * (padded_in * LOW_BITS) + lane
    high_at = high_ptr + tile.to(tl.int64) * (padded_in * HIGH_BITS) + lane
    in_order = tile * 32 + lane // 16 * 4 + lane % 4
    place = tl.arange(0, 32)  # (b a c e) of a block
    inputs = place // 2 % 4 * 8 + place // 16 * 4 + place // 8 % 2 * 2 + place % 2
    x_at = x_ptr + tl.minimum(m, rows - 1)[None, :].to(tl.int64) * stride_x + inputs[:, None]

    acc = tl.zeros((N, M), tl.float32)
    words = tl.zeros((N, 4), tl.int32)
    high = words
    scale = words
    zero = tl.full((N, 4), 1 << (BITS - 1), tl.int32)
    for k in tl.range(0, padded_in, K, num_stages=STAGES):
        for block in tl.static_range(K // 32):
            alive = there & (tl.zeros_like(tile) + (k + block * 32) < padded_in)
            if block * 32 % SPAN == 0:
                group = tl.minimum(k + block * 32, in_features - 1) // GROUP if GROUP else 0  # padding has no scale
                scale = twice(_rows(_load_scales(scale_ptr + group * padded_out + in_order, alive, W, MASKED), W))
                if not SYMMETRIC:
                    zeros = _load_scales(zero_ptr + group * padded_out + in_order, alive, W, MASKED)
                    zero = _rows(zeros.to(tl.int32), W)
            second = words
            if LOW_BITS == 8:
                words = _rows(_load_words(words_at + block * 256, alive, MASKED), W)
                second = _rows(_load_words(words_at + block * 256 + 128, alive, MASKED), W)
            else:
                if block % WORD_BLOCKS == 0:
                    words = _rows(_load_words(words_at + block * (32 * LOW_BITS), alive, MASKED), W)
                second = words
            if HIGH_BITS > 0 and block % HIGH_BLOCKS == 0:
                high = _rows(_load_words(high_at + block * (32 * HIGH_BITS), alive, MASKED), W)
            cls = block % WORD_BLOCKS * 2
            sharer = block // WORD_BLOCKS % SHARING
            w = _block(words, second, high, scale, zero, cls, sharer, LOW_BITS, HIGH_BITS, DTYPE, PTX)
            if OPAQUE:
                w = tl.inline_asm_elementwise("", "=r,0", [w], dtype=w.dtype, is_pure=False, pack=2)
            if MASKED:
                x = tl.load(x_at + block * 32, mask=(inputs < in_features - k - block * 32)[:, None], other=0.0)
            else:
                x = tl.load(x_at + block * 32)
            acc = tl.dot(w, x, acc)
        words_at += K * LOW_BITS
        high_at += K * HIGH_BITS
        x_at += K
    place_n = tl.arange(0, N)  # (r w h g)
    n = first_tile * 32 + place_n // 16 % W * 32 + place_n // (16 * W) * 16 + place_n % 16
    out_at = out_ptr + m[None, :].to(tl.int64) * out_features + n[:, None]
    tl.store(out_at, acc.to(DTYPE), mask=(m < rows)[None, :] & (n < out_features)[:, None])
