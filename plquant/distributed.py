"""Several processes that make one run: how they start, agree, and what is said when one of them is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torchmetrics import Metric, MetricCollection

T = TypeVar("T")
AnyMetric = TypeVar("AnyMetric", bound=Metric | MetricCollection)
REFUSALS = (ValueError, OSError, NotImplementedError)  # what a user can mend
SECONDS_TO_END = 5.0  # a process whose connection is gone is soon gone itself


@rank_zero_only
def say(line: str) -> None:
    """Print, in one process of a run."""
    print(line, flush=True)


def is_rank_zero() -> bool:
    """Whether this process is the one that prints."""
    return not getattr(rank_zero_only, "rank", 0)


def require_supported(trainer: L.Trainer) -> None:
    """Refuse devices and strategies under which blocks are not calibrated.

    Raises:
        ValueError: The trainer's is none of ours.
    """
    strategy = trainer.strategy
    if strategy.root_device.type == "mps":
        raise ValueError("--trainer.accelerator=mps has no float64, which folding needs; use cpu")
    if isinstance(strategy, SingleDeviceStrategy):
        return
    if not isinstance(strategy, DDPStrategy) or not isinstance(strategy.launcher, _SubprocessScriptLauncher):
        raise ValueError(
            f"--trainer.devices={trainer.num_devices} with {type(strategy).__name__}, of processes that Python or a "
            "notebook forks or of a sharded model: a block fits on one device, and its result must outlive the "
            "process; use --trainer.strategy=ddp"
        )


def require_even(trainer: L.Trainer, samples: int) -> None:
    """Refuse samples that the processes cannot share evenly: the steps of all must be as many, and as large.

    Raises:
        ValueError: They cannot, with the numbers next to it that they can share.
    """
    ranks = trainer.world_size
    if samples % ranks:
        fewer, more = samples // ranks * ranks, -(-samples // ranks) * ranks
        numbers = f"{fewer} or {more}" if fewer else f"{more}"
        raise ValueError(
            f"--data.num_samples={samples} calibration windows are not the same number for each of {ranks} processes "
            f"(--trainer.devices={trainer.num_devices}, --trainer.num_nodes={trainer.num_nodes}); use {numbers}"
        )


def launch(trainer: L.Trainer, function: Callable[[], T]) -> T:
    """Run a function in all processes of a trainer: starts those that Lightning starts, and connects them.

    Once: later fits and validations of the process use the group that is there.

    Raises:
        ChildProcessError: Another process has ended, and with it the run.
    """
    launcher = trainer.strategy.launcher
    if launcher is None:
        return function()
    assert isinstance(launcher, _SubprocessScriptLauncher)

    def connected() -> T:
        trainer.strategy.setup_environment()
        return function()

    try:
        return launcher.launch(connected, trainer=trainer)
    except RuntimeError as error:
        ended = _ended(launcher) if _is_of_connection(error) else ""
        if not ended:
            raise
        raise ChildProcessError(
            f"{ended}, and the run with it, at rank {trainer.global_rank}. Run the same command again to go on with "
            "what is finished"
        ) from error


def on_rank_zero(trainer: L.Trainer, function: Callable[[], T]) -> T:
    """What a function gives on rank 0, on every rank; what it refuses is refused on every rank."""
    found: T | None = None
    refused: Exception | None = None
    if trainer.is_global_zero:
        try:
            found = function()
        except REFUSALS as error:
            refused = error
    found, refused = trainer.strategy.broadcast((found, refused))
    if refused is not None:
        raise refused
    return found  # type: ignore[return-value]


def refused_by_any(ranks: int, check: Callable[[], None]) -> None:
    """Run a check of a process's own samples; what one of those who share them refuses, all refuse."""
    own: Exception | None = None
    try:
        check()
    except REFUSALS as error:
        own = error
    refused: list[Exception | None] = [own] * ranks
    if ranks > 1:
        torch.distributed.all_gather_object(refused, own)
    for found in refused:
        if found is not None:
            raise found


def meeting(trainer: L.Trainer) -> Callable[[], None]:
    """Where the processes wait for each other; they may come hours apart, longer than collectives wait."""
    if trainer.world_size == 1:
        return lambda: None
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
    return lambda: torch.distributed.barrier(group)


def of_this_process(metric: AnyMetric) -> AnyMetric:
    """Let a metric compute from what this process has seen, though there are others."""
    for each in metric.values() if isinstance(metric, MetricCollection) else (metric,):
        each.distributed_available_fn = _never
    return metric


def _never() -> bool:
    return False


def _is_of_connection(error: RuntimeError) -> bool:
    """A collective failed, in the words of gloo, NCCL or torch's store."""
    words = ("connection", "peer", "nccl", "gloo", "socket", "store", "timed out")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error).lower() for word in words)


def _ended(launcher: _SubprocessScriptLauncher) -> str:
    """Which process ended: of those started here by number and exit code, of others that it is another."""
    until = time.monotonic() + (SECONDS_TO_END if launcher.procs else 0)
    while True:
        for rank, process in enumerate(launcher.procs, 1):
            if process.poll():
                return f"process {process.pid} (local rank {rank}) ended with exit code {process.returncode}"
        if time.monotonic() >= until:
            return "another process is not to be reached any more"
        time.sleep(0.1)
