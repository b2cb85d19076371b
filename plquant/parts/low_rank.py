"""QLLM's low-rank error correction (arXiv 2310.08041, section 3.3), inside the quantizer."""

from __future__ import annotations

import torch
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
        norms: Learn the weights of the norms too whose output goes to linears and nowhere else, as the released code
            does with Llama's; not those of queries and keys, nor those after attention or MLP (Gemma), nor one that a
            router of experts reads.
    """

    place = "low rank"

    def __init__(self, block: QuantBlock, rank: int = 4, lr: float = 5e-4, norms: bool = True) -> None:
        super().__init__(block)
        if rank < 1:
            raise ValueError(f"rank={rank} corrects nothing; choose 1 or more, or leave the part out")
        self.lr = lr
        self.learned: list[nn.Module] = []
        linears = list(block.linears.values())
        # The start differs from linear to linear, block to block, and with the seed of the run.
        generator = torch.Generator().manual_seed(torch.initial_seed())
        seeds = torch.randint(2**62, (block.index + 1, len(linears)), generator=generator)[-1].tolist()
        for linear, seed in zip(linears, seeds, strict=True):
            out_features, in_features = linear.weight.shape
            lora = LoRA(out_features, in_features, rank, seed=seed)
            linear.corrections.append(lora)
            self.learned.append(lora)
        for site in block.sites if norms else ():
            if site.kind == "norm" and not site.kept:
                gain = NormGain(block.num_channels(site))
                block.correct_norm_(site.source, gain, site.gain_offset)
                self.learned.append(gain)

    def learnables(self) -> dict[float, list[nn.Parameter]]:
        """Both factors of each, and the norms' gains."""
        return {self.lr: [p for module in self.learned for p in module.parameters()]}
