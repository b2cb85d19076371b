"""A quantized linear whose codes stay and whose scales learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plquant.nn.packed_linear import PackedLinear
from plquant.quant.affine import QTensor, to_groups


class TunedLinear(nn.Module):
    """Takes the place of a ``PackedLinear`` while scales are tuned.

    The scale is the stored one times ``exp(log_change)``, rounded to the stored dtype in every forward: what is trained
    is what is written. A byte a weight is kept; the weight itself is made for each product, and again for its
    gradient.

    Args:
        packed: The linear, not laid out for kernels.

    Attributes:
        log_change: fp32, of the stored scale's shape; starts at zero.
    """

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        assert packed.prepared is None
        self.packed = packed
        weight = packed.quantized()
        self.register_buffer("codes", weight.codes, persistent=False)
        self.register_buffer("zero_point", weight.zero_point, persistent=False)
        self.log_change = nn.Parameter(torch.zeros_like(weight.scale, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O], the numbers of the packed linear with this scale."""
        x = x if self.packed.online is None else self.packed.online(x)
        x = x if self.packed.inputs is None else self.packed.inputs(x)
        device = x.device.type
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        with torch.autocast(device, enabled=False):
            return _Product.apply(x, self._scale(), self)

    def weight(self, scale: Tensor) -> QTensor:
        """The quantized weight with this scale, rounded to the stored dtype."""
        zero_point: Tensor | None = self.zero_point  # type: ignore[assignment]
        return QTensor(self.codes, scale.to(self.packed.scale_dtype), zero_point, self.packed.grid)  # type: ignore[arg-type]

    @torch.no_grad()
    def fold_(self) -> PackedLinear:
        """Make the change permanent; returns the packed linear with its new scale."""
        self.packed.weight_scale.copy_(self._scale())
        return self.packed

    def _scale(self) -> Tensor:
        return self.packed.weight_scale.float() * self.log_change.exp()


class _Product(torch.autograd.Function):
    """``x W^T`` with W made anew in the backward: no weight of the model is kept between the two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, linear: TunedLinear) -> Tensor:
        """[..., I], fp32 scale -> [..., O]."""
        ctx.save_for_backward(x, scale)
        ctx.linear = linear
        bias = None if linear.packed.bias is None else linear.packed.bias.to(x.dtype)
        return F.linear(x, linear.weight(scale).dequantize().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None]:
        """Straight through the rounding of the scale to its dtype: ``d W / d scale`` is code - zero_point."""
        x, scale = ctx.saved_tensors
        weight, (grad,) = ctx.linear.weight(scale), grads
        grad_x = grad @ weight.dequantize().to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        steps = QTensor(weight.codes, torch.ones_like(scale), weight.zero_point, weight.grid).dequantize()
        per_group = to_groups(grad_weight.float() * steps, weight.grid).sum(-1)
        return grad_x, per_group if weight.grid.axis == "in" else per_group.t(), None
