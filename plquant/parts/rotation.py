"""Random rotations: with nothing learned they spread a few outliers over all channels (QuaRot, arXiv 2404.00456)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from plquant.blocks.quant_block import QuantBlock
from plquant.blocks.stream import rotate_stream_
from plquant.parts.base import Part
from plquant.transforms.affine_matrix import AffineMatrix
from plquant.transforms.hadamard import orthogonal, split_width
from plquant.transforms.kronecker import KroneckerAffine
from plquant.transforms.online import KroneckerOp

Place = Literal["residual", "norms", "values", "queries", "linears"]


class Rotation(Part):
    """Fixed rotations, of Hadamard matrices where such are known for the width.

    Args:
        block: The block to calibrate.
        places: Where: ``norms``, what norms write (at run time, a Kronecker product); or ``residual``, the stream that
            they read, of the whole model (folded, free but for tied embeddings; not in Gemma); ``values``, each head
            between v and o (folded, free); ``queries``, queries and keys after RoPE, where attention quantizes them (at
            run time); ``linears``, what else linears read at a place for transforms, as the last one of an MLP (at run
            time).
        seed: Chooses them.
    """

    place = "rotation"

    def __init__(
        self,
        block: QuantBlock,
        places: Sequence[Place] = ("norms", "values", "queries", "linears"),
        seed: int = 0,
    ) -> None:
        super().__init__(block)
        if {"residual", "norms"} <= set(places):
            raise ValueError("Rotation's places have both residual and norms, which rotate the same channels: give one")
        self.seed, self.changes_model = seed, "residual" in places
        self.runs_later = not set(places) <= {"values"}  # residual does where embeddings are tied
        rotate = torch.Generator().manual_seed(seed)
        for site in block.sites:
            transform: AffineMatrix | KroneckerAffine
            if site.head_dim is not None and "values" in places:
                channels, rotation = block.num_channels(site), orthogonal(site.head_dim, rotate)[None]
                transform = AffineMatrix(channels, channels // site.head_dim, site.channel, rotation=rotation)
            elif site.head_dim is None and ("norms" if site.kind == "norm" else "linears") in places:
                transform = KroneckerAffine(len(site.channel), rotate=rotate)
            else:
                continue
            block.transform_(site, transform.requires_grad_(False))
        if block.quantizes_attention and "queries" in places:
            for attention in block.attentions:
                factors = (orthogonal(n, rotate) for n in split_width(attention.head_dim))
                block.rotate_heads_(attention, KroneckerOp.rotation(*factors))

    def prepare(self, lm: nn.Module, ids: Tensor) -> None:
        """Rotate the residual stream, if asked."""
        if self.changes_model:
            rotate_stream_(lm, ids, self.seed)
