"""How the codes of a weight lie in memory at run time: packed to the bit, in the order in which vectors take them.

A tile is 16 outputs, a unit 32 inputs. Each unit of a tile is ``bits`` vectors of 32 int16 lanes. Lane ``2 n + p``
holds codes of output ``n`` and of the inputs ``2 i + p``, i from 0 to 15. The bits of these 16 codes are cut into
planes of 4, 2 and 1 bits (3 bits are 2 + 1, 8 bits 4 + 4), lowest first, and a plane of w bits takes w vectors:

    plane    vector    bits of a lane                         pair of inputs i
    4        i // 4    4 (i % 4) and the 3 above              0 to 3 in the first vector, 4 to 7 in the second, ...
    2        i // 8    2 (i % 8) and the one above            0 to 7, 8 to 15
    1        0         i                                      0 to 15

So a shift and a table turn a vector into the pairs of bf16 numbers that AVX512-BF16 and AMX multiply, and a shift and a
mask into those of integers that AVX2 turns into fp32, with an output in every lane: a scale per output needs no sum
across lanes. Groups are padded to whole units (along the input) or whole tiles (along the output). The scales of a
tile's groups lie one after the other: in rows of all outputs the next one is a page away, and to wait for it takes as
long as all the codes of a small group.

Letters: N outputs, K inputs, g group size, N' and K' with groups padded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TILE, UNIT = 16, 32
PIECE_BYTES = 1 << 18  # laid out at once: temporaries stay in the cache, and the memory they leave behind is small


class Shape(NamedTuple):
    """Of a weight and its groups.

    Attributes:
        out_features: N.
        in_features: K.
        bits: Width of a code, 2 to 8.
        group_size: Weights that share a scale; divides K, or N with groups along the output.
        along_out: Groups run along the output.
    """

    out_features: int
    in_features: int
    bits: int
    group_size: int
    along_out: bool

    @property
    def groups(self) -> int:
        """Number of groups on the grouped axis."""
        return (self.out_features if self.along_out else self.in_features) // self.group_size

    @property
    def padded_group(self) -> int:
        """Group size in whole tiles or units."""
        return _round_up(self.group_size, TILE if self.along_out else UNIT)

    @property
    def padded_out(self) -> int:
        """N'."""
        return self.groups * self.padded_group if self.along_out else _round_up(self.out_features, TILE)

    @property
    def padded_in(self) -> int:
        """K'."""
        return _round_up(self.in_features, UNIT) if self.along_out else self.groups * self.padded_group


class Weight(NamedTuple):
    """A weight at run time.

    Attributes:
        codes: int16 [N' / 16, K' / 32, bits, 32].
        scale: Storage dtype, [N' / 16, K / g, 16], or [N / g, K'] with groups along the output.
        zero_point: uint8 as ``scale``; ``None`` when it is 2^(bits - 1) everywhere.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


def planes(bits: int) -> list[int]:
    """Widths of the planes of a code, lowest first."""
    return [4, 4] if bits == 8 else [width for width in (4, 2, 1) if bits & width]


def lay_out(codes: Tensor, scale: Tensor, zero_point: Tensor | None, shape: Shape) -> Weight:
    """A weight in this layout.

    Args:
        codes: uint8 [N, K], from 0.
        scale: [N, K / g], or [N / g, K] with groups along the output.
        zero_point: uint8 as ``scale``; ``None``: 2^(bits - 1).
        shape: Bits and groups.
    """
    tiles, units = shape.padded_out // TILE, shape.padded_in // UNIT
    padded = _padded(codes, shape).view(tiles, TILE, units, UNIT // 2, 2)
    laid_out = codes.new_empty(tiles, units, shape.bits, UNIT, dtype=torch.int16)
    step = max(1, PIECE_BYTES // (2 * TILE * shape.padded_in))
    for piece, out in zip(padded.split(step), laid_out.split(step), strict=True):
        vectors = piece.permute(0, 2, 3, 1, 4).flatten(3).to(torch.int16)  # [tiles, units, i, lane]
        start, low = 0, 0
        for width in planes(shape.bits):
            fields = ((vectors >> low) & ((1 << width) - 1)).unflatten(2, (width, 16 // width))
            plane = out[:, :, start : start + width]
            plane.copy_(fields[:, :, :, 0])
            for i in range(1, 16 // width):
                plane |= fields[:, :, :, i] << (width * i)
            start, low = start + width, low + width
    zeros = None if zero_point is None else _in_tiles(zero_point, shape)
    return Weight(laid_out, _in_tiles(scale, shape), zeros)


def codes_of(weight: Weight, shape: Shape) -> Tensor:
    """The codes, uint8 [N, K]: the inverse of ``lay_out``."""
    codes, start, low = torch.zeros((), dtype=torch.int16, device=weight.codes.device), 0, 0
    for width in planes(shape.bits):
        plane = weight.codes[:, :, start : start + width]
        fields = torch.stack([(plane >> (width * i)) & ((1 << width) - 1) for i in range(16 // width)], 3)
        codes = codes | (fields.flatten(2, 3) << low)
        start, low = start + width, low + width
    lanes = codes.to(torch.uint8).unflatten(3, (TILE, 2)).permute(0, 3, 1, 2, 4)
    padded = lanes.reshape(shape.padded_out, shape.padded_in)
    if shape.along_out:
        rows = padded.view(shape.groups, shape.padded_group, -1)[:, : shape.group_size, : shape.in_features]
        return rows.flatten(0, 1)
    return padded.view(-1, shape.groups, shape.padded_group)[: shape.out_features, :, : shape.group_size].flatten(1)


def per_group_of(values: Tensor, shape: Shape) -> Tensor:
    """Scale or zero-point as in the checkpoint: [N, K / g], or [N / g, K] with groups along the output."""
    if shape.along_out:
        return values[:, : shape.in_features].contiguous()
    return values.transpose(1, 2).flatten(0, 1)[: shape.out_features].contiguous()


def _padded(codes: Tensor, shape: Shape) -> Tensor:
    """[N, K] -> [N', K']."""
    extra = shape.padded_group - shape.group_size
    if shape.along_out:
        groups = codes.view(shape.groups, shape.group_size, -1)
        return F.pad(groups, (0, shape.padded_in - shape.in_features, 0, extra)).flatten(0, 1)
    groups = codes.view(shape.out_features, shape.groups, shape.group_size)
    return F.pad(groups, (0, extra, 0, 0, 0, shape.padded_out - shape.out_features)).flatten(1)


def _in_tiles(values: Tensor, shape: Shape) -> Tensor:
    """Scale or zero-point of the checkpoint, padded, in the order in which products take them."""
    if shape.along_out:
        return F.pad(values, (0, shape.padded_in - shape.in_features)).contiguous()
    rows = F.pad(values, (0, 0, 0, shape.padded_out - shape.out_features))
    return rows.unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
