"""Packed codes as numbers: code - zero_point, exact, two fp16 or bf16 numbers to a register.

A field becomes a number by being put below an exponent: OFFSET + code 2^AT, where AT is how far up in its half word the
field was left. One fused multiply-add takes it down, with offset and zero-point.
"""

from __future__ import annotations

import triton
import triton.language as tl

from plquant.kernels.decode_kernel import _byte, _fields, _with_exponent


@triton.jit
def fma(x, y, z, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The sum x y + z of both halves of int32 registers, rounded once."""
    if PTX:
        if DTYPE == tl.float16:
            return tl.inline_asm_elementwise(
                "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [x, y, z], dtype=tl.int32, is_pure=True, pack=1
            )
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [x, y, z], dtype=tl.int32, is_pure=True, pack=1
        )
    low = _half(x, 0, DTYPE) * _half(y, 0, DTYPE) + _half(z, 0, DTYPE)
    high = _half(x, 16, DTYPE) * _half(y, 16, DTYPE) + _half(z, 16, DTYPE)
    low = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _half(x, AT: tl.constexpr, DTYPE: tl.constexpr):
    """One of the two numbers of a register, in fp32."""
    return (x >> AT).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def less(x, y, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Register x - y."""
    MINUS_ONE: tl.constexpr = -0x43FF4400 if DTYPE == tl.float16 else -0x407F4080  # 0xbc00bc00, 0xbf80bf80
    return fma(y, tl.full(y.shape, MINUS_ONE, tl.int32), x, DTYPE, PTX)


@triton.jit
def times(x, y, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Register x y, rounded."""
    return fma(x, y, tl.full(x.shape, -0x7FFF8000, tl.int32), DTYPE, PTX)  # plus -0


@triton.jit
def twice(x):
    """A number as both halves of a register."""
    return (x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001


@triton.jit
def code_pairs(
    words,
    high,
    zero,
    A: tl.constexpr,
    CLS: tl.constexpr,
    SHARER: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """The numbers code - zero of e = 0 and 1 of one (a, class), in the terms of ``layout``.

    ``words`` and ``high`` are of the planes and of one shape, as is ``zero``, int32 in [0, 2^bits). SHARER counts the
    words that share one of the second plane.
    """
    HALF: tl.constexpr = DTYPE == tl.float16
    EXPONENT: tl.constexpr = 0x6400 if HALF else 0x4300  # of 1024 and of 128
    MANTISSA: tl.constexpr = 10 if HALF else 7
    ONE: tl.constexpr = 0x3C003C00 if HALF else 0x3F803F80
    if LOW_BITS == 8 and not HALF:
        # 7 bits fit below the exponent: the eighth, inverted, is 128 or 256, and what is left is code - 128
        low = _with_exponent(words, 8 * A, 0x7F, EXPONENT, PTX)
        top = _with_exponent(~words, 8 * A, 0x80, EXPONENT, PTX)
        return less(less(low, top, DTYPE, PTX), twice((zero - 128).to(tl.float32).to(DTYPE)), DTYPE, PTX)
    CLASSES: tl.constexpr = 1 if LOW_BITS == 8 else (8 if HALF else 4) // LOW_BITS
    AT: tl.constexpr = LOW_BITS * (CLS % CLASSES)
    if LOW_BITS == 8:
        numbers = _byte(words, A, EXPONENT, False, PTX)
    else:
        numbers = _fields(words, high, A, CLS, SHARER, CLASSES, LOW_BITS, HIGH_BITS, EXPONENT, PTX)
    step = tl.full(words.shape, ONE - (AT << MANTISSA) * 0x10001, tl.int32)
    offset = (0x8000 + EXPONENT - (AT << MANTISSA) + (zero << AT)) * 0x10001  # -(OFFSET 2^-AT + zero)
    return fma(numbers, step, offset, DTYPE, PTX)
