"""What two processes calibrate: ``python -m tests.two_processes CHECKPOINT FOLDER``; Lightning starts the second."""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L

import plquant as pq

SAMPLES, LENGTH, EPOCHS = 16, 64, 3
METHODS: dict[str, tuple[Any, Any]] = {
    "RTN": (pq.methods.RTN, None),
    "GPTQ": (pq.methods.GPTQ, None),
    "AdaDim": (partial(pq.methods.AdaDim, rounding="gptq"), None),
    "OmniQuant": (pq.methods.OmniQuant, None),
    "QLLM": (pq.methods.QLLM, pq.ActivationGrid(4)),  # a plan from statistics, and a search
    "Best": (partial(pq.methods.Best, rotate=False), None),
}


class KillAt(L.Callback):
    """A process ends as the machine may end it, in a block, after so many steps."""

    def __init__(self, rank: int, block: int, step: int) -> None:
        self.rank, self.block, self.step = rank, block, step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        here = trainer.global_rank, pl_module.block.index, trainer.global_step
        if here == (self.rank, self.block, self.step):
            os.kill(os.getpid(), signal.SIGKILL)


def calibrate(checkpoint: Path, out: Path, name: str, batch_size: int, **trainer: Any) -> None:
    L.seed_everything(0, verbose=False)
    method, activations = METHODS[name]
    model = pq.QuantizedLM(str(checkpoint), method, pq.IntGrid(3, 16), activations)
    data = pq.data.BuiltinText(num_samples=SAMPLES, seq_len=LENGTH, batch_size=batch_size)
    options = {"accelerator": "cpu", "precision": "32-true", "max_epochs": EPOCHS, "enable_progress_bar": False}
    pq.BlockwiseTrainer(**options | trainer).calibrate(model, data, output_dir=str(out), evaluate=False)


if __name__ == "__main__":
    for each in METHODS:
        calibrate(Path(sys.argv[1]), Path(sys.argv[2]) / each, each, 1, devices=2, strategy="ddp")
    apart = {"devices": 2, "strategy": "ddp", "block_parallel": True}
    calibrate(Path(sys.argv[1]), Path(sys.argv[2]) / "apart", "OmniQuant", 1, **apart)
