"""Codes to int32 words and back: the ``pack-quantized`` layout of compressed-tensors, which engines read.

Each word holds ``32 // bits`` codes, the first in its lowest bits, so 3, 5, 6 and 7 bits leave some bits of a word
unused: they take 3.2, 5.33, 6.4 and 8 bits. Words hold codes from 0, whatever the grid. The library itself, which takes
seconds and 150 MiB to import, is not needed to open a model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from plquant.quant.affine import QTensor
from plquant.quant.grid import IntGrid


def pack(weight: QTensor) -> dict[str, Tensor]:
    """A quantized weight [O, I] as the tensors of a checkpoint.

    Returns:
        weight_packed int32 [O, ceil(I / n)], n codes a word; weight_scale as in ``QTensor``; weight_shape int64 [2];
        and for asymmetric grids weight_zero_point: int32 [ceil(O / n), G], or int8 [O / g, I] unpacked with groups
        along the output (compressed-tensors packs it for its group and channel strategies only).
    """
    bits = weight.grid.bits
    tensors = {
        "weight_packed": _words(_unsigned(weight.codes, bits), bits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if weight.zero_point is not None and weight.grid.axis == "out":
        tensors["weight_zero_point"] = _signed(weight.zero_point, bits)
    elif weight.zero_point is not None:
        tensors["weight_zero_point"] = _words(weight.zero_point.t(), bits).t().contiguous()
    return tensors


def unpack(tensors: dict[str, Tensor], shape: torch.Size, grid: IntGrid) -> QTensor:
    """The inverse of ``pack``."""
    codes, scale = _codes(tensors["weight_packed"], grid.bits, shape[1]), tensors["weight_scale"]
    if grid.symmetric:
        return QTensor(_signed(codes, grid.bits), scale, None, grid)
    zero_point = tensors["weight_zero_point"]
    if grid.axis == "out":
        return QTensor(codes, scale, _unsigned(zero_point, grid.bits), grid)
    return QTensor(codes, scale, _codes(zero_point.t(), grid.bits, shape[0]).t().contiguous(), grid)


def _words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] -> int32 [R, ceil(C / n)], n codes a word."""
    per_word = 32 // bits
    fields = F.pad(codes, (0, -codes.shape[1] % per_word)).unflatten(1, (-1, per_word))
    words = fields[..., 0].to(torch.int32)
    for index in range(1, per_word):
        words |= fields[..., index].to(torch.int32) << bits * index
    return words


def _codes(words: Tensor, bits: int, width: int) -> Tensor:
    """The inverse, uint8 [R, width]."""
    per_word = 32 // bits
    codes = words.new_empty(*words.shape, per_word, dtype=torch.uint8)
    for index in range(per_word):
        codes[..., index] = words >> bits * index & (1 << bits) - 1
    return codes.flatten(1)[:, :width].contiguous()


def _signed(codes: Tensor, bits: int) -> Tensor:
    """uint8 [0, 2^b) -> int8 [-2^(b-1), 2^(b-1)), the codes of symmetric grids and the library's zero-points."""
    return (codes - (1 << (bits - 1))).view(torch.int8)  # uint8 wraps around, as it should


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    """The inverse; uint8 is that already."""
    return codes if codes.dtype == torch.uint8 else codes.view(torch.uint8) + (1 << (bits - 1))
