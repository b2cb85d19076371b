"""AdaDim (arXiv 2309.15531): groups along the input or the output, chosen for each linear."""

from __future__ import annotations

from typing import Literal

from plquant.block_module import BlockModule
from plquant.blocks.quant_block import QuantBlock
from plquant.parts.axis import AxisChoice
from plquant.parts.base import Rounding
from plquant.parts.rounding import GPTQRounding, Nearest


class AdaDim(BlockModule):
    """Chooses for each linear whether its groups run along the input or along the output channels. Weight-only.

    Args:
        block: The block to calibrate.
        rounding: ``gptq``, or to the ``nearest`` code, on either axis.
        tie: One choice for all linears that read the same tensor (q, k and v; gate and up), as fused kernels want it.
        clip: Clip each group where the error of its rounding is least; the paper does not.
        token_weights: Let tokens count as they do in the block's error, where an error of what a linear gives them is
            followed through the block; false lets all count alike, as in the paper.
    """

    def __init__(
        self,
        block: QuantBlock,
        rounding: Literal["nearest", "gptq"] = "gptq",
        tie: bool = False,
        clip: bool = True,
        token_weights: bool = True,
    ) -> None:
        if rounding == "gptq":
            last: Rounding = GPTQRounding(block, clip, token_weights=token_weights)
        else:
            last = Nearest(block, clip, token_weights)
        super().__init__(block, [AxisChoice(block, tie), last])
        self.save_hyperparameters(ignore=["block"])
