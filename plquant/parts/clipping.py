"""LWC, learnable weight clipping (OmniQuant, arXiv 2308.13137, section 3.2), as a part."""

from __future__ import annotations

from torch import nn

from plquant.blocks.quant_block import QuantBlock
from plquant.parts.base import Part, check_rate
from plquant.quant.clipping import LearnedClipping


class LWC(Part):
    """Learns how much of each group's range to keep: two numbers per group.

    Args:
        block: The block to calibrate.
        lr: Learning rate of the clipping strengths (logits).
        init: Logit they start at; 4.0 keeps 98.2% of the range.
    """

    place = "clipping"

    def __init__(self, block: QuantBlock, lr: float = 1e-1, init: float = 4.0) -> None:
        super().__init__(block)
        check_rate("LWC", "lwc_lr", lr, 1e-1)
        self.lr = lr
        self.clips: list[LearnedClipping] = []
        for linear in block.linears.values():
            clip = LearnedClipping(linear.weight.shape, linear.grid, init)
            linear.clip = clip
            self.clips.append(clip)

    def learnables(self) -> dict[float, list[nn.Parameter]]:
        """The clipping strengths."""
        return {self.lr: [p for clip in self.clips for p in clip.parameters()]}
