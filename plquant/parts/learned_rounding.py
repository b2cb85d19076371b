"""Learned rounding (SignRound, arXiv 2309.05516), from GPTQ's codes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from plquant.blocks.quant_block import QuantBlock
from plquant.parts.base import Fitting, Part, Rounding, check_rate
from plquant.quant.clipping import LearnedClipping
from plquant.quant.gptq import gptq_round


class LearnedRounding(Rounding):
    """Learns a number for every weight, which is added to it, in units of its scale, before it is rounded.

    Args:
        block: The block to calibrate.
        lr: Learning rate, in units of the scale.
        start: ``gptq`` starts from GPTQ's codes, with searched clipping (which is where learned clipping then starts
            too); ``nearest`` from the nearest codes.
    """

    def __init__(self, block: QuantBlock, lr: float = 1e-2, start: Literal["gptq", "nearest"] = "gptq") -> None:
        super().__init__(block)
        check_rate("LearnedRounding", "rounding_lr", lr, 1e-2)
        self.lr, self.from_gptq = lr, start == "gptq"
        self.nudges: dict[str, nn.Parameter] = {}
        for name, linear in block.linears.items():
            self.nudges[name] = linear.nudge = nn.Parameter(torch.zeros_like(linear.weight, dtype=torch.float32))

    def check(self, parts: Sequence[Part]) -> None:
        """It learns for one grid."""
        if any(part.axes for part in parts):
            raise ValueError(
                "LearnedRounding learns the codes of one axis: leave out the choice of the axis, or give it with "
                "--model.weights.axis"
            )

    def learnables(self) -> dict[float, list[nn.Parameter]]:
        """One number for every weight."""
        return {self.lr: list(self.nudges.values())}

    @torch.no_grad()
    def start(self, fitting: Fitting) -> None:
        """GPTQ, linear after linear, each on inputs that those before it have given."""
        for name, nudge in self.nudges.items():  # a reassembly has changed the width of some
            nudge.data = torch.zeros_like(self.block.linears[name].transformed().dense())
        for names, hessians in fitting.hessians() if self.from_gptq else ():
            for name, hessian in zip(names, hessians, strict=True):
                linear = self.block.linears[name]
                weight = linear.transformed().dense()
                searched = linear.search_clip(hessian)
                if isinstance(linear.clip, LearnedClipping):
                    linear.clip.set_(*searched())
                else:
                    linear.clip = searched
                compensated = torch.empty_like(weight)
                gptq_round(weight, hessian, linear.grid, linear.clip(), linear.weight.dtype, compensated=compensated)
                self.nudges[name].add_(linear.quantize().in_steps(compensated - weight))
