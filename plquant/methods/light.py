"""The best that takes seconds a block: nothing is learned."""

from __future__ import annotations

from plquant.block_module import BlockModule
from plquant.blocks.quant_block import QuantBlock
from plquant.parts.axis import AxisChoice
from plquant.parts.base import Part
from plquant.parts.rotation import Rotation
from plquant.parts.rounding import GPTQRounding


class Light(BlockModule):
    """GPTQ with searched clipping, on rotated channels.

    Nothing is learned, so that ``--trainer.max_epochs`` makes no difference. Most rotations run with the model: such a
    checkpoint opens with plquant.load only.

    Args:
        block: The block to calibrate.
        rotate: Rotate; without it groups run along the better axis of each linear where activations have 16 bits, and
            stock transformers opens the checkpoint.
        seed: Chooses the rotations.
    """

    def __init__(self, block: QuantBlock, rotate: bool = True, seed: int = 0) -> None:
        parts: list[Part] = []
        if rotate:
            parts.append(Rotation(block, seed=seed))
        elif block.activations is None and block.grid.axis == "in" and block.grid.group_size is not None:
            parts.append(AxisChoice(block))
        super().__init__(block, [*parts, GPTQRounding(block)])
        self.save_hyperparameters(ignore=["block"])
