"""Every file in configs/ parses, and what it says is what runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

import plquant as pq
from plquant.blocks.quant_block import QuantBlock
from plquant.cli import main

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_values_of_the_file_are_used(path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def record(trainer: Any, model: Any, datamodule: Any, output_dir: str = "out", evaluate: bool = True) -> None:
        seen.update(trainer=trainer, model=model, data=datamodule, output_dir=output_dir)

    monkeypatch.setattr(pq.BlockwiseTrainer, "calibrate", record)
    main(["calibrate", "-c", str(path), "--model.checkpoint", str(checkpoint), "--trainer.accelerator", "cpu"])
    config = yaml.safe_load(path.read_text())
    assert all(getattr(seen["model"].weights, key) == value for key, value in config["model"]["weights"].items())
    assert all(seen["data"].hparams[key] == value for key, value in config["data"]["init_args"].items())
    assert type(seen["data"]).__name__ == config["data"]["class_path"]
    assert seen["trainer"].max_epochs == config["trainer"]["max_epochs"]
    method = seen["model"].method(QuantBlock({"0": nn.Linear(8, 8)}, pq.IntGrid(4, 8)))
    assert type(method).__name__ == config["model"]["method"]["class_path"]
    assert all(method.hparams[k] == v for k, v in config["model"]["method"].get("init_args", {}).items())
    assert seen["output_dir"] == config["output_dir"]


def test_there_is_a_config_for_each_width_and_group_size() -> None:
    names = {path.stem for path in CONFIGS}
    assert {f"omniquant_w{b}a16{g}" for b in (2, 3, 4) for g in ("", "g64", "g128")} <= names
