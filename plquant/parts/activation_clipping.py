"""Learned clipping of activations, as in FlatQuant (arXiv 2410.09426), as a part."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from plquant.blocks.quant_block import QuantBlock
from plquant.parts.base import Part, check_rate
from plquant.quant.clipping import LearnedShares


class ActivationClipping(Part):
    """Learns how much of every token's range to keep at the input of each linear: two numbers per linear.

    Args:
        block: The block to calibrate.
        lr: Learning rate of the clipping strengths (logits).
        init: Logit they start at; 4.0 keeps 98.2% of the range.
    """

    place = "activation clipping"

    def __init__(self, block: QuantBlock, lr: float = 1e-2, init: float = 4.0) -> None:
        super().__init__(block)
        check_rate("ActivationClipping", "parts", lr, 1e-2)
        self.lr = lr
        self.clips: list[LearnedShares] = []
        for linear in block.linears.values():
            if linear.inputs is not None:
                linear.inputs.learned = LearnedShares((), init)
                self.clips.append(linear.inputs.learned)

    def check(self, parts: Sequence[Part]) -> None:
        """There is nothing to clip in 16 bits."""
        if not self.clips:
            raise ValueError(
                "ActivationClipping learns the ranges of quantized activations: set --model.activations.bits, or leave "
                "it out"
            )

    def learnables(self) -> dict[float, list[nn.Parameter]]:
        """The clipping strengths."""
        return {self.lr: [parameter for clip in self.clips for parameter in clip.parameters()]}
