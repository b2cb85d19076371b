"""The layer that makes logits of a packed model: it is not quantized, and in the end most of what a token reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plquant.kernels import ops


class OutputLayer(nn.Linear):
    """A linear with another's weight and bias, run by ``ops.dense_linear`` on a CPU where no gradient is wanted."""

    @classmethod
    def of(cls, linear: nn.Linear) -> OutputLayer:
        """The same parameters, which stay tied to whatever they are tied to."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        wants_gradient = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if x.device.type != "cpu" or wants_gradient:
            return super().forward(x)
        return ops.dense_linear(x, self.weight, self.bias)
