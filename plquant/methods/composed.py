"""Any legal set of parts, put together in a configuration."""

from __future__ import annotations

from plquant.block_module import BlockModule, Schedule
from plquant.blocks.quant_block import QuantBlock
from plquant.parts.base import MakePart


class Composed(BlockModule):
    """Calibrates a block with the parts that are listed.

    Args:
        block: The block to calibrate.
        parts: What to do, in the legal order: scale and shift (LET), affine matrix, reassembly, low rank, clipping
            (LWC), axis, rounding. An empty list rounds to nearest.
        schedule: Of the learning rates: ``cosine`` lets them fall to zero, ``constant`` keeps them.
        aug_loss: Also fit to what the full-precision block makes of the quantized input. One more activation stream.
    """

    def __init__(
        self, block: QuantBlock, parts: list[MakePart], schedule: Schedule = "cosine", aug_loss: bool = False
    ) -> None:
        made = [make(block) for make in parts]
        super().__init__(block, made, schedule, aug_loss)
        recipe = [{"class": type(part).__name__, **part.options} for part in made]
        self.save_hyperparameters({"parts": recipe, "schedule": schedule, "aug_loss": aug_loss})

    @property
    def title(self) -> str:
        """The names of its parts."""
        return " + ".join(type(part).__name__ for part in self.parts) or "RTN"
