"""Learned rounding (SignRound, arXiv 2309.05516): each weight learns which of its two neighbours it is rounded to."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from plquant.blocks.quant_block import QuantBlock
from plquant.parts.base import Fitting, Rounding, check_rate
from plquant.quant.clipping import LearnedClipping
from plquant.quant.gptq import gptq_round
from plquant.quant.observers import Hessian


class LearnedRounding(Rounding):
    """Learns a number for every weight that is added to it, in units of its scale, before it is rounded.

    Args:
        block: The block to calibrate.
        lr: Learning rate, in units of the scale: about how far a weight can move in a step.
        start: ``gptq`` starts from GPTQ's codes, ``nearest`` from the nearest.
    """

    def __init__(self, block: QuantBlock, lr: float = 5e-3, start: Literal["gptq", "nearest"] = "gptq") -> None:
        super().__init__(block)
        check_rate("LearnedRounding", "rounding_lr", lr, 5e-3)
        self.lr, self.from_gptq = lr, start == "gptq"
        self.nudges: list[nn.Parameter] = []
        for linear in block.linears.values():
            linear.nudge = nn.Parameter(torch.zeros_like(linear.weight, dtype=torch.float32))
            self.nudges.append(linear.nudge)

    def learnables(self) -> dict[float, list[nn.Parameter]]:
        """One number for every weight."""
        return {self.lr: self.nudges}

    @torch.no_grad()
    def start(self, fitting: Fitting) -> None:
        """GPTQ's codes, linear after linear, each on inputs that those before it have given."""
        if not self.from_gptq:
            return
        for names in fitting.stages():
            hessian = fitting.observe_quantized(Hessian, names[0])
            for name in names:
                linear = self.block.linears[name]
                weight = linear.transformed().dense()
                clip = linear.search_clip(hessian)
                if isinstance(linear.clip, LearnedClipping):
                    linear.clip.set_(clip.low, clip.high)
                    shares = linear.clip()
                else:
                    linear.clip = clip
                    shares = clip()
                stood = torch.empty_like(weight)
                quantized = gptq_round(weight, hessian, linear.grid, shares, linear.weight.dtype, wanted_at=stood)
                scale = quantized.scale.float().repeat_interleave(weight.shape[1] // quantized.scale.shape[1], 1)
                linear.nudge.copy_(stood - weight / scale)
