"""QLLM (arXiv 2310.08041): channel reassembly and low-rank error correction."""

from __future__ import annotations

from typing import Literal

from plquant.block_module import BlockModule, Schedule
from plquant.blocks.quant_block import QuantBlock
from plquant.parts.low_rank import LowRank
from plquant.parts.reassembly import Reassembly


class QLLM(BlockModule):
    """Splits channels with outliers and does without others, then learns a low-rank correction of every weight.

    For quantized activations. The paper fits four blocks at a time: ``--model.blocks_per_fit 4``.

    Args:
        block: The block to calibrate.
        removal: What happens to the channels that make room: ``drop``, or ``merge`` as in the paper.
        compensate: Fit the weights, in closed form, to the reassembled, quantized activations before anything is
            learned; left out, with a note, where fewer than six tokens a channel are read.
        rank: Of the correction.
        lr: Learning rate.
        norms: Learn the weights of the norms too.
        schedule: Of the learning rate: ``linear`` or ``cosine`` lets it fall to zero, ``constant`` keeps it.
    """

    def __init__(
        self,
        block: QuantBlock,
        removal: Literal["drop", "merge"] = "drop",
        compensate: bool = True,
        rank: int = 4,
        lr: float = 5e-4,
        norms: bool = True,
        schedule: Schedule = "linear",
    ) -> None:
        super().__init__(block, [Reassembly(block, removal, compensate), LowRank(block, rank, lr, norms)], schedule)
        self.save_hyperparameters(ignore=["block"])
