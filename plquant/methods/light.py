"""The best that takes seconds a block: nothing is learned."""

from __future__ import annotations

from plquant.block_module import BlockModule
from plquant.blocks.quant_block import QuantBlock
from plquant.parts.axis import AxisChoice
from plquant.parts.base import Part
from plquant.parts.rotation import Rotation
from plquant.parts.rounding import GPTQRounding


class Light(BlockModule):
    """GPTQ with searched clipping: on rotated channels where activations are quantized, else on the better axis.

    Nothing is learned, so that ``--trainer.max_epochs`` makes no difference. The rotations run with the model.

    Args:
        block: The block to calibrate.
        seed: Chooses the rotations.
    """

    def __init__(self, block: QuantBlock, seed: int = 0) -> None:
        parts: list[Part] = []
        if block.activations is not None:
            parts.append(Rotation(block, seed=seed))
        elif block.grid.axis == "in" and block.grid.group_size is not None:
            parts.append(AxisChoice(block))
        super().__init__(block, [*parts, GPTQRounding(block)])
        self.save_hyperparameters(ignore=["block"])
