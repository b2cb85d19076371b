"""Every method from the checkpoint to the folder and back: what was evaluated is what is saved, loaded and run."""

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from transformers import AutoTokenizer

import plquant as pq
from plquant import ActivationGrid
from plquant.nn.attention import AttentionQuantizer
from plquant.nn.packed_linear import PackedLinear
from plquant.parts.activation_clipping import ActivationClipping
from plquant.parts.affine import Affine
from plquant.parts.axis import AxisChoice
from plquant.parts.clipping import LWC
from plquant.parts.learned_rounding import LearnedRounding
from plquant.parts.low_rank import LowRank
from plquant.parts.reassembly import Reassembly
from plquant.parts.rotation import Rotation
from plquant.parts.rounding import GPTQRounding
from plquant.parts.scale_shift import LET
from plquant.report import Report
from tests.families import byte_tokenizer, stock, tiny_model

IDS = torch.arange(3, 43)[None]
A4 = ActivationGrid(4)
Make = Callable[..., Any]

WEIGHT_ONLY: dict[str, Make] = {
    "RTN": pq.methods.RTN,
    "GPTQ": pq.methods.GPTQ,
    "OmniQuant": pq.methods.OmniQuant,
    "AffineQuant": pq.methods.AffineQuant,
    "AdaDim on RTN": partial(pq.methods.AdaDim, rounding="nearest"),
    "AdaDim": partial(pq.methods.AdaDim, tie=True),
    "OmniQuant, axis, GPTQ": partial(pq.methods.Composed, parts=[LET, LWC, AxisChoice, GPTQRounding]),
    "low rank, LWC": partial(pq.methods.Composed, parts=[LowRank, LWC]),
    "rotated values, learned rounding": partial(
        pq.methods.Composed, parts=[partial(Rotation, places=["values"]), LWC, LearnedRounding]
    ),
    "Light, not rotated": partial(pq.methods.Light, rotate=False),
    "Best, not rotated": partial(pq.methods.Best, rotate=False),
}
ONLINE: dict[str, Make] = {
    "AffineQuant dense": partial(pq.methods.AffineQuant, online="dense"),
    "AffineQuant kronecker": partial(pq.methods.AffineQuant, online="kronecker"),
}
QUANTIZED_ACTIVATIONS: dict[str, Make] = {
    "RTN": pq.methods.RTN,
    "GPTQ": pq.methods.GPTQ,
    "OmniQuant": partial(pq.methods.OmniQuant, alpha="search"),
    "AffineQuant": pq.methods.AffineQuant,
    "QLLM": pq.methods.QLLM,
    "QLLM merging": partial(pq.methods.QLLM, removal="merge", compensate=False),
    "everything": partial(pq.methods.Composed, parts=[LET, Affine, Reassembly, LowRank, LWC, GPTQRounding]),
    "everything, learned rounding": partial(
        pq.methods.Composed, parts=[LET, Affine, Reassembly, LowRank, LWC, LearnedRounding]
    ),
    "rotated stream": partial(
        pq.methods.Composed,
        parts=[partial(Rotation, places=["residual", "values", "queries", "linears"]), GPTQRounding],
    ),
    "Light": pq.methods.Light,
    "Best": pq.methods.Best,
    "clipped activations": partial(pq.methods.Composed, parts=[LWC, ActivationClipping, GPTQRounding]),
    "matrices, GPTQ": partial(pq.methods.Composed, parts=[LET, partial(Affine, online="kronecker"), LWC, GPTQRounding]),
}


def calibrate(
    checkpoint: Path, out: Path, method: Make, group_size: int = 16, **model_options: Any
) -> tuple[Report, Tensor]:
    """The report, and the logits of the model in memory."""
    model = pq.QuantizedLM(str(checkpoint), method, pq.IntGrid(3, group_size), **model_options)
    data = pq.data.BuiltinText(num_samples=6, seq_len=48, eval_seq_len=64, eval_windows=2)
    trainer = pq.BlockwiseTrainer(max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    report = trainer.calibrate(model, data, output_dir=str(out), evaluate=False)
    with torch.no_grad():
        return report, model.lm(IDS, use_cache=False).logits


def saved(family: str, folder: Path, **overrides: Any) -> Path:
    """A tiny model, and its tokenizer; groups along the input are better in one linear of each block."""
    lm = tiny_model(family, fused=True, vocab_size=258, max_position_embeddings=256, **overrides)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if name.endswith(("o_proj.weight", "out_proj.weight")):
                parameter[::4] *= 8
    lm.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_weight_only_methods_open_everywhere(name: str, checkpoint: Path, tmp_path: Path) -> None:
    report, logits = calibrate(checkpoint, tmp_path / "out", WEIGHT_ONLY[name])
    with torch.no_grad():
        assert torch.equal(pq.load(tmp_path / "out", kernels=False)(IDS).logits, logits)
        assert torch.equal(stock(tmp_path / "out")(IDS).logits, logits)
    assert report.cost is not None and not report.cost.operations
    assert report.cost.effective_bits == pytest.approx(3 + (16 + 3) / 16, rel=1e-6)


@pytest.mark.parametrize("name", ONLINE)
def test_matrices_that_do_not_fold_run_and_are_counted(name: str, checkpoint: Path, tmp_path: Path) -> None:
    report, logits = calibrate(checkpoint, tmp_path / "out", ONLINE[name])
    with torch.no_grad():
        assert torch.equal(pq.load(tmp_path / "out", kernels=False)(IDS).logits, logits)
    with pytest.raises(ValueError, match="needs plquant"):
        stock(tmp_path / "out")
    places = 2 if "dense" in name else 3  # after the norms; a pair of small factors before the last linear too
    assert report.cost is not None and report.cost.operations == 3 * places and report.cost.online_macs > 0
    assert report.cost.effective_bits > 3 + (16 + 3) / 16


@pytest.mark.parametrize("name", QUANTIZED_ACTIVATIONS)
def test_methods_with_quantized_activations(name: str, checkpoint: Path, tmp_path: Path) -> None:
    _, logits = calibrate(checkpoint, tmp_path / "out", QUANTIZED_ACTIVATIONS[name], activations=A4)
    loaded = pq.load(tmp_path / "out", kernels=False)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, logits)
        for module in loaded.modules():  # negative control: attention alone is left in floating point
            if isinstance(module, AttentionQuantizer):
                module.enabled = False
        assert not torch.equal(loaded(IDS).logits, logits)
    assert all(m.inputs is not None for m in loaded.modules() if isinstance(m, PackedLinear))


def test_clipped_ranges_of_activations_need_plquant(checkpoint: Path, tmp_path: Path) -> None:
    """Stock transformers would run W4A8 without attention, but not clip."""
    linears = ActivationGrid(8, kv=None)
    report, _ = calibrate(
        checkpoint, tmp_path / "plain", partial(pq.methods.Composed, parts=[LWC]), activations=linears
    )
    make = partial(pq.methods.Composed, parts=[LWC, ActivationClipping])
    clipped, _ = calibrate(checkpoint, tmp_path / "clipped", make, activations=linears)
    assert not clipped.opens_in_stock
    assert clipped.cost is not None and report.cost is not None
    assert clipped.cost.effective_bits > report.cost.effective_bits
    with pytest.raises(ValueError, match="needs plquant"):
        stock(tmp_path / "clipped")


@pytest.mark.parametrize(
    ("parts", "options", "reason"),
    [
        ([LWC, LET], {}, "not in the legal order"),
        ([LWC, LWC], {}, "two parts in one place"),
        ([Reassembly], {}, "for the sake of quantized activations"),
        ([AxisChoice], {"activations": A4}, "leave out --model.activations"),
        ([partial(Affine, online="dense"), Reassembly], {"activations": A4}, "leave out one of the two"),
        ([Rotation, Reassembly], {"activations": A4}, "leave norms and linears out"),
        ([partial(Rotation, places=["linears"]), Reassembly], {"activations": A4}, "leave norms and linears out"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(
    parts: list[Any], options: dict[str, Any], reason: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        calibrate(checkpoint, tmp_path / "out", partial(pq.methods.Composed, parts=parts), **options)
    assert not (tmp_path / "out").exists()


def test_an_axis_that_groups_do_not_divide_is_refused_before_the_run(tmp_path: Path) -> None:
    """One key-value head of 8 channels: groups of 16 run along the input of k, not along its output."""
    saved("llama_mqa", tmp_path / "model")
    with pytest.raises(ValueError, match=r"group_size=16 does not divide(?s:.)*[kv]_proj  out_features=8"):
        calibrate(tmp_path / "model", tmp_path / "out", pq.methods.AdaDim)
    assert not (tmp_path / "out").exists()


def test_condition_numbers_are_logged_and_reported(checkpoint: Path, tmp_path: Path) -> None:
    model = pq.QuantizedLM(str(checkpoint), pq.methods.AffineQuant, pq.IntGrid(3, 16))
    data = pq.data.BuiltinText(num_samples=4, seq_len=48, eval_seq_len=64, eval_windows=2)
    logger = CSVLogger(tmp_path / "log")
    trainer = pq.BlockwiseTrainer(max_epochs=2, accelerator="cpu", enable_progress_bar=False, logger=logger)
    report = trainer.calibrate(model, data, output_dir=str(tmp_path / "out"), evaluate=False)
    logger.save()
    (metrics,) = (tmp_path / "log").rglob("metrics.csv")
    rows = [row for row in csv.DictReader(metrics.open()) if row["condition number"]]
    logged = [float(row["condition number"]) for row in rows]
    assert len(rows) == 3 and all(1 <= number < 200 for number in logged) and max(logged) > 1.0001
    assert [float(row["block"]) for row in rows] == [0, 1, 2]
    kept = [None if b.rolled_back else number for b, number in zip(report.blocks, logged, strict=True)]
    assert any(kept) and [block.condition_number for block in report.blocks] == kept
    with open(tmp_path / "out" / "blocks.csv") as file:
        assert [float(row["condition_number"] or 0) for row in csv.DictReader(file)] == [n or 0 for n in kept]
    written = json.loads((tmp_path / "out" / "report.json").read_text())["blocks"]
    assert [block["condition_number"] for block in written] == kept
    said = [line for line in report.summary() if f"of all blocks' at most {max(n or 0 for n in kept):.1f}" in line]
    assert len(said) == 1 and "largest squared error" in said[0]


def test_methods_without_matrices_say_nothing_of_condition_numbers(checkpoint: Path, tmp_path: Path) -> None:
    report, _ = calibrate(checkpoint, tmp_path / "out", pq.methods.OmniQuant)
    assert all(block.condition_number is None for block in report.blocks)
    assert not any("condition" in line for line in report.summary())


def test_the_folder_a_run_is_written_to_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """As a name with "ada" in it does in the released code, which takes it for the choice of the axis."""
    for name, other in (("RTN", "AdaDim on RTN"), ("AdaDim on RTN", "RTN")):
        written = []
        for folder in (name, f"{other} ada"):
            calibrate(checkpoint, tmp_path / name / folder, WEIGHT_ONLY[name])
            written.append({path.name: path.read_bytes() for path in (tmp_path / name / folder).glob("*.safetensors")})
        assert written[0] == written[1] and written[0]


def test_blocks_fitted_together(checkpoint: Path, tmp_path: Path) -> None:
    """Three blocks in runs of two: the last run is shorter, and no block is left unquantized."""
    report, logits = calibrate(checkpoint, tmp_path / "out", pq.methods.QLLM, activations=A4, blocks_per_fit=2)
    assert [block.name for block in report.blocks] == ["model.layers.0-1", "model.layers.2"]
    assert sum(report.axes.values()) == 21 and report.unquantized == ["lm_head"]
    with torch.no_grad():
        assert torch.equal(pq.load(tmp_path / "out", kernels=False)(IDS).logits, logits)


# OPT-350m: norms behind the residual sum, embeddings narrower than the stream.
POST_NORM = {"do_layer_norm_before": False, "word_embed_proj_dim": 32}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in ("mixtral", "qwen2_moe", "qwen3_moe", "phi3", "gemma2", "gemma3")},
    **{family: (family, {}) for family in ("qwen2", "qwen3", "mistral", "llama_mqa", "opt", "stablelm")},
    "opt, norms last": ("opt", POST_NORM),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name: str, tmp_path: Path) -> None:
    """Experts, fused projections, norms of queries and keys, biases: all parts at once, saved, loaded and run."""
    family, overrides = OTHERS[name]
    checkpoint, method = saved(family, tmp_path / "model", **overrides), QUANTIZED_ACTIVATIONS["everything"]
    _, logits = calibrate(checkpoint, tmp_path / "out", method, activations=A4)
    with torch.no_grad():
        assert torch.equal(pq.load(tmp_path / "out", kernels=False)(IDS).logits, logits)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "AffineQuant") for name in ("mistral", "qwen2", "gemma2", "llama_mqa")),
        *((name, "AdaDim") for name in ("mistral", "qwen2", "gemma2", "llama_mqa", "opt, norms last", "phi3")),
    ],
)
def test_weights_of_other_architectures_open_everywhere(
    name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plquant.parts.axis.MARGIN", 0)  # random weights have no axis that is much better
    family, overrides = OTHERS[name]
    checkpoint = saved(family, tmp_path / "model", **overrides)
    group_size = 8 if family == "llama_mqa" else 16  # its one key head has 8 channels
    report, logits = calibrate(checkpoint, tmp_path / "out", WEIGHT_ONLY[method], group_size)
    with torch.no_grad():
        assert torch.equal(pq.load(tmp_path / "out", kernels=False)(IDS).logits, logits)
        assert torch.equal(stock(tmp_path / "out")(IDS).logits, logits)
    assert set(report.axes) == ({"in", "out"} if method == "AdaDim" else {"in"})


def test_stock_refuses_experts_it_would_fill_with_random_numbers(tmp_path: Path) -> None:
    report, logits = calibrate(saved("mixtral", tmp_path / "model"), tmp_path / "out", pq.methods.RTN)
    with torch.no_grad():
        assert torch.equal(pq.load(tmp_path / "out", kernels=False)(IDS).logits, logits)
    with pytest.raises(ValueError, match="needs plquant"):
        stock(tmp_path / "out")
    assert not report.opens_in_stock and "other loaders refuse" in report.card()


def test_experts_without_tokens_are_rounded_to_nearest_and_named(checkpoint: Path, tmp_path: Path) -> None:
    lm = tiny_model("mixtral", fused=True, vocab_size=258, max_position_embeddings=256)
    with torch.no_grad():  # all tokens choose the first experts
        for name, parameter in lm.named_parameters():
            if name.endswith("gate.weight"):
                parameter.zero_()
    lm.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
    method = partial(pq.methods.Composed, parts=[LET, LowRank, LWC])
    report, logits = calibrate(tmp_path / "model", tmp_path / "out", method)
    unseen = {name for block in report.blocks for name in block.unseen}
    assert unseen and all("experts" in name for name in unseen)
    assert any("no calibration token was sent to them" in line for line in report.summary())
    assert any("gate" in name for name in report.unquantized)
    with torch.no_grad():
        assert torch.equal(pq.load(tmp_path / "out", kernels=False)(IDS).logits, logits)
