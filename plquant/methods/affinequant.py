"""AffineQuant (arXiv 2403.12544): LET with matrices in the place of scales, and learnable weight clipping."""

from __future__ import annotations

from typing import Literal

from plquant.block_module import BlockModule, Schedule
from plquant.blocks.quant_block import QuantBlock
from plquant.parts.affine import Affine
from plquant.parts.clipping import LWC
from plquant.parts.scale_shift import LET


class AffineQuant(BlockModule):
    """Learns weight clipping, scales where only scales fold, and a matrix per head where one does.

    Args:
        block: The block to calibrate.
        lwc_lr: Learning rate of the clipping strengths (logits).
        let_lr: Learning rate of the scales and matrices.
        stability: Constant factor on the off-diagonals, the paper's alpha.
        online: Matrices after the norms too, computed at run time and counted in the effective bits: ``dense``, as in
            the paper's weight-only results, or ``kronecker``, two small factors, before the last linear of the MLP as
            well.
        alpha: The scales start at max|x|^alpha / max|w|^(1 - alpha) per channel; ``search`` tries several.
        schedule: Of the learning rates: ``cosine`` lets them fall to zero, ``constant``, as in the paper, keeps them.
        aug_loss: Also fit to what the full-precision block makes of the quantized input. One more activation stream.
    """

    def __init__(
        self,
        block: QuantBlock,
        lwc_lr: float = 1e-1,
        let_lr: float = 5e-3,
        stability: float = 1.0,
        online: Literal["kronecker", "dense"] | None = None,
        alpha: float | Literal["search"] | None = 0.5,
        schedule: Schedule = "cosine",
        aug_loss: bool = False,
    ) -> None:
        parts = [LET(block, let_lr, alpha), Affine(block, let_lr, stability, online), LWC(block, lwc_lr)]
        super().__init__(block, parts, schedule, aug_loss)
        self.save_hyperparameters(ignore=["block"])
