"""A linear under calibration: full-precision weight, fake-quantized in every forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plquant.quant.affine import QTensor
from plquant.quant.clipping import LearnedClipping
from plquant.quant.fake_quantize import fake_quantize, quantize_weight
from plquant.quant.grid import IntGrid
from plquant.transforms.scale_shift import ScaleShift, consumer_bias, source_bias


class FakeQuantLinear(nn.Module):
    """Takes the place of an ``nn.Linear`` while its block is calibrated.

    With no clipping and no transform this is rounding to nearest. ``enabled = False`` gives the original linear.

    Args:
        linear: The original; its weight [O, I] and bias are shared, and frozen.
        grid: What to round to, with its group size settled.

    Attributes:
        clip: Learned clipping, or ``None`` for the full range.
        reads: Transform of the input channels, whose source is another module.
        reads_channel: int64 [I]: the channel of that source which each input channel reads; ``None`` if it is its own.
        writes: Transform of the output channels, of which this linear is the source.
    """

    def __init__(self, linear: nn.Linear, grid: IntGrid) -> None:
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        self.grid = grid
        self.enabled = True
        self.clip: LearnedClipping | None = None
        self.reads: ScaleShift | None = None
        self.reads_channel: Tensor | None
        self.register_buffer("reads_channel", None, persistent=False)
        self.writes: ScaleShift | None = None

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        weight = fake_quantize(self.weight, self.grid, *self._parameters_of_rounding(), dtype=dtype)
        bias = self.transformed_bias(torch.promote_types(self.weight.dtype, torch.float32))
        return F.linear(x, weight, None if bias is None else bias.to(dtype))

    def quantize(self) -> QTensor:
        """The codes behind ``forward``."""
        return quantize_weight(self.weight, self.grid, *self._parameters_of_rounding())

    def transformed_bias(self, dtype: torch.dtype) -> Tensor | None:
        """The bias after both transforms, [O]; computed in ``dtype``."""
        bias: Tensor | None = None if self.bias is None else self.bias.to(dtype)
        if self.reads is not None and self.reads.shift is not None:
            bias = consumer_bias(self.weight, bias, self._gather(self.reads.shift).to(dtype))
        if self.writes is not None:
            shift = None if self.writes.shift is None else self.writes.shift.to(dtype)
            bias = source_bias(bias, self.writes.scale.to(dtype), shift)
        return bias

    def _parameters_of_rounding(self) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None, Tensor | None]:
        """Clipping, scale of the input channels, scale of the output channels."""
        return (
            None if self.clip is None else self.clip(),
            None if self.reads is None else self._gather(self.reads.scale),
            None if self.writes is None else 1 / self.writes.scale,
        )

    def _gather(self, values: Tensor) -> Tensor:
        return values if self.reads_channel is None else values[self.reads_channel]
