"""Scales tuned end to end: the codes stay, and the result is never worse on what is held out."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

import plquant as pq
from plquant import ActivationGrid, IntGrid
from plquant.bfloat16 import quick_products
from plquant.cli import main
from plquant.nn.packed_linear import PackedLinear
from plquant.nn.tuned_linear import TunedLinear
from plquant.quant.fake_quantize import quantize_weight
from plquant.tuning import tune
from plquant.verify import verify

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "asymmetric": (pq.methods.RTN, {"weights": IntGrid(2, 16)}),
    "symmetric": (pq.methods.RTN, {"weights": IntGrid(3, 16, symmetric=True)}),
    "per input channel": (pq.methods.RTN, {"weights": IntGrid(2, 16, axis="out")}),
    "activations": (pq.methods.RTN, {"weights": IntGrid(3, None), "activations": ActivationGrid(4)}),
    "rotated": (partial(pq.methods.Light), {"weights": IntGrid(2, 16)}),
}


def run(checkpoint: Path, out: Path, method: Any = pq.methods.RTN, **options: Any) -> Path:
    model = pq.QuantizedLM(str(checkpoint), method, **({"weights": IntGrid(2, 16)} | options))
    data = pq.data.BuiltinText(num_samples=4, seq_len=32, eval_seq_len=64, eval_windows=2)
    trainer = pq.BlockwiseTrainer(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    trainer.calibrate(model, data, output_dir=str(out), evaluate=False)
    return out


def tuned(folder: Path, out: Path, epochs: int = 3, **options: Any) -> Any:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    L.seed_everything(0, verbose=False)
    data = pq.data.BuiltinText(num_samples=16, seq_len=32, batch_size=4)
    return tune(folder, data, trainer, out, **({"lr": 5e-3} | options))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for shard in folder.glob("*.safetensors") for name, t in load_file(shard).items()}


@pytest.mark.parametrize(("case", "loss"), [*((case, "kl") for case in CASES), ("asymmetric", "lm")])
def test_only_scales_change_and_the_loss_falls(case: str, loss: str, checkpoint: Path, tmp_path: Path) -> None:
    method, options = CASES[case]
    folder = run(checkpoint, tmp_path / "out", method, **options)
    done = tuned(folder, tmp_path / "new", loss=loss)
    assert done.after < done.before and done.best_epoch > 0
    before, after = tensors(folder), tensors(tmp_path / "new")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith(".weight_scale") for name in changed)
    assert all(after[name].dtype == before[name].dtype and (after[name] > 0).all() for name in changed)
    checks = verify(tmp_path / "new")
    assert all(check.passed for check in checks), checks


def test_what_was_trained_is_what_is_written(checkpoint: Path, tmp_path: Path) -> None:
    from plquant.tuning import ScaleTuning

    folder = run(checkpoint, tmp_path / "out")
    done = tuned(folder, tmp_path / "new", loss="lm")
    ids = pq.data.BuiltinText(num_samples=16, seq_len=32).calibration_ids(pq.QuantizedLM(str(checkpoint), None))  # type: ignore[arg-type]
    module = ScaleTuning(pq.load(tmp_path / "new", kernels=False), None, 1e-3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), quick_products(ids.device):
        assert float(module.loss(ids[: done.windows[1]])) == pytest.approx(done.after, abs=1e-6)


@pytest.mark.parametrize("rate", [1e3, 0.5])
def test_it_is_never_worse_than_before(rate: float, checkpoint: Path, tmp_path: Path) -> None:
    folder = run(checkpoint, tmp_path / "out", weights=IntGrid(8, 16))
    done = tuned(folder, tmp_path / "new", epochs=1, lr=rate)
    assert done.after == done.before and done.best_epoch == 0
    before, after = tensors(folder), tensors(tmp_path / "new")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(check.passed for check in verify(tmp_path / "new"))


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_the_dequantized_weight(axis: Any, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = quantize_weight(torch.randn(32, 64, generator=generator), IntGrid(3, 16, symmetric, axis))
    bias = torch.randn(32, generator=generator)
    linear = TunedLinear(PackedLinear(weight, bias))
    x = torch.randn(2, 5, 64, generator=generator, requires_grad=True)
    down = torch.randn(2, 5, 32, generator=generator)
    y = linear(x)
    torch.testing.assert_close(y, linear.packed(x.detach()), rtol=0, atol=0)
    ours = torch.autograd.grad(y, [x, linear.log_change], down)
    change = torch.zeros_like(linear.log_change, requires_grad=True)
    plain = pq.quant.affine.QTensor(weight.codes, weight.scale * change.exp(), weight.zero_point, weight.grid)
    expected = torch.autograd.grad(x @ plain.dequantize().t() + bias, [x, change], down)
    torch.testing.assert_close(ours, expected)


def test_command_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, new = run(checkpoint, tmp_path / "out"), tmp_path / "new"
    small = "--data.num_samples 8 --data.seq_len 32 --trainer.accelerator cpu --trainer.enable_progress_bar false"
    main(["tune", str(folder), "--output_dir", str(new), "--trainer.max_epochs", "1", "--lr", "0.02", *small.split()])
    printed = capsys.readouterr().out
    assert "Scales tuned for 1 epochs on 7 windows" in printed and "note: these are the windows" not in printed
    recorded = json.loads((new / "tuned.json").read_text())
    assert recorded["teacher"] == str(checkpoint) and len(recorded["losses"]) == 1
    assert json.loads((new / "manifest.json").read_text())["made"]["tuned"] == recorded
    assert "Tuned end to end" in (new / "README.md").read_text()
    assert not [path for path in tmp_path.iterdir() if path.name not in ("out", "new")]


def test_it_says_so_where_the_run_was_calibrated_on_these_windows(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(checkpoint, tmp_path / "out")
    small = "--data BuiltinText --data.num_samples 4 --data.seq_len 32 --trainer.max_epochs 1".split()
    main(["tune", str(folder), "--output_dir", str(tmp_path / "new"), *small])
    assert "note: these are the windows that the run was calibrated on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "0"], "--lr=0.0 is not a learning rate"),
        (["--held_out", "1.5"], "--held_out=1.5 is not a share"),
        (["--held_out", "0.99"], "leaves none to train on"),
        (["--output_dir", "."], "is there already"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = run(checkpoint, tmp_path / "out")
    given = ["--output_dir", str(tmp_path / "new"), "--data.num_samples", "4", "--data.seq_len", "32", *options]
    with pytest.raises(SystemExit, match=message):
        main(["tune", str(folder), *given])


def test_a_damaged_or_foreign_folder_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="give the output folder of a finished run"):
        main(["tune", str(checkpoint), "--output_dir", str(tmp_path / "new")])
    folder = run(checkpoint, tmp_path / "out")
    shard = folder / "model-block-000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(SystemExit, match="is damaged: model-block-000"):
        main(["tune", str(folder), "--output_dir", str(tmp_path / "new")])
