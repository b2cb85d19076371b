"""AffineQuant's matrices (arXiv 2403.12544) as a part."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from plquant.blocks.quant_block import QuantBlock
from plquant.blocks.sites import QuerySite
from plquant.parts.base import Part, check_rate
from plquant.transforms.affine_matrix import AffineMatrix
from plquant.transforms.gradual_mask import share_of_run
from plquant.transforms.hadamard import orthogonal
from plquant.transforms.kronecker import KroneckerAffine
from plquant.transforms.late_start import correct_again, reset_state_
from plquant.transforms.query_key import QueryKeySide
from plquant.transforms.query_key_matrix import QueryKeyMatrix
from plquant.transforms.rotary_pairs import RotaryPairs


class Affine(Part):
    """Learns matrices where LET learns scales: one per head between v and o, where it folds for free.

    Between queries and keys, where attention quantizes them, it is a matrix per head too, or under RoPE what RoPE
    admits: one complex number for the two channels that it turns together.

    A matrix is opened band by band over the epochs, from its diagonal to the whole; it is strictly diagonally dominant
    at every step, hence invertible.

    Args:
        block: The block to calibrate.
        lr: Learning rate of the matrices (off-diagonals in units of their row's diagonal).
        stability: Constant factor on the off-diagonals, the paper's alpha: their rate is so much smaller.
        online: Matrices that do not fold: they are computed at run time, stored in the model's dtype and counted in the
            effective bits. ``dense`` puts one over all channels after each norm, as in the paper's weight-only results;
            ``kronecker`` one of two small factors there and before the last linear of the MLP; ``null`` leaves them
            out.
        start: ``identity``, or ``rotation``: random orthogonal matrices, which spread outliers over all channels before
            anything is learned.
        seed: Chooses the rotations.
    """

    place = "affine matrix"

    def __init__(
        self,
        block: QuantBlock,
        lr: float = 5e-3,
        stability: float = 1.0,
        online: Literal["kronecker", "dense"] | None = None,
        start: Literal["identity", "rotation"] = "identity",
        seed: int = 0,
    ) -> None:
        super().__init__(block)
        check_rate("Affine", "let_lr", lr, 5e-3)
        if not 0 < stability < math.inf:
            raise ValueError(
                f"Affine's stability={stability} (--model.method.stability) is not a factor on the off-diagonals that "
                "lets them move; choose more than 0, up to the paper's 1"
            )
        self.lr, self.runs_later = lr, online is not None
        rotate = torch.Generator().manual_seed(seed) if start == "rotation" else None
        self.transforms: list[AffineMatrix | KroneckerAffine | QueryKeyMatrix] = []
        self.pairs: list[RotaryPairs] = []
        for site in block.sites:
            transform: AffineMatrix | KroneckerAffine
            channels = block.num_channels(site)
            if site.head_dim is not None:
                rotation = None if rotate is None else orthogonal(site.head_dim, rotate)[None]
                heads = channels // site.head_dim
                transform = AffineMatrix(channels, heads, site.channel, stability, rotation=rotation)
            elif online == "kronecker":
                transform = KroneckerAffine(len(site.channel), stability, rotate)
            elif online == "dense" and site.kind == "norm":
                rotation = None if rotate is None else orthogonal(len(site.channel), rotate)[None]
                transform = AffineMatrix(len(site.channel), stability=stability, online=True, rotation=rotation)
            else:
                continue
            # By LET; behind a rotation other channels are scaled.
            is_scaled = bool(block.linears[site.consumers[0]].reads) and rotate is None
            if is_scaled or not block.sees_scale(site, folds=not transform.is_online):
                for name, parameter in transform.named_parameters():
                    parameter.requires_grad_(not name.endswith("log_scale"))
            block.transform_(site, transform)
            self.transforms.append(transform)
        for query_site in block.query_sites if block.quantizes_attention else ():
            self._between_queries_and_keys(query_site, stability)

    def learnables(self) -> dict[float, list[nn.Parameter]]:
        """The matrices."""
        transforms = (*self.transforms, *self.pairs)
        return {self.lr: [p for transform in transforms for p in transform.parameters() if p.requires_grad]}

    def _between_queries_and_keys(self, site: QuerySite, stability: float) -> None:
        """What RoPE leaves alone, one complex number per pair; without it a matrix per key head, as in the paper."""
        if site.kind == "norm":
            return  # a norm takes up scales, and those are LET's
        shape = site.heads, site.kv_heads, site.head_dim
        transform: QueryKeyMatrix | RotaryPairs
        if len(site.pairs):
            transform = RotaryPairs(*shape, site.pairs, site.free)
            self.pairs.append(transform)
        else:
            transform = QueryKeyMatrix(*shape, stability)
            self.transforms.append(transform)
        is_scaled = any(isinstance(t, QueryKeySide) for t in self.block.linears[site.query].writes)
        transform.log_scale.requires_grad_(not is_scaled)
        self.block.transform_queries_(site, transform)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Entries that open late start with moments of their own, which are Adam's."""
        adam = isinstance(optimizer, torch.optim.Adam)
        odd = [key for key in ("amsgrad", "maximize") if adam and optimizer.defaults[key]]
        if odd or not adam:
            name = type(optimizer).__name__ + (f" with {' and '.join(odd)}" if odd else "")
            raise ValueError(
                f"--model.optimizer={name} does not go with Affine, which opens its matrices band by band, each with "
                "fresh moments of Adam: choose AdamW or Adam of torch.optim, or a method without Affine"
            )

    def advance(self, epoch: int, epochs: int, optimizer: torch.optim.Optimizer) -> None:
        """Open the bands of this epoch; what is opened starts with fresh moments."""
        for transform in self.transforms:
            for parameter, opened in transform.progress_(share_of_run(epoch, epochs)):
                reset_state_(optimizer, parameter, opened)

    def resume(self, epoch: int, epochs: int, optimizer: torch.optim.Optimizer) -> None:
        """Open the same bands again; their moments are there."""
        for transform in self.transforms:
            transform.progress_(share_of_run(epoch, epochs))
        correct_again(optimizer)

    def figures(self) -> dict[str, float]:
        """The largest condition number of its matrices."""
        found = [float(transform.condition_number()) for transform in self.transforms]
        return {"condition number": max(found)} if found else {}
