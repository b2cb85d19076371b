"""What README shows runs."""

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import plquant as pq
from plquant.blocks.quant_block import QuantBlock
from plquant.cli import main
from plquant.nn.packed_linear import PackedLinear

README = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README and "TODO" not in README


def test_the_method_it_adds_is_one(tmp_path: Path) -> None:
    (code,) = (block for block in PYTHON if "class ClipOnly" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    module = names["ClipOnly"](QuantBlock({"0": nn.Linear(8, 4)}, pq.IntGrid(4, 4)), lr=0.5)
    assert [len(parameters) for parameters in module.learnables().values()] == [2]


def test_the_script_runs(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (block for block in PYTHON if "calibrate(" in block)
    text = pq.data.BuiltinText(num_samples=2, seq_len=32, eval_seq_len=32, eval_windows=1)
    monkeypatch.setattr(pq.data, "HubText", lambda **kwargs: text)
    monkeypatch.setattr(pq, "BlockwiseTrainer", _quick(pq.BlockwiseTrainer))
    code = code.replace("HuggingFaceTB/SmolLM2-135M", str(checkpoint)).replace("out/smollm2-w4", str(tmp_path / "out"))
    code = code.replace("group_size=64", "group_size=16")
    names: dict[str, Any] = {}
    exec(code, names)
    assert any(isinstance(module, PackedLinear) for module in names["lm"].modules())


def _quick(trainer: Any) -> Any:
    return lambda max_epochs: trainer(max_epochs=1, accelerator="cpu", enable_progress_bar=False)


def test_every_flag_it_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "--model.activations.help"):
        with pytest.raises(SystemExit):
            main(["calibrate", flag])
    known = capsys.readouterr().out
    flags = set(re.findall(r"--(?:model|trainer)\.[a-z_.]*[a-z]", README)) - {
        "--model.method.help",
        "--model.method.lwc",
    }
    flags = {flag for flag in flags if not flag.startswith("--model.method.")}
    assert flags and all(flag in known for flag in flags)
