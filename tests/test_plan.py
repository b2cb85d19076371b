"""What is foretold is what comes about."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import plquant as pq
from plquant.cli import main
from plquant.parts.rotation import Rotation
from plquant.trial import Trial, try_block
from tests.families import byte_tokenizer, tiny_model


def parts(checkpoint: Path, method: Any, **options: Any) -> tuple[Any, Any, Any]:
    model = pq.QuantizedLM(str(checkpoint), method, **({"weights": pq.IntGrid(3, 16)} | options))
    data = pq.data.BuiltinText(num_samples=4, seq_len=32)
    return pq.BlockwiseTrainer(max_epochs=1, accelerator="cpu", enable_progress_bar=False), model, data


CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "OmniQuant": (pq.methods.OmniQuant, {}, "plquant.load; vLLM has no kernel for it"),
    "GPTQ": (
        pq.methods.GPTQ,
        {"weights": pq.IntGrid(4, None, symmetric=True)},
        "stock transformers, plquant.load, and vLLM",
    ),
    "W4A4": (pq.methods.RTN, {"activations": pq.ActivationGrid(4)}, "leaves attention in floating point"),
    "QLLM": (pq.methods.QLLM, {"activations": pq.ActivationGrid(4)}, "plquant.load only (run-time operations)"),
    "rotations": (pq.methods.Light, {}, "plquant.load only (run-time operations)"),
    "AdaDim": (pq.methods.AdaDim, {}, "stock transformers, plquant.load; vLLM has no kernel for it"),
    "no rotations of Light": (
        partial(pq.methods.Light, rotate=False),
        {},
        "stock transformers, plquant.load; vLLM has no kernel for it",
    ),
    "no rotations": (
        partial(pq.methods.Best, rotate=False),
        {},
        "stock transformers, plquant.load; vLLM has no kernel for it",
    ),
    "matrices": (partial(pq.methods.AffineQuant, online="dense"), {}, "plquant.load only (run-time operations)"),
    "rotated stream": (
        partial(pq.methods.Composed, parts=[partial(Rotation, places=["residual"])]),
        {},
        "plquant.load only (run-time operations)",
    ),
}
ONLINE = {"QLLM", "rotations", "matrices", "rotated stream"}


@pytest.mark.parametrize("name", CASES)
def test_size_bits_and_where_it_opens(name: str, checkpoint: Path, tmp_path: Path) -> None:
    method, options, opens = CASES[name]
    trainer, model, data = parts(checkpoint, method, **options)
    plan = trainer.plan(model, data)
    assert model._lm is None and plan.seconds > 0 and opens in plan.runs_in and plan.linears == 21
    report = trainer.calibrate(model, data, output_dir=str(tmp_path / "out"), evaluate=False)
    tensors = [item for shard in (tmp_path / "out").glob("*.safetensors") for item in load_file(shard).items()]
    beside = sum(t.nbytes for n, t in tensors if ".online." in n or ".inputs." in n)
    written = sum(t.nbytes for _, t in tensors)
    assert plan.least_bytes <= written <= plan.output_bytes
    assert plan.online_bytes == beside or (name == "QLLM" and plan.online_bytes > beside)  # the data decides
    assert plan.output_bytes < (1.15 if name != "QLLM" else 1.5) * written  # of few outputs here
    assert (plan.least_bytes == plan.output_bytes) == (name not in ("AdaDim", "no rotations of Light", "QLLM"))
    assert report.opens_in_stock == ("plquant.load only" not in opens) and report.cost is not None
    found = pytest.approx((report.cost.effective_bits, report.cost.online_share), rel=1e-6 if name != "QLLM" else 0.1)
    assert (plan.effective_bits, plan.online_share) == found
    assert (report.cost.online_bits > 0) == (beside > 0) == (name in ONLINE)


def test_a_block_that_is_rounded_to_nearest_in_the_trial_still_tells_what_the_method_costs(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = partial(pq.methods.AffineQuant, online="dense")
    plans = []
    for _ in range(2):
        trainer, model, data = parts(checkpoint, method)
        plans.append(trainer.plan(model, data))
        errors = iter([1e-6, 1.0])  # rounded to nearest, and as the method made it
        monkeypatch.setattr(pq.BlockwiseTrainer, "_error", lambda *_, errors=errors: next(errors))
    assert plans[0].online_share == plans[1].online_share > 0.1
    assert plans[0].effective_bits == plans[1].effective_bits


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
    assert (
        "OmniQuant W3A16 g32" in said
        and "3.594 effective bits per weight, run-time MACs +0.0%" in said
        and "GiB of memory" in said
    )
    assert not list(tmp_path.iterdir())


def test_time_follows_from_samples_and_epochs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Trial] = []

    def fixed(*args: Any) -> Trial:
        measured.append(try_block(*args))
        return replace(measured[-1], seconds=5.0, sample_seconds=0.5, step_seconds=2.0)

    monkeypatch.setattr("plquant.trainer.try_block", fixed)
    seconds = {}
    for method in (pq.methods.OmniQuant, pq.methods.RTN):
        model = pq.QuantizedLM(str(checkpoint), method, pq.IntGrid(3, 16))
        data = pq.data.BuiltinText(num_samples=10, seq_len=32, batch_size=4)
        trainer = pq.BlockwiseTrainer(max_epochs=7, accelerator="cpu", enable_progress_bar=False)
        seconds[method] = trainer.plan(model, data).seconds
    assert seconds[pq.methods.OmniQuant] == pytest.approx(3 * (5 + 10 * 0.5 + 7 * 3 * 2))  # blocks, samples, steps
    assert seconds[pq.methods.RTN] == pytest.approx(3 * (5 + 10 * 0.5))
    assert measured[0].step_seconds > 0 == measured[1].step_seconds
    assert all(trial.seconds > 0 and trial.sample_seconds > 0 for trial in measured)


MEASURE = """
import sys
from functools import partial
import plquant as pq
from plquant.report import peak_bytes
what, checkpoint, out, method, streaming = sys.argv[1:6]
model = pq.QuantizedLM(checkpoint, getattr(pq.methods, method), pq.IntGrid(4, 128), streaming=streaming == "True")
data = pq.data.BuiltinText(num_samples=4, seq_len=128)
options = {"devices": 2, "strategy": "ddp"} if sys.argv[6:] else {}
trainer = pq.BlockwiseTrainer(
    max_epochs=1, accelerator="cpu", enable_progress_bar=False, block_parallel=sys.argv[6:] == ["apart"], **options
)
if what == "plan":
    print("measured", trainer.plan(model, data).peak_bytes)
else:
    trainer.calibrate(model, data, output_dir=out, evaluate=False)
    print("measured", peak_bytes(), flush=True)
"""
HEAVY = pytest.mark.slow


# Two processes, so that the one does not measure what the other has taken
@pytest.mark.parametrize(
    ("method", "streaming", "processes"),
    [
        ("RTN", False, ""),
        ("OmniQuant", True, ""),
        pytest.param("RTN", True, "", marks=HEAVY),
        pytest.param("GPTQ", True, "", marks=HEAVY),
        pytest.param("AffineQuant", True, "", marks=HEAVY),
        pytest.param("Light", True, "", marks=HEAVY),
        pytest.param("Best", True, "", marks=HEAVY),
        pytest.param("OmniQuant", False, "ddp", marks=HEAVY),
        pytest.param("Best", True, "ddp", marks=HEAVY),
        pytest.param("OmniQuant", True, "apart", marks=HEAVY),
    ],
)
def test_memory_is_within_15_percent(method: str, streaming: bool, processes: str, large: Path, tmp_path: Path) -> None:
    arguments = [str(large), str(tmp_path / "out"), method, str(streaming), *filter(None, [processes])]
    script = tmp_path / "measure.py"  # Lightning starts the second process by its file
    script.write_text(MEASURE)
    (planned,), measured = (
        [int(line.split()[1]) for line in ran.stdout.splitlines() if line.startswith("measured")]
        for ran in (
            subprocess.run(
                [sys.executable, script, what, *arguments],
                check=True,
                capture_output=True,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
            )
            for what in ("plan", "run")
        )
    )
    assert len(measured) == (2 if processes else 1) and planned == pytest.approx(max(measured), rel=0.15)


def test_activations_count_where_they_are(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plquant.trial.peak_bytes", lambda: 10**9)
    model = pq.QuantizedLM(str(checkpoint), pq.methods.RTN, pq.IntGrid(3, 16))
    data = pq.data.BuiltinText(num_samples=1000, seq_len=128)
    memory, disk = (
        pq.BlockwiseTrainer(accelerator="cpu", enable_progress_bar=False, activations=where).plan(model, data)  # type: ignore[arg-type]
        for where in ("memory", "disk")
    )
    streams = 2 * 1000 * 128 * 64 * 2  # of 64 channels in bf16
    assert disk.disk_bytes == memory.disk_bytes + streams
    assert memory.peak_bytes - disk.peak_bytes == pytest.approx(streams, rel=0.05)


def test_processes_share_samples_or_blocks_and_the_disk(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plquant.trial.peak_bytes", lambda: 10**9)
    monkeypatch.setattr("plquant.trial.gpu_bytes", lambda: 2**30)
    model = pq.QuantizedLM(str(checkpoint), pq.methods.OmniQuant, pq.IntGrid(3, 16))
    data = pq.data.BuiltinText(num_samples=1000, seq_len=128)
    shared: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "max_epochs": 1}
    two: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    streams = 2 * 1000 * 128 * 64 * 2
    one = pq.BlockwiseTrainer(**shared).plan(model, data)
    split = pq.BlockwiseTrainer(**shared, **two).plan(model, data)
    apart = pq.BlockwiseTrainer(**shared, **two, block_parallel=True).plan(model, data)
    assert one.peak_bytes - split.peak_bytes == pytest.approx(streams / 2, rel=0.05)
    assert one.peak_bytes == apart.peak_bytes  # each process has all samples
    sizes = [
        pq.BlockwiseTrainer(**shared, **more, activations="disk").plan(model, data).disk_bytes - one.output_bytes
        for more in ({}, two, two | {"block_parallel": True})
    ]
    assert sizes == [streams, streams, 2 * streams]
    assert "in each of 2 processes" in split.lines()[2] and "processes" not in one.lines()[2]
    assert "of a GPU's 1.00, and 0.00 to evaluate" in one.lines()[2]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which eight blocks, 205 MB, weigh beside the process itself."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = LlamaConfig(**sizes, num_hidden_layers=8, vocab_size=258, dtype="bfloat16")  # type: ignore[arg-type]
    folder = tmp_path_factory.mktemp("large")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
