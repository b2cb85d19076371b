"""A run that was interrupted goes on to the bits of one that was not, and with nothing but its own files."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import plquant as pq
from plquant.verify import verify

BLOCK_1 = "model-block-001.safetensors"


class Interrupt(L.Callback):
    """Stops the run in a block, after so many steps; the same for the record of the run whatever it is given."""

    block, step = 9, 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if (pl_module.block.index, trainer.global_step) == (Interrupt.block, Interrupt.step):
            Interrupt.block = 9
            raise RuntimeError("stop here")


def run(checkpoint: Path, out: Path, method: Any = pq.methods.OmniQuant, data: Any = None, **trainer: Any) -> None:
    L.seed_everything(0, verbose=False)
    model = pq.QuantizedLM(str(checkpoint), method, pq.IntGrid(3, 16))
    data = pq.data.BuiltinText(num_samples=6, seq_len=48, batch_size=1) if data is None else data
    options = {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False} | trainer
    fitting = pq.BlockwiseTrainer(**options, callbacks=[Interrupt()])
    fitting.calibrate(model, data, output_dir=str(out), evaluate=False)


def interrupt(block: int, step: int, checkpoint: Path, out: Path, *args: Any, **options: Any) -> None:
    Interrupt.block, Interrupt.step = block, step
    with pytest.raises(RuntimeError, match="stop here"):
        run(checkpoint, out, *args, **options)


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("resume") / "out"
    run(checkpoint, out)
    return out


def truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-100])


def exchange(shard: Path) -> None:
    tensors: dict[str, Tensor] = {name: torch.zeros_like(tensor) for name, tensor in load_file(shard).items()}
    save_file(tensors, shard, {"format": "pt"})


def lose_its_record(shard: Path) -> None:
    shard.with_name(f"{shard.name}.json").write_text("{")


@pytest.mark.parametrize("damage", [truncate, exchange, lose_its_record])
def test_a_damaged_block_is_said_and_calibrated_again(
    damage: Any, finished: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(2, 1, checkpoint, tmp_path)
    damage(tmp_path / BLOCK_1)
    run(checkpoint, tmp_path)
    said = capsys.readouterr().out
    assert BLOCK_1 in said and "block 2 and those after it are calibrated again" in said
    assert written(tmp_path) == written(finished)
    assert all(check.passed for check in verify(tmp_path))


def test_another_text_under_the_same_name_does_not_go_on(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 40)

    def data() -> Any:
        return pq.data.FileText(str(text), num_samples=2, seq_len=32)

    interrupt(1, 1, checkpoint, tmp_path / "out", data=data())
    text.write_text("There is nothing either good or bad, but.. " * 40)
    with pytest.raises(ValueError, match=r"(?s)holds another run.*data.tokens_sha256: \w{64} there, \w{64} asked for"):
        run(checkpoint, tmp_path / "out", data=data())
