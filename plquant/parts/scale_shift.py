"""LET, the learnable equivalent transformation (OmniQuant, arXiv 2308.13137, section 3.3), as a part."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from plquant.blocks.quant_block import QuantBlock
from plquant.blocks.sites import Site
from plquant.parts.base import Fitting, Part, check_rate
from plquant.quant.observers import ChannelRange
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
            several and keeps the one with the least error of the block; ``null`` starts at the identity, without shift.
            Those between queries and keys start at the identity.
        shift: Learn shifts where they fold, from the middle of each channel's range on.
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
        check_rate("LET", "let_lr", lr, 5e-3)
        if isinstance(alpha, int | float) and not 0 <= alpha <= 1:
            raise ValueError(
                f"LET's alpha={alpha} (--model.method.alpha) is not a share of the difficulty that goes to the "
                'weights; choose one from 0 to 1, "search" or null'
            )
        self.lr, self.alpha = lr, alpha
        self.sites = [site for site in block.sites if block.sees_scale(site)]
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
        """Start the shifts and scales from the activations in full precision."""
        if not self.transforms or self.alpha is None:
            return
        ranges = fitting.observe(ChannelRange)
        abs_max = [
            self._start_shift(site, transform, ranges)
            for site, transform in zip(self.sites, self.transforms, strict=True)
        ]
        if self.alpha != "search":
            self._set(abs_max, self.alpha)
            return
        errors = {}
        for alpha in ALPHAS:
            self._set(abs_max, alpha)
            errors[alpha] = fitting.error(SEARCH_TOKENS)
        self._set(abs_max, min(ALPHAS, key=lambda alpha: errors[alpha]))

    @torch.no_grad()
    def _start_shift(self, site: Site, transform: ScaleShift, ranges: dict[str, Tensor]) -> Tensor:
        """Set the shift, if one is learned; returns max|x| of each input channel after it, [I]."""
        low, high = torch.stack([ranges[name] for name in site.consumers]).unbind(1)
        low, high = low.amin(0), high.amax(0)
        seen = low <= high  # experts may have no token
        low, high = low.where(seen, 0), high.where(seen, 0)
        if transform.shift is not None:
            shift = (self._per_source(site, high, "amax") + self._per_source(site, low, "amin")) / 2
            transform.shift.copy_(shift)
            low, high = (end - shift[site.channel.to(end.device)] for end in (low, high))
        return torch.maximum(high, -low)

    @torch.no_grad()
    def _set(self, abs_max: list[Tensor], alpha: float) -> None:
        for site, transform, x in zip(self.sites, self.transforms, abs_max, strict=True):
            transform.log_scale.copy_(self._initial_log_scale(site, x, alpha))

    def _initial_log_scale(self, site: Site, abs_max: Tensor, alpha: float) -> Tensor:
        """SmoothQuant's scale per source channel, its maxima taken over all consumers; geometric mean 1."""
        weights = [self.block.linears[name].weight.abs().amax(0).float() for name in site.consumers]
        w = torch.stack(weights).amax(0).clamp(min=1e-5)
        log_scale = alpha * abs_max.clamp(min=1e-5).log() - (1 - alpha) * w.log()
        per_source = self._per_source(site, log_scale, "amax")
        return (per_source - per_source.mean()).clamp(-4.6, 4.6)  # within a factor of 100

    def _per_source(self, site: Site, values: Tensor, reduce: Literal["amax", "amin"]) -> Tensor:
        """Of what is known of each input channel, [I], the extreme over those that read one source channel, [C]."""
        out = values.new_zeros(self.block.num_channels(site))
        return out.scatter_reduce_(0, site.channel.to(values.device), values, reduce, include_self=False)
