"""AdaDim (arXiv 2309.15531): groups along the input or the output, chosen for each linear."""

from __future__ import annotations

from typing import Literal

from plquant.block_module import BlockModule
from plquant.blocks.quant_block import QuantBlock
from plquant.parts.axis import AxisChoice
from plquant.parts.rounding import GPTQRounding, Nearest


class AdaDim(BlockModule):
    """Chooses for each linear whether its groups run along the input or along the output channels. Weight-only.

    Args:
        block: The block to calibrate.
        rounding: ``gptq``, or to the ``nearest`` code, on either axis.
        tie: One choice for all linears that read the same tensor (q, k and v; gate and up), as fused kernels want it.
        clip: Clip each group where the error of its rounding is least; the paper does not.
    """

    def __init__(
        self,
        block: QuantBlock,
        rounding: Literal["nearest", "gptq"] = "gptq",
        tie: bool = False,
        clip: bool = True,
    ) -> None:
        last = GPTQRounding(block, clip) if rounding == "gptq" else Nearest(block, clip)
        super().__init__(block, [AxisChoice(block, tie), last])
        self.save_hyperparameters(ignore=["block"])
