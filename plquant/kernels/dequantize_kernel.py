"""A packed weight written out as fp16 or bf16, every byte read and written once, 16 bytes at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from plquant.kernels.pairs import code_pairs, less, times, twice


@triton.jit
def _load_words(at, alive, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(at, mask=alive, other=0)
    return tl.load(at)


@triton.jit
def _load(at, alive, MASKED: tl.constexpr):
    """As ``_load_words``: of scales and zero-points."""
    if MASKED:
        return tl.load(at, mask=alive, other=0)
    return tl.load(at)


@triton.jit
def dequantize_kernel(
    words_ptr,
    high_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    units,
    in_features,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALONG_OUT: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    MASKED: tl.constexpr,
    UNITS: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Rows of tile ``program_id(0)``, UNITS of the ``units`` of a row: the inputs that whole words of all planes have.

    ``out`` is int32, pairs of numbers, [O, I / 2] padded; with groups along the output so are scales and zero-points.
    GROUP 0: one scale per channel.
    """
    WORD_BLOCKS: tl.constexpr = 2 if LOW_BITS == 2 else 1  # blocks of 32 inputs to a word of the first plane
    SHARING: tl.constexpr = LOW_BITS // HIGH_BITS if HIGH_BITS else 1  # words of the first plane to one of the second
    BLOCKS: tl.constexpr = WORD_BLOCKS * SHARING
    tile = tl.program_id(0)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)[:, None]
    lane = tl.arange(0, 128)[None, :]
    alive = unit < units
    half_width = units * (BLOCKS * 16)
    row = lane % 4 // 2 * 16 + lane % 2 * 8 + lane // 16
    out_at = out_ptr + (tile * 32 + row).to(tl.int64) * half_width + unit * (BLOCKS * 16) + lane // 4 % 4 * 4
    first = words_ptr + tile.to(tl.int64) * (units * BLOCKS * LOW_BITS * 32) + unit * (BLOCKS * LOW_BITS * 32) + lane
    words = tl.zeros((UNITS, 128), tl.int32)
    high = words
    if HIGH_BITS > 0:
        high = _load_words(high_ptr + tile.to(tl.int64) * (units * 128) + unit * 128 + lane, alive, MASKED)
    quarter = tl.arange(0, 4)[None, None, :]
    for block in tl.static_range(BLOCKS):
        if LOW_BITS < 8 and block % WORD_BLOCKS == 0:
            words = _load_words(first + block // WORD_BLOCKS * 128, alive, MASKED)
        if ALONG_OUT:
            zero = tl.zeros((UNITS, 128), tl.int32)
        else:
            k = tl.minimum((unit * BLOCKS + block) * 32, in_features - 1)  # padding has no scale
            group = k // GROUP if GROUP else tl.zeros_like(unit)
            scale_at = group * (tl.num_programs(0) * 32) + tile * 32 + lane // 16 * 4 + lane % 4
            scale = twice(_load(scale_ptr + scale_at, alive, MASKED))
            if SYMMETRIC:
                zero = tl.full((UNITS, 128), 1 << (BITS - 1), tl.int32)
            else:
                zero = _load(zero_ptr + scale_at, alive, MASKED).to(tl.int32)
        cls = block % WORD_BLOCKS * 2
        sharer = block // WORD_BLOCKS
        second = words
        if LOW_BITS == 8:
            words = _load_words(first, alive, MASKED)
            second = _load_words(first + 128, alive, MASKED)
        y00 = code_pairs(words, high, zero, 0, cls, sharer, LOW_BITS, HIGH_BITS, DTYPE, PTX)
        y01 = code_pairs(words, high, zero, 1, cls, sharer, LOW_BITS, HIGH_BITS, DTYPE, PTX)
        y10 = code_pairs(second, high, zero, 0, cls + 1, sharer, LOW_BITS, HIGH_BITS, DTYPE, PTX)
        y11 = code_pairs(second, high, zero, 1, cls + 1, sharer, LOW_BITS, HIGH_BITS, DTYPE, PTX)
        if not ALONG_OUT:
            y00, y01 = times(y00, scale, DTYPE, PTX), times(y01, scale, DTYPE, PTX)
            y10, y11 = times(y10, scale, DTYPE, PTX), times(y11, scale, DTYPE, PTX)
        y = tl.join(tl.join(y00, y10), tl.join(y01, y11))  # b, a
        y = tl.reshape(y, (UNITS, 128, 4))
        if ALONG_OUT:
            column = (unit * (BLOCKS * 16) + block * 16 + lane // 4 % 4 * 4)[:, :, None] + quarter
            scale_at = tile * 32 // GROUP * half_width + column
            if SYMMETRIC:
                zeros = tl.full((UNITS, 128, 4), 1 << (BITS - 1), tl.int32)
                zeros = twice(zeros.to(tl.float32).to(DTYPE))
            else:
                zeros = _load(zero_ptr + scale_at, alive[:, :, None], MASKED)
            y = times(less(y, zeros, DTYPE, PTX), _load(scale_ptr + scale_at, alive[:, :, None], MASKED), DTYPE, PTX)
        at = out_at[:, :, None] + (block * 16 + quarter)
        if MASKED:
            tl.store(at, y, mask=alive[:, :, None])
        else:
            tl.store(at, y)
