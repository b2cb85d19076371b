"""The LightningModule that calibrates one block; every method is one of these."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from plquant.blocks.activations import Activations
from plquant.blocks.quant_block import QuantBlock
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.quant.affine import QTensor


def token_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ||output - target||^2 / ||target||^2; a scalar in fp32.

    Each token counts alike. In a plain mean squared error the few tokens with massive activations (SmolLM2's first
    token is 25,000 where the others are 10) outweigh all others together.

    Args:
        output: [..., T, H].
        target: [..., T, H].
    """
    target = target.float()
    squares = (output.float() - target).square().mean(-1)
    return (squares / target.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)).mean()


Schedule = Literal["cosine", "constant"]


@dataclass(frozen=True)
class RunProgress:
    """The run that a block is part of.

    Attributes:
        first: First block of this run, after those found finished.
        total: Number of blocks.
        seed: The run's seed.
        started: When the first block began, seconds of the monotonic clock.
    """

    first: int
    total: int
    seed: int = 0
    started: float = field(default_factory=time.monotonic)

    def seconds_left(self, block: int, share: float) -> float | None:
        """Estimate when ``share`` of a block is done; ``None`` before anything is."""
        done = block - self.first + share
        return (time.monotonic() - self.started) / done * (self.total - self.first - done) if done > 0 else None


class BlockModule(L.LightningModule):
    """Fits one block to its full-precision outputs.

    A method puts its parts into the block (clipping, transforms) in ``__init__`` and names their learning rates in
    ``learnables``; parts that start from statistics are set in ``configure_model``, where the data is at hand. One
    that needs more overrides a Lightning hook. This base learns nothing and rounds to nearest.

    Args:
        block: The block to calibrate.
    """

    wants_augmented_target = False
    schedule: Schedule = "cosine"  # of the learning rates; cosine falls to zero over the run of the block

    def __init__(self, block: QuantBlock) -> None:
        super().__init__()
        self.block = block
        self.error_before = 1.0  # of rounding to nearest; the loop measures it, losses are in units of it
        self.activations: Activations  # what it is fitted to; the loop sets it
        self.progress: RunProgress | None = None
        self._epoch_loss = MeanMetric(nan_strategy="disable")  # a NaN is no good epoch
        self._best_loss = float("inf")
        self._best_state: list[Tensor] = []

    def learnables(self) -> dict[float, list[nn.Parameter]]:
        """Learning rate -> parameters; empty for a method with nothing to learn."""
        return {}

    def round_weight(self, linear: FakeQuantLinear) -> QTensor:
        """Codes of a linear once its parts are fitted; to nearest."""
        return linear.quantize()

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, H] -> [B, T, H], quantized."""
        return self.block(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Error against the target(s), relative to rounding to nearest: a loss of 1 is no better than that."""
        x, *targets = batch
        output = self(x)
        loss = torch.stack([token_error(output, target) for target in targets]).sum() / self.error_before
        self._epoch_loss.update(loss.detach(), len(x))
        self.log("loss", self._epoch_loss, prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the error of a batch."""
        x, target, *_ = batch
        self.log("error", token_error(self(x), target), batch_size=len(x))

    def configure_optimizers(self) -> Any:
        """AdamW without decay, one group per learning rate, and the schedule of the rates."""
        groups = [{"params": parameters, "lr": lr} for lr, parameters in self.learnables().items() if parameters]
        if not groups:
            return None
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        if self.schedule == "constant":
            return optimizer
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Where it starts from, should no epoch be any good (a NaN is not)."""
        self._best_state = [parameter.detach().clone() for parameter in self._trained()]

    def on_train_epoch_end(self) -> None:
        """Remember the parameters if this was the best epoch so far."""
        self.log("block", float(self.block.index))
        loss = float(self._epoch_loss.compute())
        if loss < self._best_loss:
            self._best_loss = loss
            self._best_state = [parameter.detach().clone() for parameter in self._trained()]

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Go back to the best epoch."""
        for parameter, best in zip(self._trained(), self._best_state, strict=True):
            parameter.copy_(best)

    def fold(self) -> None:
        """Make the fitted parts permanent: the block's linears become packed integers."""
        self.block.pack_(self.round_weight)

    @torch.no_grad()
    def observe(self, make: Callable[[int], Metric]) -> dict[str, Tensor]:
        """Statistics of every linear's input, over all samples, in full precision.

        Args:
            make: Width of the input -> a metric, updated with inputs [B, T, I].

        Returns:
            Name of the linear -> the metric's value.
        """
        device = next(self.block.parameters()).device
        metrics = {name: make(linear.in_features).to(device) for name, linear in self.block.linears.items()}
        hooks = [
            self.block.linears[name].register_forward_pre_hook(lambda _, args, metric=metric: metric.update(args[0]))
            for name, metric in metrics.items()
        ]
        with self.block.full_precision():
            for x, *_ in self.activations.in_order():
                self.block(x.to(device))
        for hook in hooks:
            hook.remove()
        return {name: metric.compute() for name, metric in metrics.items()}

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameters in self.learnables().values() for parameter in parameters]


Method: TypeAlias = Callable[[QuantBlock], BlockModule]
