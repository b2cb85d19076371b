"""One block in memory at a time gives what the whole model in memory gives."""

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file

import plquant as pq
from plquant.blocks.activations import _Samples
from plquant.blocks.stream_files import copy_of, empty_on_disk, pieces
from plquant.blocks.weights import is_away
from plquant.data import SelfGenerated
from plquant.parts.rotation import Rotation
from plquant.report import Report
from plquant.verify import verify
from tests.families import byte_tokenizer, tiny_model

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "mixtral": {},
    "gemma3": {},
    "opt": {},
}


def saved(family: str, folder: Path, **config: Any) -> Path:
    lm = tiny_model(family, fused=True, vocab_size=258, max_position_embeddings=256, num_hidden_layers=3, **config)
    lm.to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def run(
    model: Path,
    out: Path,
    streaming: bool,
    method: Any = None,
    evaluate: bool = True,
    callback: Any = None,
    trainer: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **options: Any,
) -> Report:
    L.seed_everything(0, verbose=False)
    method = partial(pq.methods.OmniQuant, let=True) if method is None else method
    options = {"weights": pq.IntGrid(3, 16)} | options
    lm = pq.QuantizedLM(str(model), method, streaming=streaming, **options)
    text = pq.data.BuiltinText(
        **({"num_samples": 4, "seq_len": 32, "eval_seq_len": 48, "eval_windows": 3} | (data or {}))
    )
    callbacks = [] if callback is None else [callback]
    options = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "callbacks": callbacks}
    Look.lm = lm
    return pq.BlockwiseTrainer(**options | (trainer or {})).calibrate(lm, text, output_dir=str(out), evaluate=evaluate)


class Look(L.Callback):
    """Notes which blocks have weights while one is fitted; interrupts the run in one of them."""

    lm: Any = None
    interrupt, seen = 9, {}  # noqa: RUF012

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        index = pl_module.block.index
        Look.seen[index] = [n for n, layer in enumerate(Look.lm.blocks.layers) if not is_away(layer)]
        if index == Look.interrupt:
            Look.interrupt = 9
            raise RuntimeError("stop here")


def written(folder: Path) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix == ".safetensors" or "config" in p.name
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_file_and_perplexity_is_the_same(family: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path / "model", **FAMILIES[family])
    whole, streamed = (run(model, tmp_path / name, name == "streamed") for name in ("whole", "streamed"))
    assert written(tmp_path / "whole") == written(tmp_path / "streamed")
    figures = [{name: result.windows for name, result in r.perplexities.items()} for r in (whole, streamed)]
    assert figures[0] == figures[1] and len(figures[0]) == 3
    assert whole.unquantized == streamed.unquantized and whole.cost == streamed.cost
    assert all(check.passed for check in verify(tmp_path / "streamed"))


def test_a_block_is_read_twice_and_once_for_an_evaluation(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read = pq.QuantizedLM._read_block
    monkeypatch.setattr(pq.QuantizedLM, "_read_block", lambda lm, number: reads.append(number) or read(lm, number))
    run(model, tmp_path / "out", streaming=True, evaluate=False)
    assert [reads.count(number) for number in (1, 2)] == [2, 2]
    reads.clear()
    run(model, tmp_path / "evaluated", streaming=True)  # the last of three evaluations reads what was written
    assert [reads.count(number) for number in (1, 2)] == [4, 4]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("streaming") / "model")


@pytest.fixture(scope="module")
def whole(model: Path) -> Path:
    run(model, model.parent / "whole", streaming=False, evaluate=False, callback=Look())
    return model.parent / "whole"


def test_one_block_has_weights_at_a_time_and_none_in_the_end(model: Path, whole: Path, tmp_path: Path) -> None:
    Look.seen = {}
    run(model, tmp_path / "out", streaming=True, evaluate=False, callback=Look())
    assert Look.seen == {0: [0], 1: [1], 2: [2]}
    assert all(is_away(layer) for layer in Look.lm.blocks.layers)
    assert written(tmp_path / "out") == written(whole)


@pytest.mark.parametrize("streamed_first", [True, False])
def test_it_goes_on_with_what_the_other_way_began(
    streamed_first: bool, model: Path, whole: Path, tmp_path: Path
) -> None:
    Look.interrupt = 1
    with pytest.raises(RuntimeError, match="stop here"):
        run(model, tmp_path / "out", streamed_first, evaluate=False, callback=Look())
    run(model, tmp_path / "out", not streamed_first, evaluate=False, callback=Look())
    assert written(tmp_path / "out") == written(whole)


def test_several_blocks_a_fit_and_quantized_activations(model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"blocks_per_fit": 2, "activations": pq.ActivationGrid(4), "method": pq.methods.Light}
    reports = [run(model, tmp_path / name, name == "streamed", **options) for name in ("whole", "streamed")]
    assert written(tmp_path / "whole") == written(tmp_path / "streamed")
    assert reports[0].perplexities[reports[0].title].nll == reports[1].perplexities[reports[1].title].nll


def test_perplexity_of_the_original(model: Path) -> None:
    data = pq.data.BuiltinText(eval_seq_len=48, eval_windows=3)
    trainer = pq.BlockwiseTrainer(accelerator="cpu", enable_progress_bar=False)
    nlls = [
        trainer._perplexity(pq.QuantizedLM(str(model), pq.methods.RTN, streaming=streaming), data).windows
        for streaming in (False, True)
    ]
    assert nlls[0] == nlls[1]


@pytest.mark.parametrize("damage", ["missing", "nan"])
def test_a_bad_last_block_is_refused_before_the_first_is_calibrated(damage: str, model: Path, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    shard = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    tensors[name][0, 0] = float("nan")
    if damage == "missing":
        del tensors[name]
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{'has no' if damage == 'missing' else 'NaN'}.*{name}"):
        run(folder, tmp_path / "out", streaming=True)
    assert not (tmp_path / "out").exists()


def test_what_needs_all_blocks_is_refused(model: Path, whole: Path, tmp_path: Path) -> None:
    composed = partial(pq.methods.Composed, parts=[partial(Rotation, places=["residual"])])
    with pytest.raises(ValueError, match=r"Rotation changes all blocks.*--model.streaming=true"):
        run(model, tmp_path / "out", streaming=True, method=composed)
    with pytest.raises(ValueError, match=r"--model.streaming=true.*is quantized"):
        pq.QuantizedLM(str(whole), pq.methods.RTN, streaming=True)
    lm = pq.QuantizedLM(str(model), pq.methods.RTN, streaming=True)
    with pytest.raises(ValueError, match=r"--data=SelfGenerated.*--model.streaming=true"):
        SelfGenerated(num_samples=1, seq_len=8).calibration_ids(lm)
    assert not (tmp_path / "out").exists()


def test_activations_on_disk_change_nothing(model: Path, whole: Path, tmp_path: Path) -> None:
    method = partial(pq.methods.OmniQuant, let=True, aug_loss=True)
    kept = [
        run(model, tmp_path / where, streaming=True, method=method, trainer={"activations": where})
        for where in ("memory", "disk")
    ]
    assert written(tmp_path / "memory") == written(tmp_path / "disk")
    assert [r.perplexities["RTN"].nll for r in kept][0] == kept[1].perplexities["RTN"].nll
    names = [{path.name for path in (tmp_path / where).iterdir()} for where in ("memory", "disk")]
    assert names[0] == names[1]


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_stream_in_a_file_is_in_memory_as_far_as_it_is_in_use(tmp_path: Path) -> None:
    shape, before, most = (64, 1024, 1024), resident(), 0  # 256 MiB
    x = empty_on_disk(tmp_path, shape, torch.float32)
    for number, piece in enumerate(pieces(x, 1)):
        piece.fill_(number)
        most = max(most, resident())
    y = copy_of(x)
    for number, row in enumerate(_Samples(x, y)[[n]] for n in range(64)):
        assert all(bool((tensor == number).all()) for tensor in row)
        most = max(most, resident())
    assert most - before < 64 * 2**20 and not list(tmp_path.iterdir())


def test_no_room_for_the_streams_is_said_before_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = 2**20  # more than the quantized model
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=output))
    run(model, tmp_path / "memory", streaming=True, method=pq.methods.RTN, evaluate=False)
    samples = {"num_samples": 64, "seq_len": 128}  # 2 streams of 64 channels in bf16
    with pytest.raises(OSError, match="GiB"):
        run(model, tmp_path / "disk", True, pq.methods.RTN, trainer={"activations": "disk"}, data=samples)
    assert not (tmp_path / "disk").exists()
