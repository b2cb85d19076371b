"""What is foretold is what comes about."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

import plquant as pq
from plquant.cli import main
from tests.families import tiny_model


def parts(checkpoint: Path, method: Any, **options: Any) -> tuple[Any, Any, Any]:
    model = pq.QuantizedLM(str(checkpoint), method, **({"weights": pq.IntGrid(3, 16)} | options))
    data = pq.data.BuiltinText(num_samples=4, seq_len=32)
    return pq.BlockwiseTrainer(max_epochs=1, accelerator="cpu", enable_progress_bar=False), model, data


CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "OmniQuant": (pq.methods.OmniQuant, {}, "stock transformers, and plquant.load"),
    "GPTQ": (pq.methods.GPTQ, {"weights": pq.IntGrid(4, None, symmetric=True)}, "stock transformers, and plquant.load"),
    "W4A4": (pq.methods.RTN, {"activations": pq.ActivationGrid(4)}, "leaves attention in floating point"),
    "QLLM": (pq.methods.QLLM, {"activations": pq.ActivationGrid(4)}, "plquant.load only (run-time operations)"),
    "rotations": (pq.methods.Light, {}, "plquant.load only (run-time operations)"),
    "no rotations": (partial(pq.methods.Best, rotate=False), {}, "stock transformers, and plquant.load"),
    "matrices": (partial(pq.methods.AffineQuant, online="dense"), {}, "plquant.load only (run-time operations)"),
}


@pytest.mark.parametrize("name", CASES)
def test_size_bits_and_where_it_opens(name: str, checkpoint: Path, tmp_path: Path) -> None:
    method, options, opens = CASES[name]
    trainer, model, data = parts(checkpoint, method, **options)
    plan = trainer.plan(model, data)
    assert model._lm is None and opens in plan.runs_in and plan.linears == 21
    report = trainer.calibrate(model, data, output_dir=str(tmp_path / "out"), evaluate=False)
    tensors = [item for shard in (tmp_path / "out").glob("*.safetensors") for item in load_file(shard).items()]
    beside = sum(t.nbytes for n, t in tensors if ".online." in n or ".inputs." in n)
    assert plan.output_bytes == sum(t.nbytes for _, t in tensors) - beside
    assert report.opens_in_stock == ("plquant.load only" not in opens) and report.cost is not None
    if not report.cost.operations and not beside:
        assert plan.effective_bits == pytest.approx(report.cost.effective_bits)


def test_experts_open_in_plquant_only(checkpoint: Path, tmp_path: Path) -> None:
    lm = tiny_model("mixtral", fused=True, vocab_size=258, max_position_embeddings=256)
    lm.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
    trainer, model, data = parts(tmp_path / "model", pq.methods.RTN)
    assert trainer.plan(model, data).runs_in == "plquant.load only (experts)"


def test_it_is_a_command_and_reads_no_weights(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("plquant.sources.Source.load", None)
    monkeypatch.chdir(tmp_path)
    main(f"plan --model.checkpoint {checkpoint} --model.weights.bits 3 --trainer.accelerator cpu".split())
    said = capsys.readouterr().out
    assert "OmniQuant W3A16 g32" in said and "3.594 effective bits" in said and "GiB of memory" in said
    assert not list(tmp_path.iterdir())
