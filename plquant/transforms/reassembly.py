"""Channel reassembly (QLLM, arXiv 2310.08041) at one site: its plan, and who takes up what.

The source multiplies by the coefficients, for nothing: a norm in its gain, ``up`` in its rows. The consumers' columns
are gathered and added up like the activations. Before rounding a split changes nothing; a merge or a drop does, unless
channels are equal or unused. A plan belongs to activations as they are after earlier transforms of the site.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plquant.quant.scaled_weight import ScaledWeight
from plquant.transforms.base import Transform
from plquant.transforms.gather_op import GatherOp
from plquant.transforms.reassembly_plan import ReassemblyPlan

# Letters: K original channels, K' channels at run time, O output channels.


class ChannelReassembly(Transform):
    """Splits outlier channels and does without others, as its plan says.

    Every consumer must read the source's channels in their own order (a norm's linears; up to down).

    Args:
        plan: What every channel at run time is made of.
    """

    coefficient: Tensor

    def __init__(self, plan: ReassemblyPlan) -> None:
        super().__init__()
        self.register_buffer("coefficient", plan.coefficient)
        self.set_plan_(plan)

    def set_plan_(self, plan: ReassemblyPlan) -> None:
        """Take a plan, that very object, in the place of the one before."""
        assert plan.channels == len(self.coefficient), "a plan for another width"
        device = self.coefficient.device
        self.plan = plan
        self.is_online, self.preserves = not plan.is_identity, plan.is_identity
        self.coefficient = plan.coefficient.to(device)
        self.gather = GatherOp(plan.index, plan.adds).to(device)

    def write_weight(self, weight: ScaledWeight, rows: slice = slice(None)) -> ScaledWeight:
        """W -> diag(a) W; rounding with a scale per row does not see it."""
        return weight.scale_out(self.coefficient.to(torch.promote_types(weight.weight.dtype, torch.float32)), rows)

    def write_bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias times a, like the rows."""
        return None if bias is None else bias * self.coefficient.to(bias.dtype)

    def write_norm(self, weight: Tensor, bias: Tensor | None, gain_offset: float) -> tuple[Tensor, Tensor | None]:
        """The norm's gain, ``weight + gain_offset``, multiplied by the coefficients; the bias as that of a linear."""
        weight = (weight + gain_offset) * self.coefficient.to(weight.dtype) - gain_offset
        return weight, self.write_bias(bias)

    def read_weight(self, weight: ScaledWeight) -> ScaledWeight:
        """[O, K] -> [O, K']: a copy repeats its channel's column, a merge adds up its members'."""
        return weight.map_in(self.gather)

    def online(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., K'], of activations that the source has already multiplied by the coefficients."""
        return self.gather(x)

    def online_op(self) -> GatherOp | None:
        """The gather; ``None`` for the plan that changes nothing."""
        return self.gather if self.is_online else None
