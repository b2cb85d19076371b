"""What came out best of all parts, at 2 to 8 bits, with activations quantized or not."""

from __future__ import annotations

from plquant.block_module import BlockModule, Schedule
from plquant.blocks.quant_block import QuantBlock
from plquant.parts.base import Part
from plquant.parts.clipping import LWC
from plquant.parts.learned_rounding import LearnedRounding
from plquant.parts.rotation import Rotation
from plquant.parts.scale_shift import LET


class Best(BlockModule):
    """Starts from GPTQ's codes and learns the rounding of every weight and the clipping of every group.

    Where activations are quantized, channels are scaled, which is learned too, and rotated, which runs with the model.

    Args:
        block: The block to calibrate.
        rounding_lr: Learning rate of the rounding, in units of the scale.
        lwc_lr: Learning rate of the clipping strengths (logits).
        let_lr: Learning rate of the scales.
        seed: Chooses the rotations.
        schedule: Of the learning rates: ``cosine`` and ``linear`` let them fall to zero, ``constant`` keeps them.
    """

    def __init__(
        self,
        block: QuantBlock,
        rounding_lr: float = 1e-2,
        lwc_lr: float = 3e-3,
        let_lr: float = 1e-2,
        seed: int = 0,
        schedule: Schedule = "cosine",
    ) -> None:
        parts: list[Part] = []
        if block.activations is not None:
            parts += [LET(block, let_lr), Rotation(block, seed=seed)]
        parts += [LWC(block, lwc_lr), LearnedRounding(block, rounding_lr)]
        super().__init__(block, parts, schedule)
        self.save_hyperparameters(ignore=["block"])
