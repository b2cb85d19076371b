"""A quantized linear at run time: packed words and scales are all it keeps in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plquant.formats.packing import pack, unpack
from plquant.nn.activation_quantizer import ActivationQuantizer
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.quant.affine import QTensor
from plquant.quant.grid import IntGrid


class PackedLinear(nn.Module):
    """y = x W^T + b with W in integers; buffers are named and laid out as in the checkpoint.

    The weight is unpacked in every forward, then multiplied: right on any device, and no faster than the original.

    Args:
        weight: The quantized weight.
        bias: [O] or ``None``.

    Attributes:
        online: Run-time operations on the input, [..., I] -> [..., I'], where its source is no norm; or ``None``.
        inputs: Quantizes what is multiplied with the weight, or ``None`` for 16-bit activations.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None

    def __init__(self, weight: QTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.grid: IntGrid = weight.grid
        self.out_features, self.in_features = weight.codes.shape
        for name, tensor in pack(weight).items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)
        self.online: nn.Module | None = None
        self.inputs: ActivationQuantizer | None = None

    @classmethod
    def empty(cls, linear: nn.Linear | FakeQuantLinear, grid: IntGrid) -> PackedLinear:
        """One to load tensors into, of the shape, dtype and device of ``linear``."""
        weight = linear.weight
        codes = torch.empty_like(weight, dtype=torch.int8 if grid.symmetric else torch.uint8)
        out_features, in_features = weight.shape
        size = grid.size(grid.grouped_width(weight.shape))
        along_in, along_out = (out_features, in_features // size), (out_features // size, in_features)
        groups = along_in if grid.axis == "in" else along_out
        scale = torch.empty(groups, dtype=weight.dtype, device=weight.device)
        zero_point = None if grid.symmetric else torch.empty(groups, dtype=torch.uint8, device=weight.device)
        bias = None if linear.bias is None else torch.empty_like(linear.bias)
        return cls(QTensor(codes, scale, zero_point, grid), bias)

    def quantized(self) -> QTensor:
        """The codes, scale and zero-point, unpacked."""
        tensors = {name: tensor for name, tensor in self.named_buffers(recurse=False) if name != "bias"}
        return unpack(tensors, torch.Size((self.out_features, self.in_features)), self.grid)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        x = x if self.online is None else self.online(x)
        x = x if self.inputs is None else self.inputs(x)
        weight = self.quantized().dequantize()
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        """Shape and grid, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, grid={self.grid}"
