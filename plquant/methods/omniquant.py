"""OmniQuant (arXiv 2308.13137): learnable weight clipping and a learnable equivalent transformation."""

from __future__ import annotations

from typing import Literal

from plquant.block_module import BlockModule, Schedule
from plquant.blocks.quant_block import QuantBlock
from plquant.parts.base import Part
from plquant.parts.clipping import LWC
from plquant.parts.scale_shift import LET


class OmniQuant(BlockModule):
    """Learns how much of each group's range to keep, and how to share the difficulty between neighbouring layers.

    Args:
        block: The block to calibrate.
        lwc: Learn weight clipping (LWC): two numbers per group.
        let: Learn an equivalent transformation (LET) wherever the block admits one: a scale per channel, and a shift
            where biases can take it up. It is folded into the weights and costs nothing at run time.
        lwc_lr: Learning rate of the clipping strengths (logits).
        let_lr: Learning rate of the transformation (logarithms of scales).
        schedule: ``cosine`` lets both rates fall to zero, ``constant`` keeps them, as the paper does with rates of
            1e-2 and 5e-3. A step sees few tokens: at a high constant rate what is learned keeps trembling, at a low
            one it does not get far enough.
        alpha: The transformation starts at max|x|^alpha / max|w|^(1 - alpha) per channel, as in SmoothQuant;
            ``search`` tries several; ``null`` starts at the identity.
        shift: Learn shifts where biases take them up; the paper does with quantized activations only.
        aug_loss: Also fit to what the full-precision block makes of the quantized input. One more activation stream.
    """

    def __init__(
        self,
        block: QuantBlock,
        lwc: bool = True,
        let: bool = True,
        lwc_lr: float = 1e-1,
        let_lr: float = 5e-3,
        schedule: Schedule = "cosine",
        alpha: float | Literal["search"] | None = 0.5,
        shift: bool = True,
        aug_loss: bool = False,
    ) -> None:
        if not (lwc or let):
            raise ValueError("--model.method.lwc=false with --model.method.let=false leaves nothing to learn; use RTN")
        parts: list[Part] = [LET(block, let_lr, alpha, shift)] if let else []
        parts += [LWC(block, lwc_lr)] if lwc else []
        super().__init__(block, parts, schedule, aug_loss)
        self.save_hyperparameters(ignore=["block"])
