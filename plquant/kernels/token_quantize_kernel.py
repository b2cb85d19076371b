"""One pass over a row of activations: RMSNorm, gather of channels, Hadamard rotation, codes in its own range."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_even(x):
    """To the nearest integer, ties to even, for |x| < 2^22: the sum with 1.5 x 2^23 has no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _quotient(x, divisor):
    """fp32 x / divisor, correctly rounded: a division's first guess and its correction, the reciprocal taken once."""
    reciprocal = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
    reciprocal, divisor = tl.broadcast_to(reciprocal, x.shape), tl.broadcast_to(divisor, x.shape)
    guess = x * reciprocal
    return tl.fma(tl.fma(-guess, divisor, x), reciprocal, guess)


@triton.jit
def choose_codes(
    y, low, high, offset, OFFSET: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr
):
    """Signed codes of fp32 y, int32, with the scale and the signed zero-point of ranges that can be broadcast to it.

    QMIN is -QMAX - 1: codes of asymmetric grids are moved down by half of their range, to fit int8.
    """
    low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    if SYMMETRIC:
        scale = tl.maximum(tl.div_rn(high, tl.full(high.shape, QMAX, tl.float32)), low * (1.0 / QMIN))
    else:
        scale = tl.div_rn(high - low, tl.full(high.shape, QMAX - QMIN, tl.float32))
    scale = tl.maximum(scale, 1.1754943508222875e-38)
    steps = _quotient(y, scale)
    if OFFSET:
        steps += offset
    steps = round_even(steps)
    if SYMMETRIC:
        zero = tl.zeros_like(scale)
    else:
        zero = tl.minimum(tl.maximum(round_even(tl.div_rn(-low, scale)), 0.0), QMAX - QMIN) + QMIN
        steps += zero
    codes = (
        tl.minimum(tl.maximum(steps, QMIN), QMAX) + 12582912.0
    )  # an integer's bits in the lower half of the number's
    return codes.to(tl.int32, bitcast=True) - 0x4B400000, scale, zero.to(tl.int32)


@triton.jit
def _signs(n: tl.constexpr, DTYPE: tl.constexpr):
    """Sylvester's Hadamard matrix [n, n]: -1 where an odd number of bits is common to row and column."""
    common = tl.arange(0, n)[:, None] & tl.arange(0, n)[None, :]
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return (1 - 2 * (common & 1)).to(DTYPE)


@triton.jit
def token_quantize_kernel(
    x_ptr,
    gain_ptr,
    sources_ptr,
    offset_ptr,
    clip_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    sum_ptr,
    stride_x,
    stride_out,
    width,
    width_out,
    eps,
    NORM: tl.constexpr,
    SOURCES: tl.constexpr,
    OFFSET: tl.constexpr,
    CLIP: tl.constexpr,
    HADAMARD: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Codes, scale, zero-point and sum of codes of one row; all of them are ``stride_out`` bytes from the last row's.

    ``sources`` is [SOURCES, width_out]: the channels that each channel is the sum of, -1 for none. HADAMARD: order of
    the blocks that are rotated, 0 for none. Every step rounds to the dtype of x, as modules do one after the other.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0)
    x_ptr += row.to(tl.int64) * stride_x
    k = tl.arange(0, BLOCK_OUT)
    inside = k < width_out
    over_rms = 1.0
    if NORM:
        at = tl.arange(0, BLOCK)
        whole = tl.load(x_ptr + at, mask=at < width, other=0.0).to(tl.float32)
        mean = tl.div_rn(tl.sum(whole * whole, 0, keep_dims=True), tl.full((1,), 1, tl.float32) * width)
        over_rms = tl.div_rn(tl.full((1,), 1.0, tl.float32), tl.sqrt_rn(mean + eps))
    if SOURCES > 0:
        y = tl.zeros((BLOCK_OUT,), tl.float32)
        for index in tl.static_range(SOURCES):
            source = tl.load(sources_ptr + index * width_out + k, mask=inside, other=-1)
            y += _channels(x_ptr, gain_ptr, source, source >= 0, over_rms, NORM).to(tl.float32)
    else:
        y = _channels(x_ptr, gain_ptr, k, inside, over_rms, NORM).to(tl.float32)
    if HADAMARD > 0:
        blocks = tl.reshape(y.to(DTYPE), (BLOCK_OUT // HADAMARD, HADAMARD))
        y = tl.reshape(tl.dot(blocks, _signs(HADAMARD, DTYPE)), (BLOCK_OUT,))
        y = tl.div_rn(y, tl.sqrt_rn(tl.full((BLOCK_OUT,), HADAMARD, tl.float32)))
    y = y.to(DTYPE).to(tl.float32)
    shift = y
    if OFFSET:
        shift = tl.load(offset_ptr + k, mask=inside, other=0.0)
    low = tl.min(y, 0, keep_dims=True)  # zero beyond the width: the range has a zero anyway
    high = tl.max(y, 0, keep_dims=True)
    if CLIP:
        low *= tl.load(clip_ptr)
        high *= tl.load(clip_ptr + 1)
    codes, scale, zero = choose_codes(y, low, high, shift, OFFSET, QMIN, QMAX, SYMMETRIC)
    tl.store(codes_ptr + row.to(tl.int64) * stride_out + k, codes.to(tl.int8), mask=inside)
    at = row.to(tl.int64) * (stride_out // 4)
    one = tl.arange(0, 1)
    tl.store(scale_ptr + at + one, scale)
    if not SYMMETRIC:
        tl.store(zero_ptr + at + one, zero)
    tl.store(sum_ptr + at, tl.sum(tl.where(inside, codes, 0), 0))


@triton.jit
def _channels(x_ptr, gain_ptr, channel, alive, over_rms, NORM: tl.constexpr):
    """Channels of the row, normed: gain times x / rms rounded to the dtype of x, rounded again."""
    x = tl.load(x_ptr + channel, mask=alive, other=0.0)
    if NORM:
        normed = (x.to(tl.float32) * over_rms).to(x.dtype)
        gain = tl.load(gain_ptr + channel, mask=alive, other=0.0)
        x = (normed.to(tl.float32) * gain.to(tl.float32)).to(x.dtype)
    return x
