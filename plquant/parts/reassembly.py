"""QLLM's channel disassembly and assembly (arXiv 2310.08041, section 3.2) as a part."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from plquant.blocks.quant_block import QuantBlock
from plquant.blocks.sites import Site
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.nn.fixed_delta import FixedDelta
from plquant.parts.affine import Affine
from plquant.parts.base import Fitting, Part
from plquant.parts.rotation import Rotation
from plquant.quant.observers import ChannelAbsMax, Hessian
from plquant.transforms.channel_removal import drop_order, drop_order_without_fit, merge_order
from plquant.transforms.compensation import compensate
from plquant.transforms.reassembly import ChannelReassembly
from plquant.transforms.reassembly_plan import ReassemblyPlan, split_order
from plquant.transforms.reassembly_search import extra_candidates, search_extra

SEARCH_TOKENS = 2048
TOKENS_A_CHANNEL = 6  # fewer, and a closed-form fit of the weights learns them by heart


class Reassembly(Part):
    """Splits channels with outliers into copies of a fraction, and does without as many others.

    Before the linears that read a norm's output, and before the last linear of the MLP; how many is searched for each
    place, and none is a candidate too. What is left at run time is to gather channels; a checkpoint with that needs
    plquant to run. The norm that a router of experts reads is left out: with channels dropped or merged it would send
    tokens to other experts. Before the last linear of each expert channels are reassembled all the same.

    Args:
        block: The block to calibrate.
        removal: What happens to the channels that make room: ``drop`` leaves them out; ``merge`` replaces a pair by its
            mean, as in the paper, with an addition at run time.
        compensate: Fit the weights, in closed form, to what they read after that: reassembled, quantized activations.
            Each candidate of the search is judged with it. Left out, with a note, where fewer than six tokens a
            channel are read.
    """

    place = "reassembly"
    runs_later = True
    bytes_a_channel = 16  # a place in the gather, two numbers for one that is merged, and an offset

    def __init__(self, block: QuantBlock, removal: Literal["drop", "merge"] = "drop", compensate: bool = True) -> None:
        super().__init__(block)
        self.removal, self.compensate = removal, compensate
        self.sites = [site for site in block.sites if self._admits(site)]
        self.transforms: list[ChannelReassembly] = []
        for site in self.sites:
            transform = ChannelReassembly(ReassemblyPlan.identity(block.num_channels(site)))
            block.transform_(site, transform)
            self.transforms.append(transform)

    def check(self, parts: Sequence[Part]) -> None:
        """With 16-bit activations, or after a matrix over all channels, there are no outliers to make room for."""
        if any(_mixes_at_run_time(part) for part in parts):
            raise ValueError(
                "a matrix or rotation that runs with the model spreads outliers over all channels, and reassembly, "
                "which folds into what comes before it, would take some of these away; leave out one of the two, or "
                "set Affine's online=null, or leave norms and linears out of Rotation's places"
            )
        if any(linear.inputs is None for linear in self.block.linears.values()):
            raise ValueError(
                "channels are reassembled for the sake of quantized activations: with 16-bit ones copies carry the "
                "same error and removals only lose; set --model.activations.bits, or leave out the reassembly"
            )

    def start(self, fitting: Fitting) -> None:
        """Search the plan of each site, in the order they run, and fit its weights."""
        for site, transform in zip(self.sites, self.transforms, strict=True):
            self._reassemble(fitting, site, transform)

    def _reassemble(self, fitting: Fitting, site: Site, transform: ChannelReassembly) -> None:
        """Every candidate is judged as it would be deployed: with weights fitted to it, if they are to be."""
        name, consumers = site.consumers[0], self._consumers(site)  # all of them read the same tokens
        seen = fitting.observe_quantized(_channel_statistics, name, final=False)
        abs_max, hessian = seen["abs_max"], seen["hessian"]
        fits = self.compensate and int(seen["tokens"]) >= TOKENS_A_CHANNEL * len(abs_max)
        if self.compensate and not fits:
            self._note_no_fit(site, len(abs_max))
        before = [linear.transformed().dense() for linear in consumers]
        deltas = [FixedDelta(torch.zeros_like(weight, dtype=torch.float32)) for weight in before] if fits else []
        for linear, delta in zip(consumers, deltas, strict=False):
            linear.corrections.append(delta)

        def deploy(plan: ReassemblyPlan) -> None:
            moments = self._moments(fitting, site, transform, plan) if fits else ()
            self._apply(site, transform, plan)
            for linear, weight, delta in zip(consumers, before, deltas, strict=False):
                delta.value.zero_()
                delta.value.copy_(compensate(weight, linear.transformed().dense(), *moments))

        def error(plan: ReassemblyPlan) -> float:
            deploy(plan)
            return fitting.error(SEARCH_TOKENS)

        gram = torch.stack([weight.t().double() @ weight.double() for weight in before]).sum(0)
        deploy(search_extra(len(abs_max), self._planner(abs_max, hessian, gram, fits), error))

    def _planner(self, abs_max: Tensor, hessian: Tensor, gram: Tensor, fits: bool) -> Callable[[int], ReassemblyPlan]:
        """Number of extra channels -> plan; one order of splits and of removals serves them all."""
        most = max(extra_candidates(len(abs_max)))
        splits = split_order(abs_max, most)
        order = merge_order if self.removal == "merge" else drop_order if fits else drop_order_without_fit
        removed = order(hessian, gram, most, splits.unique())
        kind = f"{self.removal}s"
        return lambda extra: ReassemblyPlan.build(len(abs_max), splits[:extra], **{kind: removed[:extra]})

    def _apply(self, site: Site, transform: ChannelReassembly, plan: ReassemblyPlan) -> None:
        transform.set_plan_(plan)
        for linear in self._consumers(site):
            assert linear.inputs is not None
            linear.inputs.offset = None if plan.is_identity else plan.offset.to(linear.weight.device)

    def _moments(self, fitting: Fitting, site: Site, transform: ChannelReassembly, plan: ReassemblyPlan) -> Tensor:
        """Both ``SiteMoments``, for the fit of the weights that make good what the plan and the rounding change."""
        self._apply(site, transform, ReassemblyPlan.identity(plan.channels))
        linear = self.block.linears[site.consumers[0]]
        return fitting.observe_quantized(lambda _: SiteMoments(linear, plan), site.consumers[0], final=False)

    def _note_no_fit(self, site: Site, channels: int) -> None:
        """The same words in every block, and for every expert."""
        names = (re.sub(r"\.\d+\.", ".*.", name.partition(".")[2]) for name in site.consumers)
        note = (
            f"compensation left out at {', '.join(names)}: read fewer than {TOKENS_A_CHANNEL * channels} tokens, "
            f"{TOKENS_A_CHANNEL} for each of {channels} channels"
        )
        if note not in self.notes:
            self.notes.append(note)

    def _admits(self, site: Site) -> bool:
        channels = self.block.num_channels(site)
        return (
            torch.equal(site.channel, torch.arange(channels, device=site.channel.device))
            and site.head_dim is None
            and not site.kept
            and not (site.kind == "norm" and any(self.block.in_expert(name) for name in site.consumers))
        )

    def _consumers(self, site: Site) -> list[FakeQuantLinear]:
        return [self.block.linears[name] for name in site.consumers]


def _mixes_at_run_time(part: Part) -> bool:
    """Whether a part leaves an operation over all channels where channels would be reassembled."""
    if isinstance(part, Affine):
        return part.options["online"] is not None
    return isinstance(part, Rotation) and not {"norms", "linears"}.isdisjoint(part.options["places"])


def _channel_statistics(channels: int) -> MetricCollection:
    """All that the plan of a site is made from, in one pass."""
    metrics: dict[str, Metric | MetricCollection] = {
        "abs_max": ChannelAbsMax(channels),
        "hessian": Hessian(channels),
        "tokens": TokenCount(),
    }
    return MetricCollection(metrics, compute_groups=False)


class TokenCount(Metric):
    """Number of tokens, int64."""

    full_state_update = False
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        """Take in activations [..., I]."""
        self.tokens += x[..., 0].numel()

    def compute(self) -> Tensor:
        """So far."""
        return self.tokens


class SiteMoments(Metric):
    """Second moments of a site's channels and of what its consumers will read.

    Computes fp32 [2, K, K]: the sums of x x'^T and of x' x'^T, x the channels as they come and x' reassembled and
    quantized; the plan keeps the width.

    Args:
        linear: One of the consumers, whose activation quantizer it uses.
        plan: The reassembly.
    """

    full_state_update = False
    cross: Tensor
    second: Tensor

    def __init__(self, linear: FakeQuantLinear, plan: ReassemblyPlan) -> None:
        super().__init__()
        assert linear.inputs is not None
        self.quantize = linear.inputs.folded()
        self.quantize.offset = plan.offset
        self.reassembly = ChannelReassembly(plan)
        for name in ("cross", "second"):
            self.add_state(name, torch.zeros(plan.channels, plan.width), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        """Take in channels as they come, [..., K]."""
        x = x.flatten(0, -2).float()
        read = self.quantize(self.reassembly.online(x * self.reassembly.coefficient.float()))
        self.cross.addmm_(x.t(), read)  # in place: autocast leaves it alone
        self.second.addmm_(read.t(), read)

    def compute(self) -> Tensor:
        """Both."""
        return torch.stack([self.cross, self.second])
