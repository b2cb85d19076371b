"""LET, the learnable equivalent transformation (OmniQuant, arXiv 2308.13137, section 3.3), as a part."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from plquant.blocks.quant_block import QuantBlock
from plquant.blocks.sites import Site
from plquant.parts.base import Fitting, Part
from plquant.quant.observers import ChannelAbsMax
from plquant.transforms.rotary_pairs import RotaryPairs
from plquant.transforms.scale_shift import ScaleShift

ALPHAS = (0.0, 0.15, 0.3, 0.5, 0.65, 0.8)  # tried by a search
SEARCH_TOKENS = 2048


class LET(Part):
    """Learns a scale per channel, and a shift where biases can take it up, at every place where it folds for free.

    Between queries and keys, where attention quantizes them, it is one scale for the two channels that RoPE turns
    together. A scale that nothing would see is left out.

    Args:
        block: The block to calibrate.
        lr: Learning rate of the logarithms of the scales, and of the shifts.
        alpha: The scales start at max|x|^alpha / max|w|^(1 - alpha) per channel, as in SmoothQuant; ``search`` tries
            several and keeps the one with the least error of the block; ``null`` starts at the identity. Those between
            queries and keys start at the identity.
        shift: Learn shifts where they fold.
    """

    place = "scale and shift"

    def __init__(
        self,
        block: QuantBlock,
        lr: float = 5e-3,
        alpha: float | Literal["search"] | None = 0.5,
        shift: bool = True,
    ) -> None:
        super().__init__(block)
        self.lr, self.alpha = lr, alpha
        self.sites = [site for site in block.sites if not self._is_redundant(site)]
        self.transforms: list[ScaleShift] = []
        for site in self.sites:
            transform = ScaleShift(block.num_channels(site), site.channel, shift=shift and site.admits_shift)
            block.transform_(site, transform)
            self.transforms.append(transform)
        self.pairs: list[RotaryPairs] = []
        for query_site in block.query_sites if block.quantizes_attention else ():
            pairs = RotaryPairs(
                query_site.heads,
                query_site.kv_heads,
                query_site.head_dim,
                query_site.pairs,
                query_site.free,
                query_site.kind,
                rotate=False,
            )
            block.transform_queries_(query_site, pairs)
            self.pairs.append(pairs)

    def learnables(self) -> dict[float, list[nn.Parameter]]:
        """Scales and shifts."""
        return {self.lr: [p for transform in (*self.transforms, *self.pairs) for p in transform.parameters()]}

    def start(self, fitting: Fitting) -> None:
        """Start the scales from the activations."""
        if not self.transforms or self.alpha is None:
            return
        abs_max = fitting.observe(ChannelAbsMax)
        if self.alpha != "search":
            self._set(abs_max, self.alpha)
            return
        errors = {}
        for alpha in ALPHAS:
            self._set(abs_max, alpha)
            errors[alpha] = fitting.error(SEARCH_TOKENS)
        self._set(abs_max, min(ALPHAS, key=lambda alpha: errors[alpha]))

    @torch.no_grad()
    def _set(self, abs_max: dict[str, Tensor], alpha: float) -> None:
        for site, transform in zip(self.sites, self.transforms, strict=True):
            transform.log_scale.copy_(self._initial_log_scale(site, abs_max, alpha))

    def _is_redundant(self, site: Site) -> bool:
        """Nothing sees the scale: groups of one input channel do not (nor does a norm, nor a row's own scale)."""
        consumers = [self.block.linears[name] for name in site.consumers]
        source_sees = site.kind == "linear" and self.block.linears[site.source].grid.axis == "out"
        return not source_sees and all(linear.grid.axis == "out" and linear.inputs is None for linear in consumers)

    def _initial_log_scale(self, site: Site, abs_max: dict[str, Tensor], alpha: float) -> Tensor:
        """SmoothQuant's scale per source channel, its maxima taken over all consumers; geometric mean 1."""
        weights = [self.block.linears[name].weight.abs().amax(0).float() for name in site.consumers]
        w = torch.stack(weights).amax(0).clamp(min=1e-5)
        x = torch.stack([abs_max[name] for name in site.consumers]).amax(0).clamp(min=1e-5)
        log_scale = alpha * x.log() - (1 - alpha) * w.log()
        channel = site.channel.to(log_scale.device)
        per_source = log_scale.new_full((self.block.num_channels(site),), -torch.inf)
        per_source.scatter_reduce_(0, channel, log_scale, "amax")
        return (per_source - per_source.mean()).clamp(-4.6, 4.6)  # within a factor of 100
