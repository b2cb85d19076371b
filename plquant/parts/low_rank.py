"""QLLM's low-rank error correction (arXiv 2310.08041, section 3.3), inside the quantizer."""

from __future__ import annotations

from torch import nn

from plquant.blocks.quant_block import QuantBlock
from plquant.nn.lora import LoRA
from plquant.nn.norm_gain import NormGain
from plquant.parts.base import Part


class LowRank(Part):
    """Learns a low-rank correction of every weight, and rounds the corrected weight: no cost at run time.

    The released code adds the correction outside the quantizer while it trains and inside when it is done, so that what
    it evaluates was never trained; here it is inside at all times.

    Args:
        block: The block to calibrate.
        rank: Of the correction.
        lr: Learning rate of its two factors.
        norms: Learn the weights of the block's norms too, as the released code does.
    """

    place = "low rank"

    def __init__(self, block: QuantBlock, rank: int = 4, lr: float = 5e-4, norms: bool = True) -> None:
        super().__init__(block)
        if rank < 1:
            raise ValueError(f"rank={rank} corrects nothing; choose 1 or more, or leave the part out")
        self.lr = lr
        self.learned: list[nn.Module] = []
        for number, linear in enumerate(block.linears.values()):
            out_features, in_features = linear.weight.shape
            lora = LoRA(out_features, in_features, rank, seed=number)
            linear.corrections.append(lora)
            self.learned.append(lora)
        for site in block.sites if norms else ():
            if site.kind == "norm":
                gain = NormGain(block.num_channels(site))
                block.correct_norm_(site.source, gain, site.gain_offset)
                self.learned.append(gain)

    def learnables(self) -> dict[float, list[nn.Parameter]]:
        """Both factors of each, and the norms' gains."""
        return {self.lr: [p for module in self.learned for p in module.parameters()]}
