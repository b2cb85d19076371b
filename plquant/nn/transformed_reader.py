"""A module that reads transformed channels and stays in full precision: the router of a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from plquant.quant.scaled_weight import ScaledWeight
from plquant.transforms.base import Transforms


class TransformedReader(nn.Module):
    """Takes the place of a module whose input channels are transformed, while its block is calibrated.

    Args:
        reader: The original, with a weight [E, I] and perhaps a bias [E]; frozen.

    Attributes:
        reads: Transforms of the input channels, in order.
        enabled: ``False`` gives the original.
    """

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.reader = reader.requires_grad_(False)
        self.reads = Transforms()
        self.enabled = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        if not self.enabled:
            return self.reader(*args, **kwargs)
        original = self.reader.get_parameter("weight")
        dtype = torch.promote_types(original.dtype, torch.float32)
        with torch.autocast(original.device.type, enabled=False):  # as in the fold
            parameters = self.transformed(dtype)
        return functional_call(self.reader, parameters, args, kwargs)

    def transformed(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Its parameters after the transforms, computed in ``dtype`` and rounded to its own."""
        original = self.reader.get_parameter("weight")
        bias: Tensor | None = getattr(self.reader, "bias", None)
        bias = None if bias is None else bias.to(dtype)
        weight = ScaledWeight(original.to(dtype))
        for transform in self.reads:
            weight, bias = transform.read_weight(weight), transform.read_bias(original.to(dtype), bias)
        named = {"weight": weight.dense()} | ({} if bias is None else {"bias": bias})
        return {name: value.to(original.dtype) for name, value in named.items()}

    @torch.no_grad()
    def fold_(self) -> nn.Module:
        """Make the transforms permanent, computed in fp64; returns the original with its new parameters."""
        for name, value in self.transformed(torch.float64).items():
            getattr(self.reader, name).copy_(value)
        return self.reader
