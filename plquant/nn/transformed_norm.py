"""A norm under calibration: the source of an equivalent transformation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from plquant.transforms.scale_shift import ScaleShift, fold_source


class TransformedNorm(nn.Module):
    """Takes the place of a norm whose output channels are transformed.

    Args:
        norm: The original, with a weight [C] and perhaps a bias [C]; frozen.
        transform: Scale and shift of its output channels.
        gain_offset: 1.0 for norms which multiply by ``1 + weight``.
    """

    def __init__(self, norm: nn.Module, transform: ScaleShift, gain_offset: float) -> None:
        super().__init__()
        self.norm = norm.requires_grad_(False)
        self.transform = transform
        self.gain_offset = gain_offset
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        if not self.enabled:
            return self.norm(x)
        dtype = torch.promote_types(self.norm.get_parameter("weight").dtype, torch.float32)
        return functional_call(self.norm, self.transformed(dtype), (x,))

    def transformed(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The norm's parameters after the transform, computed in ``dtype`` and rounded to the norm's own."""
        weight, bias = self.norm.get_parameter("weight"), getattr(self.norm, "bias", None)
        shift = None if self.transform.shift is None else self.transform.shift.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        scale = self.transform.scale.to(dtype)
        new_weight, new_bias = fold_source(weight.to(dtype), bias, scale, shift, self.gain_offset)
        named = {"weight": new_weight} | ({} if new_bias is None else {"bias": new_bias})
        return {name: value.to(weight.dtype) for name, value in named.items()}

    @torch.no_grad()
    def fold_(self) -> nn.Module:
        """Make the transform permanent, computed in fp64; returns the original norm with its new parameters."""
        for name, value in self.transformed(torch.float64).items():
            getattr(self.norm, name).copy_(value)
        return self.norm
