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
    """Rotates channels, starts from GPTQ's codes, learns the rounding of each weight and the clipping of each group.

    Where activations are quantized, a scale of each channel is learned too. Most rotations run with the model: such a
    checkpoint opens with plquant.load only.

    Args:
        block: The block to calibrate.
        rounding_lr: Learning rate of the rounding, in units of the scale.
        lwc_lr: Learning rate of the clipping strengths (logits).
        let_lr: Learning rate of the scales.
        rotate: Rotate; without it, and with 16-bit activations, stock transformers opens the checkpoint.
        seed: Chooses the rotations.
        schedule: Of the learning rates: ``cosine`` and ``linear`` let them fall to zero, ``constant`` keeps them.
    """

    def __init__(
        self,
        block: QuantBlock,
        rounding_lr: float = 1e-2,
        lwc_lr: float = 3e-3,
        let_lr: float = 1e-2,
        rotate: bool = True,
        seed: int = 0,
        schedule: Schedule = "cosine",
    ) -> None:
        parts: list[Part] = []
        if block.activations is not None:
            parts.append(LET(block, let_lr))
        if rotate:
            parts.append(Rotation(block, seed=seed))
        parts += [LWC(block, lwc_lr), LearnedRounding(block, rounding_lr)]
        super().__init__(block, parts, schedule)
        self.save_hyperparameters(ignore=["block"])
