"""Codes to int32 words and back: the ``pack-quantized`` layout of compressed-tensors, which engines read.

Each word holds ``32 // bits`` codes, the first in its lowest bits, so 3, 5, 6 and 7 bits leave some bits of a word
unused: they take 3.2, 5.33, 6.4 and 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plquant.quant.affine import QTensor
from plquant.quant.grid import IntGrid


def pack(weight: QTensor) -> dict[str, Tensor]:
    """A quantized weight [O, I] as the tensors of a checkpoint.

    Returns:
        weight_packed int32 [O, ceil(I / n)], n codes a word; weight_scale as in ``QTensor``; weight_shape int64 [2];
        and for asymmetric grids weight_zero_point: int32 [ceil(O / n), G], or int8 [O / g, I] unpacked with groups
        along the output (compressed-tensors packs it for its group and channel strategies only).
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    bits = weight.grid.bits
    tensors = {
        "weight_packed": pack_to_int32(_signed(weight.codes, bits), bits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if weight.zero_point is not None:
        zero_point = _signed(weight.zero_point, bits)
        packed = zero_point if weight.grid.axis == "out" else pack_to_int32(zero_point, bits, packed_dim=0)
        tensors["weight_zero_point"] = packed.contiguous()
    return tensors


def unpack(tensors: dict[str, Tensor], shape: torch.Size, grid: IntGrid) -> QTensor:
    """The inverse of ``pack``."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    codes = unpack_from_int32(tensors["weight_packed"], grid.bits, shape)
    scale = tensors["weight_scale"]
    if grid.symmetric:
        return QTensor(codes, scale, None, grid)
    zero_point = tensors["weight_zero_point"]
    if grid.axis == "in":
        zero_point = unpack_from_int32(zero_point, grid.bits, torch.Size((shape[0], scale.shape[1])), packed_dim=0)
    return QTensor(_unsigned(codes, grid.bits), scale, _unsigned(zero_point, grid.bits), grid)


def _signed(codes: Tensor, bits: int) -> Tensor:
    """uint8 [0, 2^b) -> int8 [-2^(b-1), 2^(b-1)), the convention of compressed-tensors; int8 is there already."""
    return codes if codes.dtype == torch.int8 else (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    return codes.view(torch.uint8) + (1 << (bits - 1))  # uint8 wraps around, as it should
