"""QLLM's channel disassembly and assembly (arXiv 2310.08041, section 3.2) as a part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from plquant.blocks.quant_block import QuantBlock
from plquant.blocks.sites import Site
from plquant.nn.activation_quantizer import ActivationQuantizer
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.nn.fixed_delta import FixedDelta
from plquant.parts.affine import Affine
from plquant.parts.base import Fitting, Part
from plquant.quant.observers import ChannelAbsMax, Hessian
from plquant.transforms.channel_removal import drop_order, merge_order
from plquant.transforms.compensation import compensate
from plquant.transforms.reassembly import ChannelReassembly
from plquant.transforms.reassembly_plan import ReassemblyPlan, split_order
from plquant.transforms.reassembly_search import extra_candidates, search_extra

SEARCH_TOKENS = 2048
TOKENS_A_CHANNEL = 6  # fewer, and a closed-form fit of the weights learns them by heart


class Reassembly(Part):
    """Splits channels with outliers into copies of a fraction, and does without as many others.

    At every norm's output and before the last linear of the MLP; how many is searched for each place, and none is a
    candidate too. What is left at run time is to gather channels; a checkpoint with that needs plquant to run.

    Args:
        block: The block to calibrate.
        removal: What happens to the channels that make room: ``drop`` leaves them out; ``merge`` replaces a pair by its
            mean, as in the paper, with an addition at run time.
        compensate: Fit the weights, in closed form, to what they read after that: reassembled, quantized activations;
            where the text has at least six tokens a channel.
    """

    place = "reassembly"

    def __init__(self, block: QuantBlock, removal: Literal["drop", "merge"] = "drop", compensate: bool = True) -> None:
        super().__init__(block)
        self.removal, self.compensate = removal, compensate
        self.sites = [site for site in block.sites if torch.equal(site.channel, torch.arange(block.num_channels(site)))]
        self.transforms: list[ChannelReassembly] = []
        for site in self.sites:
            transform = ChannelReassembly(ReassemblyPlan.identity(block.num_channels(site)))
            block.transform_(site, transform)
            self.transforms.append(transform)

    def check(self, parts: Sequence[Part]) -> None:
        """With 16-bit activations, or after a matrix over all channels, there are no outliers to make room for."""
        if any(isinstance(part, Affine) and part.options["online"] is not None for part in parts):
            raise ValueError(
                "an online matrix spreads outliers over all channels, and reassembly would take some of these away; "
                "leave out one of the two, or set the matrix's online=null"
            )
        if any(linear.inputs is None for linear in self.block.linears.values()):
            raise ValueError(
                "channels are reassembled for the sake of quantized activations: with 16-bit ones copies carry the "
                "same error and removals only lose; set --model.activations.bits, or leave out the reassembly"
            )

    def start(self, fitting: Fitting) -> None:
        """Search the plan of each site, in the order they run, and fit its weights."""
        for site, transform in zip(self.sites, self.transforms, strict=True):
            name = site.consumers[0]
            abs_max = fitting.observe_quantized(ChannelAbsMax, name, final=False)
            hessian = fitting.observe_quantized(Hessian, name, final=False)
            plan = search_extra(
                len(abs_max),
                self._planner(site, abs_max, hessian),
                partial(self._error, fitting, site, transform),
            )
            self._apply(site, transform, plan)
            if self.compensate:
                self._fit_weights(fitting, site, transform, plan)

    def _planner(self, site: Site, abs_max: Tensor, hessian: Tensor) -> Callable[[int], ReassemblyPlan]:
        """Number of extra channels -> plan; one order of splits and of removals serves them all."""
        most = max(extra_candidates(len(abs_max)))
        splits = split_order(abs_max, most)
        weights = [self.block.linears[name].transformed().dense() for name in site.consumers]
        gram = torch.stack([weight.t().double() @ weight.double() for weight in weights]).sum(0)
        order = drop_order if self.removal == "drop" else merge_order
        removed = order(hessian, gram, most, splits.unique()).cpu()
        kind = f"{self.removal}s"
        return lambda extra: ReassemblyPlan.build(len(abs_max), splits[:extra], **{kind: removed[:extra]})

    def _apply(self, site: Site, transform: ChannelReassembly, plan: ReassemblyPlan) -> None:
        transform.set_plan_(plan)
        for linear in self._consumers(site):
            assert linear.inputs is not None
            linear.inputs.offset = None if plan.is_identity else plan.offset.to(linear.weight.device)

    def _error(self, fitting: Fitting, site: Site, transform: ChannelReassembly, plan: ReassemblyPlan) -> float:
        self._apply(site, transform, plan)
        return fitting.error(SEARCH_TOKENS)

    def _fit_weights(self, fitting: Fitting, site: Site, transform: ChannelReassembly, plan: ReassemblyPlan) -> None:
        """Make good what the plan and the rounding of activations changed in the consumers' outputs."""
        consumers = self._consumers(site)
        self._apply(site, transform, ReassemblyPlan.identity(plan.channels))
        before = [linear.transformed().dense() for linear in consumers]
        moments = fitting.observe_quantized(lambda _: SiteMoments(consumers[0], plan), site.consumers[0], final=False)
        self._apply(site, transform, plan)
        tokens, cross, second = moments
        if float(tokens.max()) < TOKENS_A_CHANNEL * plan.width:
            return
        for linear, weight in zip(consumers, before, strict=True):
            delta = compensate(weight, linear.transformed().dense(), cross, second)
            linear.corrections.append(FixedDelta(delta))

    def _consumers(self, site: Site) -> list[FakeQuantLinear]:
        return [self.block.linears[name] for name in site.consumers]


class SiteMoments(Metric):
    """Second moments of a site's channels and of what its consumers will read.

    Computes fp32 [3, K, K]: the number of tokens everywhere, the sums of x x'^T and of x' x'^T, x the channels as they
    come and x' reassembled and quantized; the plan keeps the width.

    Args:
        linear: One of the consumers, whose activation quantizer it uses.
        plan: The reassembly.
    """

    full_state_update = False
    tokens: Tensor
    cross: Tensor
    second: Tensor

    def __init__(self, linear: FakeQuantLinear, plan: ReassemblyPlan) -> None:
        super().__init__()
        assert linear.inputs is not None
        self.quantize = ActivationQuantizer(linear.inputs.bits, linear.inputs.symmetric, plan.offset)
        self.reassembly = ChannelReassembly(plan)
        self.add_state("tokens", torch.zeros(()), dist_reduce_fx="sum")
        for name in ("cross", "second"):
            self.add_state(name, torch.zeros(plan.channels, plan.width), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        """Take in channels as they come, [..., K]."""
        x = x.flatten(0, -2).float()
        read = self.quantize(self.reassembly.online(x * self.reassembly.coefficient.float()))
        self.cross.addmm_(x.t(), read)  # in place: autocast leaves it alone
        self.second.addmm_(read.t(), read)
        self.tokens += len(x)

    def compute(self) -> Tensor:
        """All three."""
        return torch.stack([self.tokens.expand_as(self.cross), self.cross, self.second])
