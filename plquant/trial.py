"""A block of random weights, calibrated for a moment: the time and memory that a run will take, measured before it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from plquant.blocks.activations import TOKENS_AT_ONCE
from plquant.blocks.capture import capture_inputs
from plquant.blocks.prepare import prepare_blocks
from plquant.blocks.quant_block import QuantBlock
from plquant.nn.cost import Cost
from plquant.parts.base import Part
from plquant.quant.grid import ActivationGrid, IntGrid
from plquant.report import gpu_bytes, peak_bytes

STEPS = 3  # at least


@dataclass(frozen=True)
class Trial:
    """What was measured.

    Attributes:
        seconds: Of what does not depend on the samples: starting, folding, packing.
        sample_seconds: Of all forward passes without gradients, for each sample.
        passes: How many these are, about.
        step_seconds: Of a step; 0 where nothing is learned.
        weights: Numbers in the block's linears.
        held_bytes: Parameters of the block and of what is outside of the blocks.
        stream_bytes: Of the streams.
        peak_bytes: Greatest memory of the process.
        gpu_bytes: Greatest memory of its GPU; 0 without one.
        cost: Of the block as the method packed it.
        outside: Bits and multiply-adds of the run-time operations outside of blocks.
    """

    seconds: float
    sample_seconds: float
    passes: float
    step_seconds: float
    weights: int
    held_bytes: int
    stream_bytes: int
    peak_bytes: int
    gpu_bytes: int
    cost: Cost
    outside: tuple[int, int]

    def block_seconds(self, samples: int, steps: int, weights: float) -> float:
        """Of a block with so many weights, on so many samples and with so many steps."""
        return (self.seconds + samples * self.sample_seconds + steps * self.step_seconds) * weights / self.weights

    def pass_seconds(self, samples: int, weights: float) -> float:
        """Of a block that only runs, once for each sample."""
        return samples * self.sample_seconds / self.passes * weights / self.weights


def try_block(
    lm: nn.Module,
    grid: IntGrid,
    activations: ActivationGrid | None,
    samples: int,
    seq_len: int,
    batch_size: int,
    parts: Sequence[Part],
    calibrate: Callable[[QuantBlock, Tensor, Tensor, L.Callback], Any],
) -> Trial:
    """Calibrate the blocks of a small model, all together, on a few samples.

    Args:
        lm: The model, with as many blocks as are fitted together.
        grid: Grid of its weights, settled.
        activations: Of its activations, or ``None``.
        samples: Of the run; no more are used.
        seq_len: Their length.
        batch_size: Samples of a step.
        parts: Of the method, on no block of the model: they prepare it.
        calibrate: Calibrates a block for one epoch, given both streams and a callback for the fit.
    """
    samples = min(samples, max(STEPS * batch_size, -(-TOKENS_AT_ONCE // seq_len)))
    vocabulary = lm.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.randint(vocabulary, (samples, seq_len), generator=torch.Generator().manual_seed(0))
    held = sum(parameter.nbytes for parameter in lm.parameters())
    layers = sum(1 for _ in lm.named_modules())
    for part in parts:
        part.prepare(lm, ids)
    (block,) = prepare_blocks(lm, grid, ids, activations, blocks_per_fit=layers)
    x = capture_inputs(lm, list(block.layers.values()), ids)
    weights = sum(linear.weight.numel() for linear in block.linears.values())
    block.map_(x[:1].clone(), 1)  # what is compiled at first use is compiled now
    passes, steps, packed = _Passes(block), _Steps(), _Packed(block)
    began = time.perf_counter()
    calibrate(block, x, x.clone(), steps)
    seconds = time.perf_counter() - began - passes.seconds - sum(steps.seconds)
    step = statistics.median(steps.seconds) if steps.seconds else 0.0
    whole, inside = Cost.of(lm), Cost.of(block)
    outside = whole.online_bits - inside.online_bits, whole.online_macs - inside.online_macs
    cost = packed.cost or inside
    return Trial(
        seconds=seconds,
        sample_seconds=passes.seconds / samples,
        passes=passes.sequences / samples,
        step_seconds=step,
        weights=weights,
        held_bytes=held,
        stream_bytes=2 * x.nbytes,
        peak_bytes=peak_bytes(),
        gpu_bytes=gpu_bytes(),
        cost=cost,
        outside=outside,
    )


class _Passes:
    """Seconds that a block spends in forward passes without gradients, also in those that are not finished."""

    def __init__(self, block: QuantBlock) -> None:
        self.seconds, self.sequences, forward = 0.0, 0, block.forward

        def timed(x: Tensor) -> Tensor:
            began = time.perf_counter()
            try:
                return forward(x)
            finally:
                if not torch.is_grad_enabled():
                    self.seconds += time.perf_counter() - began
                    self.sequences += len(x)

        block.forward = timed  # type: ignore[method-assign]


class _Packed:
    """What the method made of the block costs, where that is given up for rounding to nearest; random weights may."""

    def __init__(self, block: QuantBlock) -> None:
        self.cost: Cost | None = None
        restore = block.restore_

        def noted(kept: nn.ModuleDict) -> None:
            self.cost = Cost.of(block)
            restore(kept)

        block.restore_ = noted  # type: ignore[method-assign]


class _Steps(L.Callback):
    """Seconds of every step of a fit."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def __deepcopy__(self, memo: dict[int, Any]) -> _Steps:
        """Itself: a trainer copies its callbacks for every block, and this one is read afterwards."""
        return self

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """End."""
        self.seconds.append(time.perf_counter() - self._began)
