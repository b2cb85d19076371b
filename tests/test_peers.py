"""Rows of other toolkits in bench/quality.py."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench import quality
from tests.families import byte_tokenizer, tiny_model


@pytest.mark.parametrize(
    ("peer", "package", "bits"),
    [
        ("GPTQ (LLM Compressor)", "llmcompressor", 4.312),
        ("HQQ", "hqq", 4.5),
        ("NF4 (bitsandbytes)", "bitsandbytes", 4.5),
    ],
)
def test_a_peer_is_a_row_beside_ours(
    peer: str, package: str, bits: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package)
    checkpoint = tmp_path / "tiny"  # groups of 64 divide all its widths
    tiny_model("llama", vocab_size=258, hidden_size=64, intermediate_size=128).bfloat16().save_pretrained(checkpoint)
    byte_tokenizer().save_pretrained(checkpoint)
    ids = tmp_path / "ids.safetensors"
    save_file({"calibration_ids": torch.arange(64).view(2, 32), "evaluation_ids": torch.arange(64).view(2, 32)}, ids)
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "results.csv")
    arguments = ["--model", str(checkpoint), "--ids", str(ids), "--out", str(tmp_path / "out")]
    chosen = ["--regimes", "W4A16 g64", "W4A4", "--methods", "--peers", peer]
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments, *chosen])
    quality.main()
    (row,) = csv.DictReader((tmp_path / "results.csv").open())
    assert row["method"].startswith(f"{peer} ") and row["regime"] == "W4A16 g64" and float(row["bits"]) == bits
    assert float(row["perplexity"]) > 1 and float(row["CPU s a block"]) >= 0


def test_a_peer_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(quality, "installed", list)
    monkeypatch.setattr(sys, "argv", ["quality.py", "--methods", "--peers", "HQQ"])
    with pytest.raises(SystemExit):
        quality.main()
    assert "--peers HQQ: hqq is not installed" in capsys.readouterr().err
