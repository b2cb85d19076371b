"""Every file in configs/ parses, what it says is what runs, and it runs."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

import plquant as pq
from plquant.blocks.quant_block import QuantBlock
from plquant.cli import main
from tests.families import byte_tokenizer, tiny_model

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
FAMILIES = {"facebook/opt": "opt", "mistralai/Mixtral": "mixtral"}  # a config for others runs on a Llama


@pytest.fixture(scope="module")
def stand_in(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a tiny model of the family that a config names."""

    @cache
    def saved(family: str) -> Path:
        folder = tmp_path_factory.mktemp("stand_in") / family
        tiny_model(family, fused=True, vocab_size=258).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    def find(name: str) -> Path:
        return next((saved(family) for start, family in FAMILIES.items() if name.startswith(start)), checkpoint)

    return find


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
    model = config["model"]
    for key, value in (model.get("activations") or {}).items():
        assert getattr(seen["model"].activations, key) == value
    assert seen["model"].blocks_per_fit == model.get("blocks_per_fit", 1)
    block = QuantBlock({"0": nn.Linear(8, 8)}, pq.IntGrid(4, 8), activations=seen["model"].activations)
    method = seen["model"].method(block)
    assert type(method).__name__ == config["model"]["method"]["class_path"]
    options = config["model"]["method"].get("init_args", {})
    if "parts" in options:
        for part, given in zip(method.parts, options.pop("parts"), strict=True):
            assert type(part).__name__ == given["class_path"]
            assert all(part.options[k] == v for k, v in given.get("init_args", {}).items())
    assert all(method.hparams[k] == v for k, v in options.items())
    assert seen["output_dir"] == config["output_dir"]


def test_a_run_is_planned_from_its_file(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = Path(__file__).parent.parent / "configs" / "light_w4a4.yaml", tmp_path / "out"
    options = ["--model.checkpoint", str(checkpoint), "--data", "BuiltinText", "--data.num_samples", "4"]
    options += ["--data.seq_len", "32", "--trainer.accelerator", "cpu", "--output_dir", str(folder)]
    main(["plan", "-c", str(path), *options])
    assert f"-> {folder}" in (said := capsys.readouterr().out) and "minutes of calibration" in said
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine.txt").touch()
    with pytest.raises(SystemExit, match="holds other files"):
        main(["plan", "-c", str(path), *options])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_runs(path: Path, stand_in: Callable[[str], Path], tmp_path: Path) -> None:
    """One step for each block of a tiny model, with groups that its widths are multiples of."""
    model = yaml.safe_load(path.read_text())["model"]
    weights, checkpoint = model["weights"], stand_in(model["checkpoint"])
    group_size = ["--model.weights.group_size", "16"] if isinstance(weights["group_size"], int) else []
    data = ["--data", "BuiltinText", "--data.num_samples", "2", "--data.seq_len", "32", "--data.eval_seq_len", "32"]
    main(
        ["calibrate", "-c", str(path), "--model.checkpoint", str(checkpoint), *group_size, *data]
        + ["--data.eval_windows", "1", "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
        + ["--output_dir", str(tmp_path / "out")]
    )
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert written["model"]["weights"]["bits"] == weights["bits"]
    assert (tmp_path / "out" / "report.json").is_file()


def test_there_is_a_config_for_each_published_setting() -> None:
    names = {path.stem for path in CONFIGS}
    widths = [f"w{bits}a16{group}" for bits in (2, 3, 4) for group in ("", "g64", "g128")]
    assert {f"{method}_{width}" for method in ("omniquant", "affinequant") for width in widths} <= names
    assert {"omniquant_w4a4", "omniquant_w6a6", "affinequant_w4a4", "qllm_w4a4", "qllm_w4a8", "qllm_w6a6"} <= names
    assert {"omniquant_opt_w4a4", "omniquant_llama2_w4a4", "affinequant_llama2_w4a16g128"} <= names
    opt = ["w2a16g128", "w3a16g128", "66b_w3a16", "w4a4", "w6a6"]
    others = ["llama_30b_w4a4", "llama2_chat_w3a16g128", "falcon_180b_w3a16g512", "falcon_7b_w3a16g64"]
    assert {f"omniquant_{name}" for name in (*others, "mixtral_w4a16g128", *(f"opt_{name}" for name in opt))} <= names
    opt = ["125m_w2a16g128", "1.3b_w2a16g128", "13b_w2a16g128", "125m_w3a16g128", "1.3b_w3a16", "13b_w3a16g128"]
    others = ["llama2_w4a4", "llama_30b_w4a4", "llama2_13b_w2a16g128"]
    assert {f"affinequant_{name}" for name in (*others, *(f"opt_{name}" for name in opt))} <= names
    assert {f"qllm_llama2_{width}" for width in ("w4a4", "w4a8", "w6a6")} <= names
    assert {f"adadim_{rounding}_w{bits}a16g128" for rounding in ("rtn", "gptq") for bits in (3, 4)} <= names
    regimes = ("w4a16g64", "w3a16g64", "w2a16g64", "w4a4", "w6a6")
    assert {f"{preset}_{regime}" for preset in ("best", "light") for regime in regimes} <= names


def test_the_model_a_config_names_has_widths_that_its_group_size_divides() -> None:
    """SmolLM2-135M is 576 wide, which 128 does not divide."""
    for path in CONFIGS:
        model = yaml.safe_load(path.read_text())["model"]
        assert "SmolLM2-135M" not in model["checkpoint"] or model["weights"]["group_size"] != 128
