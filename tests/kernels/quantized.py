"""Random quantized weights, and the error that a product with one may have."""

from __future__ import annotations

import torch
from torch import Tensor

from plquant.kernels.layout import Axis, PackedWeight, pack
from plquant.kernels.tokens import QuantizedTokens


def quantized(
    bits: int,
    shape: tuple[int, int],
    group_size: int,
    axis: Axis = "in",
    dtype: torch.dtype = torch.float16,
    symmetric: bool = False,
    device: str = "cpu",
) -> tuple[PackedWeight, Tensor]:
    """A packed weight, and what it stands for in float64."""
    generator = torch.Generator().manual_seed(bits + sum(shape))
    rows, columns = shape
    groups = (rows, columns // group_size) if axis == "in" else (rows // group_size, columns)
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)
    scale = (torch.rand(groups, generator=generator) * 0.01 + 0.005).to(dtype)
    zeros = torch.full(groups, 1 << (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(0, 1 << bits, groups, dtype=torch.uint8, generator=generator)

    def spread(tensor: Tensor) -> Tensor:
        return tensor.double().repeat_interleave(group_size, 1 if axis == "in" else 0)

    weight = (codes.double() - spread(zeros)) * spread(scale)
    tensors = [t.to(device) for t in (codes, scale, zeros)]
    packed = pack(tensors[0], tensors[1], None if symmetric else tensors[2], bits, group_size, axis)
    return packed, weight.to(device)


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float16, device: str = "cpu") -> Tensor:
    """Rows with some larger channels, as activations have them."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    x[:, ::16] *= 4
    return x.to(dtype).to(device)


def tokens_of(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> QuantizedTokens:
    """Codes [M, K] with their scales and zero-points [M], as kernels take them; what is no part of them is full."""
    tokens = QuantizedTokens.empty(codes, codes.shape[1], zero_point is None)
    tokens.rows.fill_(-1)
    tokens.codes.copy_(codes)
    tokens.scale.copy_(scale)
    tokens.sums.copy_(codes.sum(1))
    if zero_point is not None and tokens.zero_point is not None:
        tokens.zero_point.copy_(zero_point)
    return tokens


def error_ratio(out: Tensor, x: Tensor, weight: Tensor) -> float:
    """The error of a product over that of: dequantize to the dtype of x, multiply, round."""
    exact = x.double() @ weight.T
    plain = (x.float() @ weight.to(x.dtype).float().T).to(x.dtype)
    return float((out.double() - exact).norm() / (plain.double() - exact).norm())
