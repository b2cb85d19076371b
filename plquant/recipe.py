"""What decides the result of a run, and what it needs beside its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import plquant
from plquant.block_module import BlockModule
from plquant.data.base import TextData
from plquant.model import QuantizedLM
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
        "data": {"class": type(datamodule).__qualname__, **datamodule.hparams},
        "trainer": dict(trainer),
    }


def stream_bytes(model: QuantizedLM, datamodule: TextData, method: BlockModule) -> int:
    """Of all activations between two blocks."""
    tokens = datamodule.num_samples * datamodule.seq_len
    width = model.config.get_text_config().hidden_size
    return tokens * width * model.load_dtype.itemsize * (3 if method.aug_loss else 2)
