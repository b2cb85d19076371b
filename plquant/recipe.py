"""What decides the result of a run, and what it needs beside its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lightning.pytorch.callbacks import ProgressBar

import plquant
from plquant.block_module import BlockModule
from plquant.data.base import TextData
from plquant.model import QuantizedLM
from plquant.parts.base import Part
from plquant.quant.grid import IntGrid


def recipe(
    seed: int,
    model: QuantizedLM,
    datamodule: TextData,
    grid: IntGrid,
    method: BlockModule,
    trainer: Mapping[str, Any],
) -> dict[str, Any]:
    """All that decides the result: what a second run must have in common to go on with a first.

    Args:
        seed: Of the run.
        model: What is quantized.
        datamodule: The calibration text.
        grid: Of the weights, its group size settled.
        method: On any block.
        trainer: Its arguments, as far as they decide.
    """
    return {
        "plquant": plquant.__version__,
        "seed": seed,
        "model": {
            "checkpoint": model.checkpoint,
            "weights": asdict(grid),
            "activations": None if model.activations is None else asdict(model.activations),
            "blocks_per_fit": model.blocks_per_fit,
            "dtype": str(model.load_dtype),
        },
        "method": {"class": type(method).__qualname__, **method.hparams},
        "optimizer": method.optimizer_options(),
        "data": {"class": type(datamodule).__qualname__, **datamodule.hparams},
        "trainer": dict(trainer),
    }


def trainer_entry(arguments: Mapping[str, Any], devices: int, block_parallel: bool) -> dict[str, Any]:
    """Those of a trainer's arguments that decide the result.

    Args:
        arguments: All of them.
        devices: How many there are in fact.
        block_parallel: Processes calibrate blocks of their own: who calibrates which decides nothing.
    """
    shown = ("logger", "enable_progress_bar")
    processes = ("devices", "num_nodes", "strategy")
    entry = {key: value for key, value in (*arguments.items(), ("devices", devices)) if key not in shown}
    if block_parallel:
        entry = {key: value for key, value in entry.items() if key not in processes} | {"block_parallel": True}
    return entry | {"callbacks": [call for call in entry["callbacks"] if not isinstance(call, ProgressBar)]}


def require_streamable(model: QuantizedLM, parts: Sequence[Part]) -> None:
    """Refuse parts that need the whole model where there is one block of it at a time.

    Raises:
        ValueError: With the parts.
    """
    whole = [type(part).__name__ for part in parts if part.changes_model]
    if model.streaming and whole:
        raise ValueError(
            f"{', '.join(whole)} changes all blocks before the first is calibrated, and --model.streaming=true "
            "holds one at a time; leave out one of the two (of Rotation: its place residual)"
        )


def stream_bytes(model: QuantizedLM, datamodule: TextData, method: BlockModule) -> int:
    """Of all activations between two blocks."""
    tokens = datamodule.num_samples * datamodule.seq_len
    width = model.config.get_text_config().hidden_size
    return tokens * width * model.load_dtype.itemsize * (3 if method.aug_loss else 2)
