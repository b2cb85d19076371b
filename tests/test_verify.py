"""A finished run can be checked afterwards: whatever is changed is found, and named."""

import json
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import plquant as pq
from plquant import ActivationGrid, IntGrid
from plquant.cli import main
from plquant.formats.checkpoint import INDEX, save_tensors
from plquant.manifest import MANIFEST
from plquant.nn.packed_linear import PackedLinear
from plquant.parts.rotation import Rotation
from plquant.quant.fake_quantize import quantize_weight
from plquant.verify import decoded, verify


def run(checkpoint: Path, out: Path, method: Any = pq.methods.RTN, **options: Any) -> Path:
    model = pq.QuantizedLM(str(checkpoint), method, **({"weights": IntGrid(3, 16)} | options))
    data = pq.data.BuiltinText(num_samples=4, seq_len=32, eval_seq_len=64, eval_windows=2)
    trainer = pq.BlockwiseTrainer(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    trainer.calibrate(model, data, output_dir=str(out), evaluate=False)
    return out


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(checkpoint, tmp_path_factory.mktemp("verify") / "out")


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return copytree(finished, tmp_path / "out")


def failed(folder: Path) -> dict[str, str]:
    return {check.name: check.found for check in verify(folder) if check.passed is False}


def status(folder: Path) -> Any:
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(folder)])
    return stop.value.code


def test_a_finished_run_passes_and_says_what_it_was_made_with(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(finished) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "21 quantized; in floating point: lm_head" in printed and "21 of 21 linears ran" in printed
    made = json.loads((finished / MANIFEST).read_text())["made"]
    assert made["recipe"]["seed"] == 0 and len(made["recipe"]["data"]["tokens_sha256"]) == 64
    assert made["versions"]["torch"] == torch.__version__ and made["machine"]["cpus"] and made["seconds"] > 0
    assert set(json.loads((finished / MANIFEST).read_text())["files"]) == {
        path.name for path in finished.iterdir() if path.name != MANIFEST
    }


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (pq.methods.OmniQuant, {"activations": ActivationGrid(4)}),
        (pq.methods.QLLM, {"activations": ActivationGrid(4)}),
        (partial(pq.methods.AffineQuant, online="kronecker"), {}),
        (pq.methods.Best, {"activations": ActivationGrid(4)}),
        (partial(pq.methods.Composed, parts=[partial(Rotation, places=["residual"])]), {}),
        (pq.methods.AdaDim, {"weights": IntGrid(5, 16, symmetric=True)}),
    ],
    ids=["offsets", "gathers", "matrices", "rotations", "rotated stream", "axes"],
)
def test_run_time_operations_and_axes_pass(
    method: Any, options: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    checks = verify(run(checkpoint, tmp_path / "out", method, **options))
    assert all(check.passed for check in checks), checks


def test_what_transforms_changed_before_rounding_is_judged(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(checkpoint, tmp_path / "out", pq.methods.OmniQuant, activations=ActivationGrid(4))
    measured = json.loads((out / MANIFEST).read_text())["made"]["equivalence"]
    assert set(measured) == {"model.layers.0", "model.layers.1", "model.layers.2"}
    assert all(0 <= error < 1e-12 for error in measured.values() if error is not None) and any(measured.values())
    monkeypatch.setattr("plquant.verify.EQUIVALENT", 1e-20)
    failed = [check for check in verify(out) if not check.passed]
    assert [check.name for check in failed] == ["transforms"] and "model.layers." in failed[0].found


def test_one_wrong_bit_in_any_file_fails_and_names_it(copied: Path) -> None:
    for path in sorted(copied.iterdir()):
        before = path.read_bytes()
        wrong = bytearray(before)
        wrong[len(wrong) // 2] ^= 16
        path.write_bytes(wrong)
        assert path.name in failed(copied)["files"]
        path.write_bytes(before)
    assert not failed(copied)


def test_one_wrong_bit_names_the_tensor(copied: Path) -> None:
    shard = copied / "model-block-001.safetensors"
    with safe_open(shard, "pt") as file:
        names = sorted(file.keys())
    name = next(name for name in names if name.endswith("q_proj.weight_packed"))
    tensors = load_file(shard)
    tensors[name].view(torch.uint8)[3, 5] ^= 1
    save_file(tensors, shard, {"format": "pt"})
    assert failed(copied)["files"] == f"{shard.name} is damaged: {name}"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "its header or length" in failed(copied)["files"]
    assert status(copied) == 1


def test_a_bit_that_was_lost_on_the_way_to_the_disk_names_the_tensor(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is whole, and its sha256 that of what was written; the block ran with other codes."""
    name = "model.layers.1.self_attn.q_proj.weight_packed"

    def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        wrong = {key: tensor ^ 1 if key == name else tensor for key, tensor in tensors.items()}
        save_tensors(path, wrong)

    monkeypatch.setattr("plquant.run_folder.save_tensors", save)
    assert failed(run(checkpoint, tmp_path / "out"))["files"] == f"model-block-001.safetensors is damaged: {name}"


def test_what_is_missing_or_foreign_is_named(copied: Path) -> None:
    (copied / "blocks.csv").unlink()
    save_file({"x": torch.ones(1)}, copied / "model-block-003.safetensors")
    assert failed(copied)["files"] == "blocks.csv is missing; model-block-003.safetensors is not the run's"


def test_what_is_no_finished_run_is_a_usage_error(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / INDEX).unlink()
    assert status(copied) == 2 and f"no {INDEX}" in capsys.readouterr().err
    assert status(copied / "nowhere") == 2
    with pytest.raises(SystemExit) as stop:
        main(["verify"])
    assert stop.value.code == 2


def certify_again(folder: Path, name: str) -> None:
    """As a run would have, had it written this file."""
    from plquant.files import sha256
    from plquant.manifest import read_manifest, tensor_checksums, write_manifest

    manifest = read_manifest(folder)
    files, tensors = manifest["files"] | {name: sha256(folder / name)}, manifest["tensors"]
    if name in tensors:
        tensors[name] = tensor_checksums(load_file(folder / name))
    write_manifest(folder, manifest["made"], files, tensors)


def test_a_linear_left_in_floating_point_fails(copied: Path) -> None:
    index = json.loads((copied / INDEX).read_text())
    name = "model.layers.1.mlp.up_proj"
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if k != f"{name}.weight_packed"}
    (copied / INDEX).write_text(json.dumps(index))
    certify_again(copied, INDEX)
    assert failed(copied)["linears"] == f"{name} is not quantized"


def test_a_size_that_was_not_foretold_fails(copied: Path) -> None:
    shard = copied / "model-rest.safetensors"
    tensors = load_file(shard)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, shard, {"format": "pt"})
    certify_again(copied, shard.name)
    assert set(failed(copied)) == {"size"} and "foretold" in failed(copied)["size"]


def test_a_run_time_that_decodes_wrongly_fails(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = PackedLinear.forward
    monkeypatch.setattr(
        PackedLinear, "forward", lambda self, x: forward(self, x) * (1.1 if self.out_features == 96 else 1)
    )
    assert "mlp" in failed(copied)["run time"]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    "grid", [{}, {"symmetric": True}, {"axis": "out"}, {"axis": "out", "symmetric": True}], ids=str
)
@pytest.mark.parametrize("group_size", [4, None])
def test_plain_arithmetic_decodes_every_grid(bits: int, grid: dict[str, Any], group_size: int | None) -> None:
    if group_size is None and grid.get("axis") == "out":
        return
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(bits))
    linear = PackedLinear(quantize_weight(weight, IntGrid(bits, group_size, **grid)))
    plain = decoded(dict(linear.named_buffers()), linear.grid, 12, 20)
    assert torch.equal(plain.float(), linear.quantized().dequantize())
