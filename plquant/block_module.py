"""The LightningModule that calibrates one block; every method is one of these."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection

from plquant.bfloat16 import quick_products
from plquant.blocks.activations import Activations
from plquant.blocks.capture import StopForward
from plquant.blocks.equivalence import equivalence_error
from plquant.blocks.errors import token_error
from plquant.blocks.quant_block import QuantBlock
from plquant.blocks.token_weights import token_weights, weighing
from plquant.distributed import AnyMetric, of_this_process
from plquant.parts.axis import AxisChoice
from plquant.parts.base import Part, Rounding, check_order
from plquant.quant.observers import ChannelAbsMax, Hessian

HESSIANS_AT_ONCE = 2**30  # bytes of them that one pass over the samples gathers


Schedule = Literal["cosine", "linear", "constant"]


def adamw(groups: Any) -> torch.optim.Optimizer:
    """What fits unless told otherwise: AdamW without decay."""
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


@dataclass(frozen=True)
class RunProgress:
    """The run that a block is part of.

    Attributes:
        first: First block of this run, after those found finished.
        total: Number of blocks.
        seed: The run's seed.
        checkpoint: File for the block being fitted, or ``None`` for none.
        recipe_sha256: Of all that decides the result.
        started: When the first block began, seconds of the monotonic clock.
    """

    first: int
    total: int
    seed: int = 0
    checkpoint: Path | None = None
    recipe_sha256: str = ""
    started: float = field(default_factory=time.monotonic)

    def seconds_left(self, block: int, share: float) -> float | None:
        """Estimate when ``share`` of a block is done; ``None`` before anything is."""
        done = block - self.first + share
        return (time.monotonic() - self.started) / done * (self.total - self.first - done) if done > 0 else None


class BlockModule(L.LightningModule):
    """Fits one block to its full-precision outputs.

    A method is a list of parts (clipping, transforms, rounding; see ``plquant.parts``), each of which puts what it
    needs into the block, says what it learns and starts from the data. One that needs more overrides a Lightning hook.
    With no parts this learns nothing and rounds to nearest.

    Args:
        block: The block to calibrate.
        parts: What is done to it, in the legal order.
        schedule: Of the learning rates: ``cosine`` and ``linear`` fall to zero over the fit of the block, ``constant``
            does not.
        aug_loss: Fit also to what the full-precision block makes of the quantized input.
    """

    def __init__(
        self, block: QuantBlock, parts: Sequence[Part] = (), schedule: Schedule = "cosine", aug_loss: bool = False
    ) -> None:
        super().__init__()
        check_order(parts)
        self.block, self.parts, self.schedule, self.aug_loss = block, list(parts), schedule, aug_loss
        self.make_optimizer: OptimizerCallable = adamw
        self.error_before = 1.0  # of rounding to nearest; the loop measures it, losses are in units of it
        self.activations: Activations  # what it is fitted to; the loop sets it
        self.progress: RunProgress | None = None
        self.equivalence: float | None = None  # error of the transforms alone, when they are fitted
        self.figures: dict[str, float] = {}  # of the parts, as they are at the end of the fit
        self.unseen: list[str] = []  # linears of experts that no token was sent to
        self._token_weights: dict[str, Tensor] | None = None
        self._started = False
        self.strict_loading = False  # a checkpoint has what is learned, not the block
        self._epoch_loss = MeanMetric(nan_strategy="disable")  # a NaN is no good epoch
        self._best_loss = float("inf")
        self._best_state: list[Tensor] = []
        self._resumed: dict[str, Any] | None = None

    @property
    def title(self) -> str:
        """Name of the method, for people."""
        return type(self).__name__

    def learnables(self) -> dict[float, list[nn.Parameter]]:
        """Learning rate -> parameters; empty for a method with nothing to learn."""
        groups: dict[float, list[nn.Parameter]] = {}
        for part in self.parts:
            for lr, parameters in part.learnables().items():
                groups.setdefault(lr, []).extend(parameters)
        return {lr: parameters for lr, parameters in groups.items() if parameters}

    def optimizer_options(self) -> dict[str, Any]:
        """Class and options of the optimizer, for the record of the run; refuses one that cannot fit this method.

        Raises:
            ValueError: It takes no groups of parameters, or a part needs the state of another.
        """
        groups = [{"params": [nn.Parameter(torch.zeros(1, 1))], "lr": lr} for lr in (0.1, 0.2)]
        try:
            optimizer = self.make_optimizer(groups)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"--model.optimizer takes no groups of parameters, each with a learning rate of its own: {error}"
            ) from error
        for part in self.parts:
            part.check_optimizer(optimizer)
        return {"class": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}", **optimizer.defaults}

    def configure_model(self) -> None:
        """Let every part start from the data; the process group is up, the optimizer not yet made."""
        if not self._started:
            self._started = True
            # What the block before was fitted with, its optimizer's state above all: a module and its Trainer know each
            # other, and Lightning knows the last Trainer until the next one fits.
            gc.collect()
            self._reduced(self._epoch_loss)
            # Lightning lets new tensors be made on the accelerator here; plans and searches are for the CPU.
            with torch.no_grad(), torch.device("cpu"):
                if self.block.has_experts:
                    self.unseen = [name for name, x in self.observe(ChannelAbsMax).items() if not x.any()]
                for part in self.parts:
                    part.start(self)

    def on_train_epoch_start(self) -> None:
        """Tell the parts how far the fit has come."""
        epoch, epochs = self.trainer.current_epoch, self.trainer.max_epochs or 1
        for part in self.parts:
            part.advance(epoch, max(epochs, epoch + 1), self.trainer.optimizers[0])

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

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Gradients of a loss."""
        with quick_products(loss.device):
            super().backward(loss, *args, **kwargs)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the error of a batch."""
        x, target, *_ = batch
        self.log("error", token_error(self(x), target), batch_size=len(x), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """The optimizer, with one group per learning rate, and the schedule of the rates."""
        groups = [{"params": parameters, "lr": lr} for lr, parameters in self.learnables().items() if parameters]
        if not groups:
            return None
        optimizer = self.make_optimizer(groups)
        if self.schedule == "constant":
            return optimizer
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        schedule: torch.optim.lr_scheduler.LRScheduler
        if self.schedule == "linear":
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        else:
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Where it starts from, should no epoch be better (a NaN is not)."""
        for linear in self.block.linears.values():
            linear.settle()
        if self._resumed is not None:
            self._go_on(self._resumed)
            return
        self._best_loss = self.error() / self.error_before
        self._best_state = [parameter.detach().clone() for parameter in self._trained()]

    def on_train_epoch_end(self) -> None:
        """Remember the parameters if this was the best epoch so far."""
        self.log("block", float(self.block.index))
        loss = float(self._epoch_loss.compute())
        if loss < self._best_loss:
            self._best_loss = loss
            self._best_state = [parameter.detach().clone() for parameter in self._trained()]

    def on_train_end(self) -> None:
        """Go back to the best epoch, and say what the parts are there."""
        self.go_back_()
        for part in self.parts:
            self.figures |= part.figures()
        if self.figures:
            for logger in self.loggers:
                logger.log_metrics(self.figures | {"block": float(self.block.index)}, self.trainer.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a step changes; the block itself, and how it starts, come about again."""
        for key in ("hparams_name", "hyper_parameters"):
            checkpoint.pop(key, None)
        checkpoint["state_dict"] = {}
        checkpoint["block"] = {
            "trained": [parameter.detach() for parameter in self._trained()],
            "best": (self._best_loss, self._best_state),
            # of every process, [W]
            "loss": [self._of_all(x) for x in (self._epoch_loss.mean_value, self._epoch_loss.weight)],
            "order": (self.activations.order.state(), self.trainer.fit_loop.batch_idx + 1),
            "rng": torch.get_rng_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the order of the samples; the rest when the optimizer has its state."""
        self._resumed = checkpoint["block"]
        self.activations.order.go_on(*checkpoint["block"]["order"])

    @torch.no_grad()
    def _go_on(self, kept: dict[str, Any]) -> None:
        epoch, epochs = self.trainer.current_epoch, self.trainer.max_epochs or 1
        for part in self.parts:
            part.resume(epoch, max(epochs, epoch + 1), self.trainer.optimizers[0])
        for parameter, value in zip(self._trained(), kept["trained"], strict=True):
            parameter.copy_(value)
        self._best_loss, self._best_state = kept["best"][0], [x.to(self.device) for x in kept["best"][1]]
        loss, weight = (x[self.global_rank].to(self.device) for x in kept["loss"])
        self._epoch_loss.mean_value, self._epoch_loss.weight = loss, weight
        self._epoch_loss._update_count = kept["order"][1]
        torch.set_rng_state(kept["rng"])

    @torch.no_grad()
    def go_back_(self) -> None:
        """Be again what had the least error: the best epoch, or the start; before the first step nothing changes."""
        for parameter, best in zip(self._trained(), self._best_state, strict=bool(self._best_state)):
            parameter.copy_(best)

    def prove(self) -> None:
        """Measure what the transforms, fitted, change before anything is rounded: nothing, but for fp64's last bits."""
        self.equivalence = equivalence_error(self.block, next(self.activations.inputs())[:1].to(self.block.device))

    @torch.no_grad()
    def fold(self) -> None:
        """Make the fitted parts permanent: the block's linears become packed integers.

        Linears that read the same tensor go together, in the order they run, so that each Hessian is that of inputs
        which earlier linears, packed already, have given. What saw no token is rounded to nearest.
        """
        for name in self.unseen:
            self.block.linears[name].forget_corrections()
        rounding, axis = self.rounding, next((part for part in self.parts if isinstance(part, AxisChoice)), None)
        exact = torch.autocast(self.block.device.type, enabled=False)  # as in the forward, or the codes would differ
        if axis is None and not rounding.wants_hessian:
            with exact:
                self.block.pack_(lambda linear: rounding.round(linear, None))
            return
        for names, hessians in self.hessians(rounding.weighs_tokens):
            linears = [self.block.linears[name] for name in names]
            with exact:
                if axis is not None:
                    weights = axis.round(linears, hessians, rounding)
                else:
                    weights = [rounding.round(*pair) for pair in zip(linears, hessians, strict=True)]
                for name, weight in zip(names, weights, strict=True):
                    self.block.pack_linear_(name, weight)
        self.block.fold_sources_()

    def _stages(self) -> list[list[list[str]]]:
        found = self.block.stages(self.activations.inputs())
        if self._trainer is None or not self.block.has_experts:
            return found
        return self.trainer.strategy.broadcast(found)  # which experts run depends on a process's samples

    @property
    def rounding(self) -> Rounding:
        """The last part, to nearest if there is none."""
        last = self.parts[-1] if self.parts else None
        return last if isinstance(last, Rounding) else Rounding(self.block)

    @torch.no_grad()
    def observe(self, make: Callable[[int], Metric], names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Statistics of the inputs of these linears, or all, over all samples, in full precision.

        Args:
            make: Width of the input -> a metric, updated with inputs [B, T, I].
            names: Of linears.

        Returns:
            Name of the linear -> the metric's value.
        """
        linears = {name: linear for name, linear in self.block.linears.items() if names is None or name in names}
        device = self.block.device
        metrics = {name: self._reduced(make(linear.in_features).to(device)) for name, linear in linears.items()}
        hooks = [
            linear.register_forward_pre_hook(lambda _, args, metric=metrics[name]: metric.update(args[0]))
            for name, linear in linears.items()
        ]
        with self.block.full_precision():
            for x in self.activations.inputs():
                self.block(x.to(self.block.device))
        for hook in hooks:
            hook.remove()
        return {name: metric.compute() for name, metric in metrics.items()}

    @torch.no_grad()
    def observe_quantized(self, make: Callable[[int], Metric | MetricCollection], name: str, final: bool = True) -> Any:
        """A statistic of the inputs of one linear, over all samples, as the quantized model has them.

        Args:
            make: Width of the input -> a metric or several, updated with inputs [B, T, I]; what they compute is the
                result.
            name: Of the linear.
            final: Of what is multiplied with the weight; else of the input as it comes, before what is done to it here.
        """
        metric = self._reduced(make(self.block.linears[name].in_features).to(self.block.device))
        self._watch({name: lambda came, multiplied: metric.update(multiplied if final else came)})
        return metric.compute()

    def hessians(self, weighted: bool = True) -> Iterator[tuple[list[str], list[Tensor]]]:
        """Linears that read the same tensor, in the order they run: names, and Hessians of what is multiplied, [I, I].

        Each is of what the linears before it have become by then; experts, of which none reads what another gives, are
        observed together, as many as fit. None of the block's linears is packed the first time that weights are asked.

        Args:
            weighted: Let tokens count as they do in the block's error, where that is known; see ``token_weights``.
        """
        if weighted and self._token_weights is None:
            batches = ((x, target) for x, target, *_ in self.activations.in_order())
            seed = 0 if self.progress is None else self.progress.seed
            self._token_weights = token_weights(self.block, batches, self.activations.numbers, seed)
        known = self._token_weights or {} if weighted else {}
        for stage in self._stages():
            many = max(1, HESSIANS_AT_ONCE // (4 * self.block.linears[stage[0][0]].in_features ** 2))
            for start in range(0, len(stage), many):
                yield from self._hessians_of(stage[start : start + many], known)

    @torch.no_grad()
    def _hessians_of(
        self, groups: Sequence[list[str]], known: Mapping[str, Tensor]
    ) -> list[tuple[list[str], list[Tensor]]]:
        read_at, device = {n: n if n in known else names[0] for names in groups for n in names}, self.block.device
        metrics = {  # those without weights have one; without them a few massive tokens are most of what a ridge adds
            name: self._reduced(Hessian(self.block.linears[name].in_features, ridge=name in known).to(device))
            for name in dict.fromkeys(read_at.values())
        }
        self._watch({name: weighing(metric, known.get(name)) for name, metric in metrics.items()})
        found = {name: metric.compute() for name, metric in metrics.items()}
        return [(names, [found[read_at[name]] for name in names]) for names in groups]

    def _watch(self, watches: Mapping[str, Callable[[Tensor, Tensor], None]]) -> None:
        """Pass all samples on as far as these linears, each watched by its function; see ``FakeQuantLinear.watch``."""
        waiting: set[str] = set()
        linears = self.block.linears  # looked for anew each time it is asked for

        def watched(name: str, came: Tensor, multiplied: Tensor) -> None:
            watches[name](came, multiplied)
            waiting.discard(name)
            if not waiting:
                raise StopForward  # what comes after them is not needed

        for name in watches:
            linears[name].watch = partial(watched, name)
        for x in self.activations.inputs():
            waiting.update(watches)
            with contextlib.suppress(StopForward):
                self.block(x.to(self.block.device))
        for name in watches:
            linears[name].watch = None

    @torch.no_grad()
    def error(self, tokens: int | None = None) -> float:
        """Error of the block as it is now against its target(s), over about so many tokens or all; ``token_error``."""
        mean, seen = self._reduced(MeanMetric(nan_strategy="disable").to(self.block.device)), 0
        plugin = None if self._trainer is None else self._trainer.precision_plugin
        for x, *targets in self.activations.at_once():
            with contextlib.nullcontext() if plugin is None else plugin.forward_context():  # that of the steps
                output = self.block(x.to(self.block.device))
            mean.update(sum(token_error(output, target.to(output.device)) for target in targets), len(x))
            seen += len(x)
            if tokens is not None and seen * x.shape[1] >= tokens:
                break
        return float(mean.compute())

    def _reduced(self, metric: AnyMetric) -> AnyMetric:
        """A metric over all processes that share the samples."""
        return metric if self.activations.ranks > 1 else of_this_process(metric)

    def _of_all(self, value: Tensor) -> Tensor:
        """A number of every process, [W]."""
        found = self.all_gather(value)
        assert isinstance(found, Tensor)
        return found.reshape(-1)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameters in self.learnables().values() for parameter in parameters]


Method: TypeAlias = Callable[[QuantBlock], BlockModule]
