"""A linear under calibration: full-precision weight, fake-quantized in every forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plquant.nn.activation_quantizer import ActivationQuantizer
from plquant.nn.corrections import Corrections
from plquant.quant.affine import QTensor
from plquant.quant.clip_search import mse_clip
from plquant.quant.clipping import Clipping, FixedClipping
from plquant.quant.fake_quantize import fake_quantize, quantize_weight
from plquant.quant.grid import IntGrid
from plquant.quant.scaled_weight import ScaledWeight
from plquant.transforms.base import Transform, Transforms


class FakeQuantLinear(nn.Module):
    """Takes the place of an ``nn.Linear`` while its block is calibrated.

    With no parts put into it this is rounding to nearest. ``enabled = False`` gives the original linear.

    Args:
        linear: The original; its weight [O, I] and bias are shared, and frozen.
        grid: What to round to, with its group size settled.

    Attributes:
        clip: How much of each group's range is kept, or ``None`` for all of it.
        reads: Transforms of the input channels, whose source is another module, in order.
        writes: Transforms of the output channels of which this linear is the source, in order.
        write_rows: The output channels each of them is about.
        nudge: [O, I'], what is added to ``w / scale`` before it is rounded, where rounding is learned; or ``None``.
        corrections: What is added to the transformed weight before rounding, in order.
        online: Those of ``reads`` of which the source leaves it to this linear to do what remains at run time.
        inputs: Quantizes what is multiplied with the weight, or ``None`` for 16-bit activations.
        watch: Called with the input as it comes and as it is multiplied with the weight, both [..., I].
    """

    def __init__(self, linear: nn.Linear, grid: IntGrid) -> None:
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        self.grid = grid
        self.enabled = True
        self.clip: Clipping | None = None
        self.nudge: nn.Parameter | None = None
        self.reads, self.writes, self.online = Transforms(), Transforms(), Transforms()
        self.write_rows: list[slice] = []
        self.corrections = Corrections()
        self.inputs: ActivationQuantizer | None = None
        self.watch: Callable[[Tensor, Tensor], None] | None = None
        self._settled: ScaledWeight | None = None

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.weight.shape[0]

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype of the scale that it will have."""
        return self.weight.dtype

    def add_read(self, transform: Transform, online: bool = False) -> None:
        """Put a transform on the input channels; ``online`` if what remains of it at run time is to be done here."""
        self.reads.append(transform)
        if online:
            self.online.append(transform)

    def add_write(self, transform: Transform, rows: slice = slice(None)) -> None:
        """Put a transform on the output channels ``rows``."""
        self.writes.append(transform)
        self.write_rows.append(rows)

    def forget_corrections(self) -> None:
        """Round to nearest, over the full range; transforms stay, others count on them."""
        self.clip, self.nudge, self.corrections, self._settled = None, None, Corrections(), None
        if self.inputs is not None:
            self.inputs.learned = None

    @torch.no_grad()
    def settle(self) -> None:
        """Compute the transformed weight once, where nothing that it is made of is learned, as fixed rotations."""
        made_of = nn.ModuleList([self.reads, self.writes, self.corrections])
        if not any(parameter.requires_grad for parameter in made_of.parameters()):
            self._settled = self.transformed()

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        came = x
        for transform in self.online:
            x = transform.online(x)
        if self.inputs is not None:
            x = self.inputs(x)
        if self.watch is not None:
            self.watch(came, x)
        with torch.autocast(device, enabled=False):
            weight = fake_quantize(*self._rounding(), dtype=dtype, scale_dtype=self.weight.dtype, nudge=self.nudge)
            bias = self.transformed_bias(torch.promote_types(self.weight.dtype, torch.float32))
        return F.linear(x, weight, None if bias is None else bias.to(dtype))

    def quantize(self) -> QTensor:
        """The codes behind ``forward``."""
        return quantize_weight(*self._rounding(), scale_dtype=self.weight.dtype, nudge=self.nudge)

    def search_clip(self, hessian: Tensor) -> FixedClipping:
        """Clipping of least squared error on the grid it has now, input channels counting by their energy.

        Args:
            hessian: Mean of x x^T over what is multiplied with the weight, [I, I].
        """
        return FixedClipping(*mse_clip(self.transformed().dense(), self.grid, self.weight.dtype, hessian.diagonal()))

    def transformed(self) -> ScaledWeight:
        """The weight that is rounded: after all transforms and corrections."""
        if self._settled is not None:
            return self._settled
        weight = ScaledWeight(self.weight)
        for transform, rows in zip(self.writes, self.write_rows, strict=True):
            weight = transform.write_weight(weight, rows)
        for transform in self.reads:
            weight = transform.read_weight(weight)
        for correction in self.corrections:
            weight = ScaledWeight(weight.dense() + correction.delta())
        return weight

    def transformed_bias(self, dtype: torch.dtype) -> Tensor | None:
        """The bias after all transforms, [O]; computed in ``dtype``."""
        bias: Tensor | None = None if self.bias is None else self.bias.to(dtype)
        for transform in self.reads:
            bias = transform.read_bias(self.weight, bias)
        for transform, rows in zip(self.writes, self.write_rows, strict=True):
            if bias is None:
                bias = transform.write_bias(None)
                continue
            start, stop, _ = rows.indices(len(bias))
            written = transform.write_bias(bias[start:stop])
            assert written is not None
            bias = torch.cat([bias[:start], written, bias[stop:]])
        return bias

    def _rounding(self) -> tuple[Tensor, IntGrid, tuple[Tensor, Tensor] | None, Tensor | None, Tensor | None]:
        """Arguments of the quantizer: weight, grid, clipping, scale of the input and of the output channels."""
        weight = self.transformed()
        clip = None if self.clip is None else self.clip()
        return weight.weight, self.grid, clip, weight.in_scale, weight.out_scale
