"""A norm under calibration: the source of transforms."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from plquant.transforms.base import Transforms


class TransformedNorm(nn.Module):
    """Takes the place of a norm whose output channels are transformed.

    Args:
        norm: The original, with a weight [C] and perhaps a bias [C]; frozen.
        gain_offset: 1.0 for norms which multiply by ``1 + weight``.

    Attributes:
        transforms: Of its output channels, in order.
    """

    def __init__(self, norm: nn.Module, gain_offset: float) -> None:
        super().__init__()
        self.norm = norm.requires_grad_(False)
        self.gain_offset = gain_offset
        self.transforms = Transforms()
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        if not self.enabled:
            return self.norm(x)
        dtype = torch.promote_types(self.norm.get_parameter("weight").dtype, torch.float32)
        y = functional_call(self.norm, self.transformed(dtype), (x,))
        for transform in self.transforms:
            y = transform.online(y)
        return y

    def transformed(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The norm's parameters after the transforms, computed in ``dtype`` and rounded to the norm's own."""
        own, bias = self.norm.get_parameter("weight").dtype, getattr(self.norm, "bias", None)
        weight, bias = self.norm.get_parameter("weight").to(dtype), None if bias is None else bias.to(dtype)
        for transform in self.transforms:
            weight, bias = transform.write_norm(weight, bias, self.gain_offset)
        named = {"weight": weight} | ({} if bias is None else {"bias": bias})
        return {name: value.to(own) for name, value in named.items()}

    @torch.no_grad()
    def fold_(self) -> nn.Module:
        """Make the transforms permanent, computed in fp64; returns the original norm with its new parameters."""
        for name, value in self.transformed(torch.float64).items():
            getattr(self.norm, name).copy_(value)
        return self.norm
