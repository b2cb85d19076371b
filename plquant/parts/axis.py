"""AdaDim (arXiv 2309.15531): groups along the input or along the output, chosen for each linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from plquant.blocks.quant_block import QuantBlock
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.parts.base import Part, Rounding
from plquant.quant.affine import QTensor
from plquant.quant.axis import AXES, Axis, choose_axis, output_error

# Groups of 64 at 2 bits on 4,080 tokens of SmolLM2, error with groups along the output over that along the input: of
# down_proj 0.93 to 0.96 on these tokens and 1.03 to 1.05 on others by a plain Hessian, 0.99 to 1.01 and 1.02 to 1.04 by
# one with a ridge (bench/held_out.py). That leaves little to gain, and the error of a linear is not all of it: AdaDim
# by GPTQ has a perplexity of 98.2 there, and of 107.8 with no margin.
MARGIN = 0.1


class AxisChoice(Part):
    """Chooses for each linear whether its groups run along the input or along the output channels.

    Both are rounded, after all other parts are fitted, and the one with the lesser error of the linear's output is
    kept: tr((W - Q) H (W - Q)^T), H from the inputs that the blocks quantized so far give. Groups along the output
    keep an input channel with large activations from its neighbours.

    Codes that GPTQ has fitted to the inputs seen have less error on them than on others, those of groups along the
    output by more, so that there these have to be better by a tenth.

    Args:
        block: The block to calibrate.
        tie: One choice for all linears that read the same tensor (q, k and v; gate and up), as fused kernels want it.
    """

    place = "axis"
    axes = AXES

    def __init__(self, block: QuantBlock, tie: bool = False) -> None:
        super().__init__(block)
        self.tie = tie

    def check(self, parts: Sequence[Part]) -> None:
        """Per-input-channel scales lie inside the sum over input channels, which integers cannot do."""
        if self.block.grid.group_size is None:
            raise ValueError(
                "the axis of groups cannot be chosen with --model.weights.group_size=null: there are none; "
                "choose 128, 64 or 32"
            )
        if any(linear.inputs is not None for linear in self.block.linears.values()):
            raise ValueError(
                "groups along the output have a scale for each input channel, inside the sum of a product of integers: "
                "leave out --model.activations, or the choice of the axis"
            )

    def round(
        self,
        linears: Sequence[FakeQuantLinear],
        hessians: Sequence[Tensor],
        rounding: Rounding,
    ) -> list[QTensor]:
        """Codes of linears that read the same tensor, on the better axis."""
        pairs = list(zip(linears, hessians, strict=True))
        candidates = [self._candidates(linear, hessian, rounding.round) for linear, hessian in pairs]
        errors = [
            {axis: float(output_error(linear.transformed().dense(), q, hessian)) for axis, q in found.items()}
            for (linear, hessian), found in zip(pairs, candidates, strict=True)
        ]
        choose = partial(choose_axis, margin=MARGIN if rounding.fits_inputs else 0)
        best = [choose(*errors)] * len(linears) if self.tie else [choose(error) for error in errors]
        return [found[axis] for found, axis in zip(candidates, best, strict=True)]

    def _candidates(
        self, linear: FakeQuantLinear, hessian: Tensor, rounding: Callable[[FakeQuantLinear, Tensor], QTensor]
    ) -> dict[Axis, QTensor]:
        found: dict[Axis, QTensor] = {}
        own_grid, learned = linear.grid, linear.clip
        for axis in AXES:
            linear.grid = replace(own_grid, axis=axis)
            if learned is not None and axis != own_grid.axis:  # no learned clipping there, but a fair comparison
                linear.clip = linear.search_clip(hessian)
            found[axis] = rounding(linear, hessian)
            linear.clip = learned
        linear.grid = own_grid
        return found
