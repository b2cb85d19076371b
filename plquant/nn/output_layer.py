"""The layer that makes logits of a packed model: it is not quantized, and in the end most of what a token reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plquant.kernels import ops


class OutputLayer(nn.Linear):
    """A linear with another's weight and bias, by ``ops.dense_linear`` on a CPU where no gradient is wanted."""

    @classmethod
    def of(cls, linear: nn.Linear) -> OutputLayer:
        """The same parameters, which stay tied to whatever they are tied to."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        tensors = [tensor for tensor in (x, self.weight, self.bias) if tensor is not None]
        plain = (
            self.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16)
            or any(tensor.dtype != self.weight.dtype or not tensor.is_cpu for tensor in tensors)
            or not self.weight.is_contiguous()
            or torch.is_autocast_enabled("cpu")  # which would cast inside the op
            or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        )
        return super().forward(x) if plain else ops.dense_linear(x, self.weight, self.bias)
