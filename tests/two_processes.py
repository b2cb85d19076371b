"""What two processes calibrate: ``python -m tests.two_processes MODELS FOLDER``; Lightning starts the second."""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L

import plquant as pq

SAMPLES, LENGTH, EPOCHS = 16, 64, 3


class Case(NamedTuple):
    """A method and how it is run by two processes."""

    method: Any
    activations: Any = None
    family: str = "llama"
    streaming: bool = False
    evaluate: bool = False


METHODS = {
    "RTN": Case(pq.methods.RTN),
    "GPTQ": Case(pq.methods.GPTQ),
    "AdaDim": Case(partial(pq.methods.AdaDim, rounding="gptq")),
    "OmniQuant": Case(pq.methods.OmniQuant),
    "AffineQuant": Case(pq.methods.AffineQuant),
    "QLLM": Case(pq.methods.QLLM, pq.ActivationGrid(4)),  # a plan from statistics, and a search
    "Best": Case(partial(pq.methods.Best, rotate=False)),
    "one block in memory": Case(pq.methods.OmniQuant, streaming=True),
    "experts": Case(pq.methods.OmniQuant, family="mixtral", streaming=True, evaluate=True),
    "rounded experts": Case(pq.methods.GPTQ, family="mixtral"),
    "axes of experts": Case(partial(pq.methods.AdaDim, rounding="gptq"), family="mixtral"),
}


class KillAt(L.Callback):
    """A process ends as the machine may end it, in a block, after so many steps."""

    def __init__(self, rank: int, block: int, step: int) -> None:
        self.rank, self.block, self.step = rank, block, step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        here = trainer.global_rank, pl_module.block.index, trainer.global_step
        if here == (self.rank, self.block, self.step):
            os.kill(os.getpid(), signal.SIGKILL)


def calibrate(root: Path, out: Path, name: str, batch_size: int, **trainer: Any) -> None:
    """By one process, unless told otherwise, which has all of the model in memory."""
    L.seed_everything(0, verbose=False)
    case = METHODS[name]
    streaming = case.streaming and trainer.get("devices", 1) > 1
    grid = pq.IntGrid(3, 16)
    model = pq.QuantizedLM(str(root / case.family), case.method, grid, case.activations, streaming=streaming)
    data = pq.data.BuiltinText(
        num_samples=SAMPLES, seq_len=LENGTH, batch_size=batch_size, eval_seq_len=LENGTH, eval_windows=3
    )
    options = {"accelerator": "cpu", "precision": "32-true", "max_epochs": EPOCHS, "enable_progress_bar": False}
    fitting = pq.BlockwiseTrainer(**options | trainer)
    fitting.calibrate(model, data, output_dir=str(out), evaluate=case.evaluate)


if __name__ == "__main__":
    models, folder = map(Path, sys.argv[1:])
    two: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    for each in METHODS:
        calibrate(models, folder / each, each, 1, **two)
    calibrate(models, folder / "apart", "OmniQuant", 1, block_parallel=True, **two)
