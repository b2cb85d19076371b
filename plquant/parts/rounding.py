"""The last part of any method: to nearest with searched clipping, and GPTQ (arXiv 2210.17323)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from plquant.blocks.quant_block import QuantBlock
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.parts.base import Rounding
from plquant.quant.affine import QTensor
from plquant.quant.axis import output_error
from plquant.quant.clipping import LearnedClipping
from plquant.quant.fake_quantize import Clip
from plquant.quant.gptq import gptq_round


class GPTQRounding(Rounding):
    """Rounds one input channel after the other and lets those that follow make up for the error of the output.

    Args:
        block: The block to calibrate.
        clip: Clip each group where the error of its rounding is least. Where clipping was learned (for rounding to
            nearest), the one of both that leaves the linear's output less error is taken.
        damp: Added to the diagonal of the Hessian, as a share of its mean.
        act_order: Take the input channels in the order of falling activation energy.
        token_weights: Let tokens count as they do in the block's error, where an error of what a linear gives them is
            followed through the block; false lets all count alike, as in the paper.
    """

    wants_hessian = fits_inputs = True

    def __init__(
        self,
        block: QuantBlock,
        clip: bool = True,
        damp: float = 0.01,
        act_order: bool = True,
        token_weights: bool = True,
    ) -> None:
        super().__init__(block)
        if not 0 <= damp < 1:
            raise ValueError(
                f"--model.method.damp={damp} is not a share of the Hessian's mean diagonal; "
                "choose 0 or more and less than 1, such as 0.01"
            )
        self.clip, self.damp, self.act_order, self.weighs_tokens = clip, damp, act_order, token_weights

    def round(self, linear: FakeQuantLinear, hessian: Tensor | None) -> QTensor:
        """Codes of least error on the inputs that gave the Hessian."""
        assert hessian is not None
        weight = linear.transformed().dense()
        clips: list[Clip | Literal["mse"] | None] = []
        if not self.clip or isinstance(linear.clip, LearnedClipping):
            clips.append(None if linear.clip is None else linear.clip())
        if self.clip:  # of each column as it comes to be rounded: better than shares that were searched before
            clips.append("mse")
        found = [
            gptq_round(weight, hessian, linear.grid, clip, linear.weight.dtype, self.damp, self.act_order)
            for clip in clips
        ]
        return min(found, key=lambda q: float(output_error(weight, q, hessian))) if len(found) > 1 else found[0]


class Nearest(Rounding):
    """Rounds to the nearest code.

    Args:
        block: The block to calibrate.
        clip: Clip each group where the error of its rounding is least, unless clipping was learned; input channels
            count by their energy.
        token_weights: Let tokens count as they do in the block's error, as in ``GPTQRounding``; also for a choice of
            the axis.
    """

    def __init__(self, block: QuantBlock, clip: bool = True, token_weights: bool = True) -> None:
        super().__init__(block)
        self.clip = self.wants_hessian = clip
        self.weighs_tokens = token_weights

    def round(self, linear: FakeQuantLinear, hessian: Tensor | None) -> QTensor:
        """Codes of the nearest grid points."""
        if not self.clip or linear.clip is not None:
            return linear.quantize()
        assert hessian is not None
        linear.clip = linear.search_clip(hessian)
        try:
            return linear.quantize()
        finally:
            linear.clip = None  # it belongs to this grid
