"""OmniQuant (arXiv 2308.13137): learnable weight clipping and a learnable equivalent transformation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plquant.block_module import BlockModule, Schedule
from plquant.blocks.discovery import Site
from plquant.blocks.quant_block import QuantBlock
from plquant.quant.clipping import LearnedClipping
from plquant.quant.observers import ChannelAbsMax
from plquant.transforms.scale_shift import ScaleShift


class OmniQuant(BlockModule):
    """Learns how much of each group's range to keep, and how to share the difficulty between neighbouring layers.

    Args:
        block: The block to calibrate.
        lwc: Learn weight clipping (LWC): two numbers per group.
        let: Learn an equivalent transformation (LET) wherever the block admits one: a scale per channel, and a shift
            where biases can take it up. It is folded into the weights and costs nothing at run time.
        lwc_lr: Learning rate of the clipping strengths (logits).
        let_lr: Learning rate of the transformation (logarithms of scales).
        schedule: ``cosine`` lets both rates fall to zero, ``constant`` keeps them, as the paper does with rates of
            1e-2 and 5e-3. A step sees few tokens: at a high constant rate what is learned keeps trembling, at a low
            one it does not get far enough.
        alpha: The transformation starts at max|x|^alpha / max|w|^(1 - alpha) per channel, as in SmoothQuant; ``null``
            starts at the identity.
        aug_loss: Also fit to what the full-precision block makes of the quantized input. One more activation stream.
    """

    def __init__(
        self,
        block: QuantBlock,
        lwc: bool = True,
        let: bool = True,
        lwc_lr: float = 1e-1,
        let_lr: float = 5e-3,
        schedule: Schedule = "cosine",
        alpha: float | None = 0.5,
        aug_loss: bool = False,
    ) -> None:
        super().__init__(block)
        if not (lwc or let):
            raise ValueError("--model.method.lwc=false with --model.method.let=false leaves nothing to learn; use RTN")
        self.save_hyperparameters(ignore=["block"])
        self.wants_augmented_target = aug_loss
        self.schedule = schedule
        self.clips: list[LearnedClipping] = []
        self.transforms: list[ScaleShift] = []
        if lwc:
            for linear in block.linears.values():
                linear.clip = LearnedClipping(linear.weight.shape, linear.grid)
                self.clips.append(linear.clip)
        if let:
            for site in block.sites:
                transform = ScaleShift(block.num_channels(site), shift=site.admits_shift)
                block.transform_(site, transform)
                self.transforms.append(transform)

    def configure_model(self) -> None:
        """Start the transforms from the activations."""
        if self.transforms and self.hparams["alpha"] is not None:
            abs_max = self.observe(ChannelAbsMax)
            for site, transform in zip(self.block.sites, self.transforms, strict=True):
                log_scale = self._initial_log_scale(site, abs_max, self.hparams["alpha"])
                transform.log_scale.data.copy_(log_scale)

    def learnables(self) -> dict[float, list[nn.Parameter]]:
        """Clipping strengths and transforms."""
        groups: dict[float, list[nn.Parameter]] = {}
        for lr, parts in ((self.hparams["lwc_lr"], self.clips), (self.hparams["let_lr"], self.transforms)):
            groups.setdefault(lr, []).extend(p for part in parts for p in part.parameters())
        return {lr: parameters for lr, parameters in groups.items() if parameters}

    def _initial_log_scale(self, site: Site, abs_max: dict[str, Tensor], alpha: float) -> Tensor:
        """SmoothQuant's scale per source channel, its maxima taken over all consumers; geometric mean 1."""
        weights = [self.block.linears[name].weight.abs().amax(0).float() for name in site.consumers]
        w = torch.stack(weights).amax(0).clamp(min=1e-5)
        x = abs_max[site.consumers[0]].clamp(min=1e-5)
        log_scale = alpha * x.log() - (1 - alpha) * w.log()
        channel = site.channel.to(log_scale.device)
        per_source = log_scale.new_full((self.block.num_channels(site),), -torch.inf)
        per_source.scatter_reduce_(0, channel, log_scale, "amax")
        return (per_source - per_source.mean()).clamp(-4.6, 4.6)  # within a factor of 100
