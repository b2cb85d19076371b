"""The decode kernel: y = x W^T for few rows of x and a weight of 2 to 8 bits in the layout of ``layout``.

Every byte of the weight is read once, straight into the registers that a matrix instruction takes it from: no shared
memory, no shuffle, no conversion, no arithmetic but masks. A code becomes a number by being looked at as one:

- subnormal (fp16): the field itself, as a subnormal number, is code 2^(shift - 24).
- offset: with an exponent above it the field is offset + code 2^shift; the offset is 1024 in fp16, 128 in bf16.

Fields at different shifts have accumulators of their own. Offset and zero-point are taken off by the sums of x, which
are products with a matrix of ones; scales are applied to accumulators, or to x where groups run along the output.

A program owns 32 or 64 outputs; its warps share the inputs, as do programs along the second axis of the grid, and their
sums are added in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Letters: W warps, N outputs of a program, M rows of x. An int32 of fields [W, N, 4] becomes an operand [W, N, 16].


@triton.jit
def _field(words, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """A field of both halves of each word, moved down by SHIFT (up, if it is negative)."""
    if SHIFT > 0:
        words = words >> SHIFT
    if SHIFT < 0:
        words = words << -SHIFT
    return words & (MASK * 0x10001)


@triton.jit
def _with_exponent(words, SHIFT: tl.constexpr, MASK: tl.constexpr, EXPONENT: tl.constexpr, PTX: tl.constexpr):
    """``_field`` below an exponent. LLVM would split the plain form in two instructions for each half."""
    if not PTX:
        return _field(words, SHIFT, MASK) | (EXPONENT * 0x10001)
    if SHIFT > 0:
        words = words >> SHIFT
    if SHIFT < 0:
        words = words << -SHIFT
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;",
        "=r,r,r,r",
        [words, MASK * 0x10001, EXPONENT * 0x10001],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _byte(words, ODD: tl.constexpr, EXPONENT: tl.constexpr, SEVEN: tl.constexpr, PTX: tl.constexpr):
    """The even or odd byte of both halves, or the lower SEVEN bits of it, below the exponent."""
    if SEVEN:
        return _with_exponent(words, 8 * ODD, 0x7F, EXPONENT, PTX)
    if not PTX:
        return _field(words, 8 * ODD, 0xFF) | (EXPONENT * 0x10001)
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;",
        "=r,r,r,r",
        [words, EXPONENT * 0x10001, 0x5351 if ODD else 0x5250],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _fields(
    words,
    high,
    A: tl.constexpr,
    CLS: tl.constexpr,
    SHARER: tl.constexpr,
    CLASSES: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    PTX: tl.constexpr,
):
    """The codes of half ``A`` of class ``CLS``: field of the first plane, that of the second above it, exponent."""
    AT: tl.constexpr = LOW_BITS * (CLS % CLASSES)
    SHIFT: tl.constexpr = LOW_BITS * CLS + 8 * A - AT
    MASK: tl.constexpr = ((1 << LOW_BITS) - 1) << AT
    if HIGH_BITS == 0:
        if EXPONENT == 0:
            return _field(words, SHIFT, MASK)
        return _with_exponent(words, SHIFT, MASK, EXPONENT, PTX)
    HIGH_SHIFT: tl.constexpr = HIGH_BITS * SHARER + SHIFT - LOW_BITS
    HIGH_MASK: tl.constexpr = ((1 << HIGH_BITS) - 1) << (AT + LOW_BITS)
    if EXPONENT == 0:
        return _field(words, SHIFT, MASK) | _field(high, HIGH_SHIFT, HIGH_MASK)
    upper = _with_exponent(high, HIGH_SHIFT, HIGH_MASK, EXPONENT, PTX)
    if not PTX:
        return _field(words, SHIFT, MASK) | upper
    if SHIFT > 0:
        words = words >> SHIFT
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;",
        "=r,r,r,r",
        [words, MASK * 0x10001, upper],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _operand(even, odd, DTYPE: tl.constexpr):
    """Fields of a = 0 and a = 1, [W, N, 4 (c)], looked at as numbers: [W, N, 16 (a c e)]."""
    pairs = tl.join(even, odd)
    low = pairs.to(tl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    numbers = tl.permute(tl.join(low, high), (0, 1, 3, 2, 4))
    return tl.reshape(numbers, (numbers.shape[0], numbers.shape[1], 16))


@triton.jit
def _load(pointers, alive, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=alive, other=0)
    return tl.load(pointers)


@triton.jit
def _load_words(pointers, alive, MASKED: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """A word of each row and lane: [N / 32 W, 128] pointers -> [W, N, 4 (c)]."""
    if MASKED:
        words = tl.load(pointers, mask=alive, other=0)
    else:
        words = tl.load(pointers)
    words = tl.reshape(words, (N // 32, W, 8, 4, 2, 2))
    return tl.reshape(tl.permute(words, (1, 0, 4, 5, 2, 3)), (W, N, 4))


@triton.jit
def _load_rows(pointers, alive, MASKED: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """A number of each output: [N / 32 W, 128] pointers -> fp32 [W, N, 4], equal along the last axis."""
    rows = tl.reshape(_load(pointers, alive, MASKED).to(tl.float32), (N // 32, W, 8, 4, 4))
    return tl.reshape(tl.permute(rows, (1, 0, 4, 2, 3)), (W, N, 4))


@triton.jit
def _columns(rows, M: tl.constexpr):
    """[W, N, 4], equal along c -> [W, N, M]."""
    W: tl.constexpr = rows.shape[0]
    N: tl.constexpr = rows.shape[1]
    rows = tl.broadcast_to(tl.reshape(rows, (W, N, 1, 4, 1)), (W, N, M // 8, 4, 2))
    return tl.reshape(rows, (W, N, M))


@triton.jit
def _all_rows(sums, N: tl.constexpr):
    """[W, 16, M], equal rows -> [W, N, M]."""
    W: tl.constexpr = sums.shape[0]
    M: tl.constexpr = sums.shape[2]
    return tl.reshape(tl.broadcast_to(tl.reshape(sums, (W, 1, 16, M)), (W, N // 16, 16, M)), (W, N, M))


@triton.jit
def _halves(x, W: tl.constexpr, M: tl.constexpr):
    """A block of 32 inputs [M / 8 W, 256 (m c b a e)] -> both [W, 16 (a c e), M], for b = 0 and 1."""
    x = tl.reshape(x, (M // 8, W, 8, 4, 2, 2, 2))
    x = tl.permute(x, (1, 5, 3, 6, 0, 2, 4))
    first, second = tl.split(x)
    return tl.reshape(first, (W, 16, M)), tl.reshape(second, (W, 16, M))


@triton.jit
def _zero_halves(zeros, W: tl.constexpr):
    """Zero-points of 32 inputs [W, 256], equal along m -> both [W, 16 (rows), 16 (a c e)]."""
    zeros = tl.reshape(zeros, (W, 1, 8, 4, 2, 2, 2))
    zeros = tl.permute(zeros, (0, 1, 2, 5, 3, 6, 4))
    zeros = tl.broadcast_to(zeros, (W, 2, 8, 2, 4, 2, 2))
    first, second = tl.split(zeros)
    return tl.reshape(first, (W, 16, 16)), tl.reshape(second, (W, 16, 16))


@triton.jit
def _combined(p0, p1, p2, p3, CLASSES: tl.constexpr, LOW_BITS: tl.constexpr):
    """Accumulators of fields at different shifts, in the units of the first."""
    STEP: tl.constexpr = 1.0 / (1 << LOW_BITS)
    if CLASSES == 4:
        return (p0 + p1 * STEP) + (p2 + p3 * STEP) * (STEP * STEP)
    if CLASSES == 2:
        return p0 + p1 * STEP
    return p0


@triton.jit
def _scaled(
    p,
    r0,
    r1,
    scale_at,
    zero_at,
    alive,
    MASKED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    OFFSET: tl.constexpr,
    CLASSES: tl.constexpr,
    STEP: tl.constexpr,
):
    """Scale (UNIT p - offset and zero-point times the sums of x), [W, N, M]."""
    W: tl.constexpr = p.shape[0]
    N: tl.constexpr = p.shape[1]
    M: tl.constexpr = p.shape[2]
    scale = _columns(_load_rows(scale_at, alive, MASKED, N, W) * UNIT, M)
    if SYMMETRIC:
        zeros = tl.full((W, N, M), 1 << (BITS - 1), tl.float32)
    else:
        zeros = _columns(_load_rows(zero_at, alive, MASKED, N, W), M)
    p -= (zeros + OFFSET) * (1.0 / UNIT) * _all_rows(r0, N)
    if OFFSET > 0 and CLASSES == 2:
        p -= (zeros + OFFSET * STEP) * _all_rows(r1, N)
    return scale * p


@triton.jit(do_not_specialize=["rows", "tiles"])
def decode_kernel(
    words_ptr,
    high_ptr,
    scale_ptr,
    zero_ptr,
    x_ptr,
    out_ptr,
    rows,
    in_features,
    out_features,
    stride_x,
    tiles,
    gain,
    BITS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    ALONG_OUT: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SUBNORMAL: tl.constexpr,
    MASKED: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    SPLIT: tl.constexpr,
    PTX: tl.constexpr,
):
    """out[split, m, n] = sum over a share of the inputs of x[m, k] gain scale (code[n, k] - zero_point).

    ``tiles`` of K inputs are stored; warp w of program (n, s) takes tiles s W + w, s W + w + W SPLIT, and so on. GROUP
    is inputs or outputs, 0: one scale per channel; scales along the input are applied every SPAN inputs, which divides
    GROUP and K. MASKED: the last tiles are not there for all warps, or the last inputs are padding.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    HALF: tl.constexpr = DTYPE == tl.float16
    EXPONENT: tl.constexpr = 0 if SUBNORMAL else (0x6400 if HALF else 0x4300)
    UNIT: tl.constexpr = 16777216.0 if SUBNORMAL else 1.0
    # bf16 has 7 bits below the exponent: the eighth is a field of its own, in its place
    EIGHTH: tl.constexpr = LOW_BITS == 8 and not HALF
    OFFSET: tl.constexpr = 0.0 if SUBNORMAL else (1024.0 if HALF else (256.0 if EIGHTH else 128.0))
    # classes of fields that are used at their shift; all others are moved down to one of these
    CLASSES: tl.constexpr = 1 if LOW_BITS == 8 else (8 if SUBNORMAL else 4) // LOW_BITS
    STEP: tl.constexpr = 1.0 / (1 << LOW_BITS)
    IN_WORD: tl.constexpr = 2 if LOW_BITS == 2 else 1  # blocks of 32 inputs in a word of the first plane
    SHARING: tl.constexpr = LOW_BITS // HIGH_BITS if HIGH_BITS else 1  # words of the first plane to one of the second
    RESCALE: tl.constexpr = not ALONG_OUT and GROUP > 0

    first = tl.program_id(1) * W
    padded_in = tiles * K
    padded_out = tl.num_programs(0) * N

    row = tl.arange(0, N // 32 * W)[:, None]
    lane = tl.arange(0, 128)[None, :]
    warp = row % W
    n_tile = tl.program_id(0) * (N // 32) + row // W
    words_at = words_ptr + (n_tile * padded_in + (first + warp) * K) * LOW_BITS + lane
    high_at = high_ptr + (n_tile * padded_in + (first + warp) * K) * HIGH_BITS + lane
    in_order = n_tile * 32 + lane // 16 * 4 + lane % 4

    x_row = tl.arange(0, M // 8 * W)[:, None]
    x_lane = tl.arange(0, 256)[None, :]
    m = x_row // W * 8 + x_lane // 32
    k = (first + x_row % W) * K + x_lane % 32
    x_at = x_ptr + m * stride_x + k
    s_k = (first + tl.arange(0, W)[:, None]) * K + x_lane % 32
    s_at = (tl.program_id(0) * N // GROUP if ALONG_OUT else 0) * padded_in + s_k

    zero = tl.zeros((W, N, M), tl.float32)
    no_sum = tl.zeros((W, 16, M), tl.float32)
    acc = zero
    p0, p1, p2, p3 = zero, zero, zero, zero
    r0, r1 = no_sum, no_sum
    words = tl.zeros((W, N, 4), tl.int32)
    high = words
    for start in tl.range(first, tiles, W * SPLIT):
        alive = start + warp < tiles
        for group in tl.static_range(K // SPAN):
            if RESCALE:
                p0, p1, p2, p3 = zero, zero, zero, zero
                r0, r1 = no_sum, no_sum
            for block in tl.static_range(group * (SPAN // 32), (group + 1) * (SPAN // 32)):
                mask = m < rows
                if MASKED:
                    mask = mask & (k + ((start - first) * K + block * 32) < in_features)
                x = tl.load(x_at + block * 32, mask=mask, other=0.0)
                if ALONG_OUT:
                    s_mask = s_k + ((start - first) * K + block * 32) < padded_in
                    scale = _load(scale_ptr + s_at + block * 32, s_mask, MASKED).to(DTYPE)
                    x = tl.reshape(x, (M // 8, W, 256)) * tl.reshape(scale, (1, W, 256))
                    if SYMMETRIC:
                        zeros = tl.full((W, 256), 1 << (BITS - 1), DTYPE)
                    else:
                        zeros = _load(zero_ptr + s_at + block * 32, s_mask, MASKED).to(DTYPE)
                    z0, z1 = _zero_halves(zeros, W)
                x0, x1 = _halves(x, W, M)
                if LOW_BITS < 8 and block % IN_WORD == 0:
                    words = _load_words(words_at + block * (32 * LOW_BITS), alive, MASKED, N, W)
                if HIGH_BITS > 0 and block % (IN_WORD * SHARING) == 0:
                    high = _load_words(high_at + block * (32 * HIGH_BITS), alive, MASKED, N, W)
                for b in tl.static_range(2):
                    xb = x0 if b == 0 else x1
                    if LOW_BITS == 8:
                        words = _load_words(words_at + (block * 2 + b) * 128, alive, MASKED, N, W)
                        even = _byte(words, 0, EXPONENT, EIGHTH, PTX)
                        odd = _byte(words, 1, EXPONENT, EIGHTH, PTX)
                        p0 = tl.dot(_operand(even, odd, DTYPE), xb, p0)
                        if EIGHTH:
                            even = _with_exponent(words, 0, 0x80, EXPONENT, PTX)
                            odd = _with_exponent(words, 8, 0x80, EXPONENT, PTX)
                            p0 = tl.dot(_operand(even, odd, DTYPE), xb, p0)
                    else:
                        cls = b if LOW_BITS == 4 else block % 2 * 2 + b
                        sharer = block // IN_WORD % SHARING
                        even = _fields(words, high, 0, cls, sharer, CLASSES, LOW_BITS, HIGH_BITS, EXPONENT, PTX)
                        odd = _fields(words, high, 1, cls, sharer, CLASSES, LOW_BITS, HIGH_BITS, EXPONENT, PTX)
                        w = _operand(even, odd, DTYPE)
                        if cls % CLASSES == 0:
                            p0 = tl.dot(w, xb, p0)
                        if cls % CLASSES == 1:
                            p1 = tl.dot(w, xb, p1)
                        if cls % CLASSES == 2:
                            p2 = tl.dot(w, xb, p2)
                        if cls % CLASSES == 3:
                            p3 = tl.dot(w, xb, p3)
                    if ALONG_OUT:
                        r0 = tl.dot(z0 if b == 0 else z1, xb, r0)
                        if OFFSET > 0:
                            r0 = tl.dot(tl.full((W, 16, 16), OFFSET * (STEP if b % CLASSES else 1.0), DTYPE), xb, r0)
                    elif OFFSET > 0 and b % CLASSES == 1:
                        r1 = tl.dot(tl.full((W, 16, 16), 1.0, DTYPE), xb, r1)
                    else:
                        r0 = tl.dot(tl.full((W, 16, 16), 1.0, DTYPE), xb, r0)
            if RESCALE:
                at_input = (start + warp) * K + group * SPAN
                at = at_input // GROUP * padded_out + in_order
                scaled = at_input < in_features
                p = _combined(p0, p1, p2, p3, CLASSES, LOW_BITS)
                acc += _scaled(
                    p,
                    r0,
                    r1,
                    scale_ptr + at,
                    zero_ptr + at,
                    scaled,
                    MASKED,
                    SYMMETRIC,
                    BITS,
                    UNIT,
                    OFFSET,
                    CLASSES,
                    STEP,
                )
        words_at += W * SPLIT * K * LOW_BITS
        high_at += W * SPLIT * K * HIGH_BITS
        x_at += W * SPLIT * K
        s_at += W * SPLIT * K
    if not RESCALE:
        p = _combined(p0, p1, p2, p3, CLASSES, LOW_BITS)
        if ALONG_OUT:
            acc = (p * UNIT - _all_rows(r0, N)) * gain
        else:
            acc = _scaled(
                p,
                r0,
                r1,
                scale_ptr + in_order,
                zero_ptr + in_order,
                warp < W,
                False,
                SYMMETRIC,
                BITS,
                UNIT,
                OFFSET,
                CLASSES,
                STEP,
            )
    total = tl.sum(acc, axis=0)
    n_out = tl.program_id(0) * N + tl.arange(0, N)[:, None]
    m_out = tl.arange(0, M)[None, :]
    out_at = out_ptr + (tl.program_id(1) * rows + m_out) * out_features + n_out
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=(n_out < out_features) & (m_out < rows))


@triton.jit
def sum_splits_kernel(parts_ptr, out_ptr, size, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = sum over splits of parts[split, i], in order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT):
        total += tl.load(parts_ptr + split * size + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)
