"""GPTQ (arXiv 2210.17323)."""

from __future__ import annotations

from plquant.block_module import BlockModule
from plquant.blocks.quant_block import QuantBlock
from plquant.parts.rounding import GPTQRounding


class GPTQ(BlockModule):
    """Rounds one input channel after the other and lets those that follow make up for the error. Nothing is learned.

    Args:
        block: The block to calibrate.
        clip: Clip each group where the error of its rounding is least; the paper does not.
        damp: Added to the diagonal of the Hessian, as a share of its mean.
        act_order: Take the input channels in the order of falling activation energy.
        token_weights: Let tokens count as they do in the block's error, where an error of what a linear gives them is
            followed through the block; false lets all count alike, as in the paper.
    """

    def __init__(
        self,
        block: QuantBlock,
        clip: bool = True,
        damp: float = 0.01,
        act_order: bool = True,
        token_weights: bool = True,
    ) -> None:
        super().__init__(block, [GPTQRounding(block, clip, damp, act_order, token_weights)])
        self.save_hyperparameters(ignore=["block"])
