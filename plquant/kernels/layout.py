"""The layout that the kernels read, made from codes once, when a model is loaded.

A matrix instruction (mma.sync m16n8k16) wants its left operand spread over a warp in one certain way. Words are stored
so that 16 contiguous bytes a lane, as one load brings them, are that operand: all that is left to do is to mask fields.

Planes. Codes of 3, 5 and 6 bits are 2 + 1, 4 + 1 and 4 + 2 bits in two planes, so that every field is a power of two
wide and no bit is wasted; 7 bits take 8.

Order. Rows are in tiles of 32: row = 16 r + 8 h + g. Inputs are in blocks of 32: k = 32 block + 8 c + 4 b + 2 a + e. A
plane of p bits is int32 [O / 32, I p / 128, 128]; the last axis is [g 8, c 4, r 2, h 2], and lane 4 g + c of a warp
takes four words. A word holds codes of one row, those of c, and the code of (block, b, a, e) is at bit

    p cls + 8 a + 16 e          in the first plane; cls is b for 4 bits, 2 (block % 2) + b for 2 bits, and 0 for 8 bits,
                                which have a word for each b
    q i + p cls + 8 a + 16 e    in the second, of q bits; i counts the words of the first that share one of the second
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plquant.kernels.cpu_layout import Shape

# Letters: O out_features, I in_features, both padded here; G number of groups.

LAYOUT = "mma16816-r32-k32-v1"
ROWS = 32  # of a tile
BLOCK = 32  # inputs of a block
PLANES = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 7: (8, 0), 8: (8, 0)}

Axis = Literal["in", "out"]


@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight as the kernels read it.

    Attributes:
        words: First plane, int32 [O / 32, I p / 128, 128].
        high: Second plane, int32 [O / 32, I q / 128, 128], or ``None``.
        scale: [G, O], the rows of each tile in the order [g 8, r 2, h 2]; with groups along the output [G, I], without
            ``gain``.
        zero_point: Integer valued, shape and dtype of ``scale``; ``None``: 2^(bits - 1) everywhere.
        bits: Width of a code.
        group_size: Inputs that share a scale, or outputs with ``axis`` "out".
        axis: "in": groups along the input, one scale per channel included; "out": groups along the output.
        out_features: Rows of the weight before padding.
        in_features: Columns of the weight before padding.
        gain: Power of two that all scales are to be multiplied with. Groups along the output need it: kernels multiply
            x with scales, which are kept near 1, so that fp16 does not underflow.
        layout: Names the order; a kernel refuses others.
    """

    words: Tensor
    high: Tensor | None
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int
    axis: Axis
    out_features: int
    in_features: int
    gain: float = 1.0
    layout: str = LAYOUT

    @property
    def padded_in_features(self) -> int:
        """Columns that are stored."""
        return self.words.shape[1] * 128 // PLANES[self.bits][0]

    @property
    def padded_out_features(self) -> int:
        """Rows that are stored."""
        return self.words.shape[0] * ROWS

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.words, self.high, self.scale, self.zero_point)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def padded_size(out_features: int, in_features: int, bits: int) -> tuple[int, int]:
    """Rows and columns that are stored."""
    unit = max(BLOCK, 128 // (PLANES[bits][1] or PLANES[bits][0]))
    return out_features + -out_features % ROWS, in_features + -in_features % unit


def plane_sizes(out_features: int, in_features: int, bits: int) -> list[tuple[int, int, int]]:
    """Shapes of ``words`` and, if there is one, ``high``."""
    rows, columns = padded_size(out_features, in_features, bits)
    return [(rows // ROWS, columns * plane // 128, 128) for plane in PLANES[bits] if plane]


def axis_name(along_out: bool) -> Axis:
    """The name of the axis that groups run along."""
    return "out" if along_out else "in"


def packed_weight(parts: Sequence[Tensor | None], shape: Shape, gain: float) -> PackedWeight:
    """One of its tensors, in the order of ``PackedWeight``."""
    words, high, scale, zero_point = parts
    assert words is not None and scale is not None
    sizes = (shape.group_size, axis_name(shape.along_out), shape.out_features, shape.in_features)
    return PackedWeight(words, high, scale, zero_point, shape.bits, *sizes, gain)


def why_not(shape: tuple[int, int], bits: int, group_size: int, axis: Axis) -> str | None:
    """What keeps a weight from this layout, or ``None``.

    Args:
        shape: out_features and in_features.
        bits: Width of a code.
        group_size: Weights that share a scale, along ``axis``.
        axis: The axis that groups run along.
    """
    width = shape[1] if axis == "in" else shape[0]
    if bits not in PLANES:
        return f"bits={bits} is not among {', '.join(map(str, PLANES))}"
    if group_size < 1 or width % group_size:
        return f"group_size={group_size} does not divide {width}"
    if group_size % 32 and group_size != width:
        return f"group_size={group_size} is neither a multiple of 32 nor the whole width of {width}"
    return None


def pack(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int, axis: Axis = "in"
) -> PackedWeight:
    """Codes, scales and zero-points in the kernels' layout; w = scale (code - zero_point).

    Args:
        codes: [O, I]: uint8 in [0, 2^bits), or int8 in [-2^(bits - 1), 2^(bits - 1)) where ``zero_point`` is ``None``.
        scale: [O, G] with ``axis`` "in", [G, I] with "out"; fp16, bf16 or fp32.
        zero_point: Any dtype, integer valued, shape of ``scale``, in the units of uint8 codes; ``None``: symmetric.
        bits: Width of a code.
        group_size: I / G or O / G.
        axis: The axis that groups run along.

    Raises:
        ValueError: The weight does not fit this layout; the message says why.
    """
    rows, columns = codes.shape
    problem = why_not((rows, columns), bits, group_size, axis)
    if problem is not None:
        raise ValueError(f"a weight of {rows} x {columns} cannot be packed for the kernels: {problem}")
    if codes.dtype == torch.int8:
        codes = codes.view(torch.uint8) + (1 << (bits - 1))  # uint8 wraps around, as it should
    first, second = PLANES[bits]
    pad_rows, pad_columns = (
        padded - size for padded, size in zip(padded_size(rows, columns, bits), (rows, columns), strict=True)
    )
    codes = torch.nn.functional.pad(codes, (0, pad_columns, 0, pad_rows))
    low = codes & ((1 << first) - 1) if second else codes
    words = _to_words(low, first, first, first)
    high = _to_words(codes >> first, second, first, second) if second else None

    def order(tensor: Tensor) -> Tensor:
        if axis == "out":
            return torch.nn.functional.pad(tensor, (0, pad_columns)).contiguous()
        padded = torch.nn.functional.pad(tensor.T, (0, pad_rows))
        return padded.reshape(-1, 2, 2, 8).permute(0, 3, 1, 2).reshape(padded.shape).contiguous()

    zeros = None if zero_point is None else order(zero_point.to(scale.dtype))
    exponent = min(0, int(torch.frexp(scale.abs().max().float()).exponent)) if axis == "out" else 0  # up is exact
    scale = torch.ldexp(scale.float(), torch.tensor(-exponent, device=scale.device)).to(scale.dtype)
    return PackedWeight(words, high, order(scale), zeros, bits, group_size, axis, rows, columns, 2.0**exponent)


def unpack(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of ``pack``: codes uint8 [O, I], scale and zero_point as they were given."""
    first, second = PLANES[packed.bits]
    codes = _from_words(packed.words, first, first, first)
    if packed.high is not None:
        codes |= _from_words(packed.high, second, first, second) << first

    def order(tensor: Tensor) -> Tensor:
        if packed.axis == "out":
            return tensor[:, : packed.in_features]
        rows = tensor.reshape(-1, 8, 2, 2).permute(0, 2, 3, 1).reshape(tensor.shape)
        return rows[:, : packed.out_features].T

    zeros = None if packed.zero_point is None else order(packed.zero_point)
    scale = (order(packed.scale).double() * packed.gain).to(packed.scale.dtype)
    return codes[: packed.out_features, : packed.in_features], scale, zeros


def _fields(bits: int, first: int, step: int) -> tuple[list[int], list[int]]:
    """How the inputs of a word split and where the bits of each are.

    Returns:
        Sizes of (i, block % 2, b) that are inside a word, and the shift of each of (i, h, b, a, e), flattened.
    """
    halves = 2 if first == 2 else 1  # blocks in a word of the first plane
    sharing = first // bits  # words of the first plane in a word of this one
    inside = 1 if first == 8 else 2  # values of b
    shifts = [
        step * i + first * (2 * h + b) + 8 * a + 16 * e
        for i in range(sharing)
        for h in range(halves)
        for b in range(inside)
        for a in range(2)
        for e in range(2)
    ]
    return [sharing, halves, inside], shifts


def _to_words(codes: Tensor, bits: int, first: int, step: int) -> Tensor:
    (sharing, halves, inside), shifts = _fields(bits, first, step)
    rows, columns = codes.shape
    blocks = columns // BLOCK // (sharing * halves)
    # (tile r h g) (word i half c outer_b b a e) -> (tile word outer_b g c r h) (i half b a e)
    fields = codes.view(rows // ROWS, 2, 2, 8, blocks, sharing, halves, 4, 2 // inside, inside, 2, 2)
    fields = fields.permute(0, 4, 8, 3, 7, 1, 2, 5, 6, 9, 10, 11).reshape(-1, len(shifts))
    words = torch.zeros(len(fields), dtype=torch.int32, device=codes.device)
    for index, shift in enumerate(shifts):
        words |= fields[:, index].to(torch.int32) << shift
    return words.view(rows // ROWS, -1, 128)


def _from_words(words: Tensor, bits: int, first: int, step: int) -> Tensor:
    (sharing, halves, inside), shifts = _fields(bits, first, step)
    fields = torch.stack([(words >> shift) & ((1 << bits) - 1) for shift in shifts], -1).to(torch.uint8)
    tiles = words.shape[0]
    fields = fields.view(tiles, -1, 2 // inside, 8, 4, 2, 2, sharing, halves, inside, 2, 2)
    return fields.permute(0, 5, 6, 3, 1, 7, 8, 4, 2, 9, 10, 11).reshape(tiles * ROWS, -1)
