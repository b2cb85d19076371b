"""LET, OmniQuant's learnable equivalent transformation (arXiv 2308.13137, section 3.3): scale and shift a channel.

    source:    y  -> (y - shift) / scale
    consumer:  W  -> W diag(scale),   b -> b + W shift

so that W y + b is the same number before quantization, while the weight that is rounded is W diag(scale).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plquant.quant.scaled_weight import ScaledWeight
from plquant.transforms.base import Transform


def shifted_bias(bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """The source's bias [C] less the shift [C], in the dtype of the bias.

    Raises:
        ValueError: A shift, but no bias that could take it.
    """
    if shift is None:
        return bias
    if bias is None:
        raise ValueError("a shift was given, but the source has no bias that could take it; leave it out")
    return bias - shift.to(bias.dtype)


def source_bias(bias: Tensor | None, scale: Tensor, shift: Tensor | None) -> Tensor | None:
    """The source's bias [C] after the transform, in its dtype: ``(b - shift) / scale``; an error as above."""
    bias = shifted_bias(bias, shift)
    return None if bias is None else bias / scale.to(bias.dtype)


def consumer_bias(weight: Tensor, bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """A consumer's bias [O] after the transform: ``b + W shift``, with the weight [O, I] from before it.

    Raises:
        ValueError: A shift, but no bias that could take it.
    """
    if shift is None:
        return bias
    if bias is None:
        raise ValueError("a shift was given, but the consumer has no bias that could take it; leave it out")
    return bias + weight.to(bias.dtype) @ shift.to(bias.dtype)


class ScaleShift(Transform):
    """The learnable scale and shift of one site.

    The scale is ``exp(log_scale)``: positive at every step, so that it can always be divided by (the official code
    truncates a free parameter at 0.01 instead).

    Args:
        channels: Width of the source's output, C.
        channel: int64 [I]: the source's channel which each input channel of a consumer reads; its own if not given.
        shift: Learn a shift too; only where source and consumers have a bias.
    """

    channel: Tensor | None

    def __init__(self, channels: int, channel: Tensor | None = None, shift: bool = False) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels, dtype=torch.float32))
        self.shift = nn.Parameter(torch.zeros(channels, dtype=torch.float32)) if shift else None
        own = channel is None or torch.equal(channel.cpu(), torch.arange(channels))
        self.register_buffer("channel", None if own else channel, persistent=False)

    @property
    def scale(self) -> Tensor:
        """The positive scale, fp32 [C]."""
        return self.log_scale.exp()

    def write_weight(self, weight: ScaledWeight, rows: slice = slice(None)) -> ScaledWeight:
        """The weight: ``diag(1 / scale) W``."""
        return weight.scale_out(1 / self.scale, rows)

    def write_bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias: ``(b - shift) / scale``; without one, a shift is an error."""
        return source_bias(bias, self.scale, self.shift)

    def write_norm(self, weight: Tensor, bias: Tensor | None, gain_offset: float) -> tuple[Tensor, Tensor | None]:
        """The norm's gain, ``weight + gain_offset``, divided by the scale; the bias as that of a linear."""
        weight = (weight + gain_offset) / self.scale.to(weight.dtype) - gain_offset
        return weight, source_bias(bias, self.scale, self.shift)

    def read_weight(self, weight: ScaledWeight) -> ScaledWeight:
        """The weight: ``W diag(scale)``."""
        return weight.scale_in(self._gather(self.scale))

    def read_bias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The bias: ``b + W shift``; without one, a shift is an error."""
        return consumer_bias(weight, bias, None if self.shift is None else self._gather(self.shift))

    def _gather(self, values: Tensor) -> Tensor:
        return values if self.channel is None else values[self.channel]
