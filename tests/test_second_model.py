"""The model that bench/second_model.py trains."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import plquant as pq
from bench import second_model


def test_it_learns_and_opens_with_ids_of_both_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, model, ids = (tmp_path / name for name in ("text.txt", "model", "ids.safetensors"))
    text.write_text("A short line, again and again.\n" * 2000, encoding="utf-8")
    monkeypatch.setattr(second_model, "SHAPE", second_model.SHAPE | {"hidden_size": 64, "num_hidden_layers": 1})
    monkeypatch.setattr(second_model, "LENGTH", 64)
    arguments = ["second_model.py", "--text", str(text), "--out", str(model), "--steps", "12"]
    arguments += ["--ids_out", str(ids), "--evaluation_text", str(text)]
    monkeypatch.setattr(sys, "argv", arguments)
    second_model.main()
    assert '"steps": 12' in capsys.readouterr().out
    tensors = load_file(ids)
    assert tensors["calibration_ids"].shape == (32, 64) and tensors["evaluation_ids"].shape == (160, 64)
    loaded = pq.QuantizedLM(str(model), pq.methods.RTN)
    assert loaded.lm.config.model_type == "qwen3"
    windows = tensors["evaluation_ids"][:4].long()
    assert loaded.tokenizer.decode(windows[0]) == text.read_text(encoding="utf-8")[:64]
    assert loaded.lm(input_ids=windows, labels=windows).loss < 4.5  # of 258 tokens at random: 5.55

    monkeypatch.setattr(sys, "argv", [*arguments, "--calibration_text", "builtin"])
    second_model.main()  # the model is there
    again = load_file(ids)
    assert capsys.readouterr().out == ""
    assert torch.equal(again["evaluation_ids"], tensors["evaluation_ids"])
    assert not torch.equal(again["calibration_ids"], tensors["calibration_ids"])
