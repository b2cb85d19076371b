"""Which CPU kernel takes which product.

Integers, and a few rows of anything else, are multiplied as the codes are read, up to 16 rows in a pass, with AVX2 up
to 4. More rows are multiplied with AMX where the CPU has it: bf16, and integers with one scale per output. Elsewhere
the weight is dequantized, some tiles at a time so that they stay in the cache, and multiplied by torch; fp16
activations then in fp32, with AVX2 those of bf16 too: torch has no quick product of them there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from plquant.kernels import native
from plquant.kernels.cpu_layout import TILE, Shape, Weight

SCRATCH_BYTES = 1 << 21  # about a second-level cache
FEW_INTEGERS = 16  # rows that are sooner multiplied as such, however short the groups
FEW = 32  # rows of bf16 that passes over the codes take sooner than a dequantized weight
FEW_BESIDE_AMX = 4  # than AMX


def linear(x: Tensor, weight: Weight, bias: Tensor | None, shape: Shape) -> Tensor:
    """``x W^T + bias``; ``x`` [M, K] contiguous."""
    # Folding the scale into an activation rounds it, as dequantizing to bf16 rounds the weight; fp16 and fp32 do not.
    parts, tiled = native.parts(x.dtype), x.dtype == torch.bfloat16 and native.amx()
    if len(x) * parts <= (FEW_BESIDE_AMX if tiled else FEW):
        return native.few_rows(x, weight, shape, bias, x.dtype, parts)
    if tiled:
        return native.many_rows(x, weight, shape, bias, x.dtype)
    dtype = _product_dtype(x.dtype)
    return _many_rows(x.to(dtype), weight, None if bias is None else bias.to(dtype), shape).to(x.dtype)


def quantized_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    shape: Shape,
    bits: int,
    symmetric: bool,
    offset: Tensor | None,
    clip: Tensor | None = None,
) -> Tensor:
    """``linear`` of the activations quantized row by row; their steps are integers below 256, exact in bf16."""
    # Each group has sums of its own. Many rows of short groups are sooner multiplied as bf16, and of any groups where
    # there is AMX, which has integers for one group only.
    tiled = x.dtype == torch.bfloat16 and native.amx()
    as_codes = shape.groups == 1 or len(x) <= FEW_INTEGERS or (shape.group_size >= 32 and not tiled)
    if shape.bits == 8 and native.vectors() == "AVX2":  # which multiplies 8 bits as twice 4
        as_codes = len(x) <= native.MOST_DISPATCHED_ROWS
    if as_codes and not shape.along_out and shape.group_size <= native.MOST_INTEGER_INPUTS:
        in_tiles = shape.groups == 1 and len(x) > FEW_BESIDE_AMX and native.amx()
        product = native.many_rows if in_tiles else native.integer_rows
        return product(native.row_codes(x, bits, symmetric, offset, clip), weight, shape, bias, x.dtype)
    steps, scale = native.quantize_rows(x, bits, symmetric, offset, clip)
    parts = native.parts(x.dtype)
    if len(x) * parts <= (FEW_BESIDE_AMX if tiled else FEW):
        return native.few_rows(steps, weight, shape, bias, x.dtype, parts, scale)
    if tiled:
        return native.many_rows(steps.bfloat16(), weight, shape, bias, x.dtype, scale)
    out = _many_rows(steps.to(_product_dtype(x.dtype)), weight, None, shape).mul_(scale[:, None])
    return (out if bias is None else out.add_(bias)).to(x.dtype)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear`` of a plain weight [N, K], contiguous: torch reads one of bf16 at a third of the memory's speed.

    With AVX2 many rows of bf16 meet it in fp32, of which a piece is made at a time.
    """
    if x.dtype == torch.bfloat16 and 0 < len(x) <= native.MOST_DENSE_ROWS:
        return native.dense_rows(x, weight, bias)
    if x.dtype != torch.bfloat16 or native.vectors() != "AVX2":
        return F.linear(x, weight, bias)
    wide, out = x.float(), x.new_empty(len(x), len(weight))
    step = max(1, SCRATCH_BYTES // (weight.shape[1] * wide.itemsize))
    for start in range(0, len(weight), step):
        some = slice(start, start + step)
        out[:, some] = F.linear(wide, weight[some].float(), None if bias is None else bias[some].float())
    return out


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """That in which torch multiplies many rows soonest."""
    return torch.bfloat16 if dtype == torch.bfloat16 and native.vectors() == "AVX512" else torch.float32


def _many_rows(x: Tensor, weight: Weight, bias: Tensor | None, shape: Shape) -> Tensor:
    out = x.new_empty(len(x), shape.out_features)
    tiles = shape.padded_out // TILE
    step = max(1, SCRATCH_BYTES // (shape.in_features * TILE * x.itemsize))
    scratch = x.new_empty(shape.in_features * TILE * step)
    start = 0
    for tile in range(0, tiles, step):
        end = min(tile + step, tiles)
        width = _outputs(end, shape) - start
        some = scratch[: shape.in_features * width].view(shape.in_features, width)
        native.dequantize(weight, shape, slice(tile, end), some)
        piece = out[:, start : start + width]
        if bias is None:
            torch.mm(x, some, out=piece)
        else:
            torch.addmm(bias[start : start + width], x, some, out=piece)
        start += width
    return out


def _outputs(tiles: int, shape: Shape) -> int:
    """How many outputs the first tiles hold."""
    if not shape.along_out:
        return min(tiles * TILE, shape.out_features)
    groups, rest = divmod(tiles * TILE, shape.padded_group)
    return groups * shape.group_size + min(rest, shape.group_size)
