"""A run that was interrupted goes on to the bits of one that was not, and with nothing but its own files."""

import json
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import plquant as pq
from plquant.formats.checkpoint import INDEX
from plquant.parts.clipping import LWC
from plquant.parts.learned_rounding import LearnedRounding
from plquant.parts.rotation import Rotation
from plquant.run_folder import RUNNING
from plquant.sign_sgd import SignSGD
from plquant.verify import verify

BLOCK_1 = "model-block-001.safetensors"


class Interrupt(L.Callback):
    """Stops the run in a block, after so many steps; the same for the record of the run whatever it is given."""

    block, step = 9, 0
    seen: ClassVar[list[int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        Interrupt.seen.append(trainer.global_step)
        if (pl_module.block.index, trainer.global_step) == (Interrupt.block, Interrupt.step):
            Interrupt.block = 9
            self.stop()

    def stop(self) -> None:
        raise RuntimeError("stop here")


def run(checkpoint: Path, out: Path, method: Any = pq.methods.OmniQuant, data: Any = None, **trainer: Any) -> None:
    L.seed_everything(0, verbose=False)
    activations = trainer.pop("activations", None)
    optimizer = trainer.pop("optimizer", None)
    model = pq.QuantizedLM(str(checkpoint), method, pq.IntGrid(3, 16), activations, optimizer=optimizer)
    data = pq.data.BuiltinText(num_samples=7, seq_len=32, batch_size=2) if data is None else data
    options = {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False} | trainer
    fitting = pq.BlockwiseTrainer(**options, callbacks=[Interrupt()])
    fitting.calibrate(model, data, output_dir=str(out), evaluate=False)


def count(job: Callable[[], Any]) -> int:
    Interrupt.seen.clear()
    job()
    return len(Interrupt.seen)


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


def test_a_block_of_an_earlier_version_goes_on(finished: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Its record lacks what was added since."""
    interrupt(2, 1, checkpoint, tmp_path)
    path = tmp_path / f"{BLOCK_1}.json"
    written_then = json.loads(path.read_text())
    del written_then["record"]["condition_number"]
    path.write_text(json.dumps(written_then))
    Interrupt.seen.clear()
    run(checkpoint, tmp_path)
    assert written(tmp_path) == written(finished)
    assert json.loads((tmp_path / "report.json").read_text())["blocks"][1]["condition_number"] is None
    assert len(Interrupt.seen) <= 12, "block 2 was calibrated again"


def test_another_text_under_the_same_name_does_not_go_on(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 40)

    def data() -> Any:
        return pq.data.FileText(str(text), num_samples=2, seq_len=32)

    interrupt(1, 1, checkpoint, tmp_path / "out", data=data())
    text.write_text("There is nothing either good or bad, but.. " * 40)
    with pytest.raises(ValueError, match=r"(?s)holds another run.*data.tokens_sha256: \w{64} there, \w{64} asked for"):
        run(checkpoint, tmp_path / "out", data=data())


METHODS: dict[str, Any] = {
    "AffineQuant": pq.methods.AffineQuant,  # bands that open, each with moments of its own
    "constant, aug_loss": partial(pq.methods.OmniQuant, schedule="constant", aug_loss=True, alpha="search"),
    "QLLM": partial(pq.methods.QLLM, lr=1e-2),
    "SignSGD": pq.methods.OmniQuant,  # the optimizer's own state
    "Best": pq.methods.Best,  # the start is set from the data
    "rotated stream": partial(  # and the whole model changed before
        pq.methods.Composed, parts=[partial(Rotation, places=["residual", "values"]), LWC, LearnedRounding]
    ),
}


# Of 12 steps, four to an epoch: inside the second epoch, where it begins, at the end
@pytest.mark.parametrize(
    ("name", "step"),
    [("AffineQuant", 7), ("constant, aug_loss", 5), ("QLLM", 12), ("SignSGD", 7), ("Best", 6), ("rotated stream", 6)],
)
def test_a_fit_goes_on_inside_a_block_to_the_same_bits(
    name: str, step: int, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"activations": pq.ActivationGrid(4)} if name in ("QLLM", "Best") else {}
    if name == "SignSGD":
        options["optimizer"] = partial(SignSGD, momentum=0.9)
    run(checkpoint, tmp_path / "whole", METHODS[name], **options)
    interrupt(1, step, checkpoint, tmp_path / "out", METHODS[name], checkpoint_every=1, **options)
    assert (tmp_path / "out" / RUNNING).exists()
    capsys.readouterr()
    steps = count(lambda: run(checkpoint, tmp_path / "out", METHODS[name], checkpoint_every=1, **options))
    kept = step - 1 if (step - 1) % 4 else step - 2  # none at the end of an epoch
    assert steps == 12 - kept + 12
    assert f"block 2: {RUNNING} is there, the fit goes on from it" in capsys.readouterr().out
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    assert not (tmp_path / "out" / RUNNING).exists() and all(check.passed for check in verify(tmp_path / "out"))


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def another_run(path: Path) -> None:
    head, _, content = path.read_bytes().partition(b"\n")
    path.write_bytes(json.dumps(json.loads(head) | {"run": "0" * 64}).encode() + b"\n" + content)


def pickled(path: Path) -> None:
    torch.save({"state_dict": {}}, path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(shorten, "its sha256 differs"), (another_run, "it is of another run"), (pickled, "it does not begin as")],
)
def test_a_checkpoint_that_is_not_this_blocks_is_said_and_never_loaded(
    change: Any,
    reason: str,
    finished: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt(0, 6, checkpoint, tmp_path, checkpoint_every=2)
    change(tmp_path / RUNNING)
    monkeypatch.setattr(torch, "load", None)
    run(checkpoint, tmp_path)
    assert f"{RUNNING} is not used, {reason}" in capsys.readouterr().out
    assert written(tmp_path) == written(finished)


def test_a_checkpoint_is_taken_without_a_word(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Lightning has one about an option that is left to it, for each."""
    with caplog.at_level("INFO", "lightning.pytorch"):
        run(checkpoint, tmp_path, checkpoint_every=2)
    assert "weights_only" not in caplog.text


def test_another_recipe_does_not_go_on_inside_a_block(checkpoint: Path, tmp_path: Path) -> None:
    interrupt(0, 3, checkpoint, tmp_path, checkpoint_every=1)
    with pytest.raises(ValueError, match=r"(?s)holds another run.*trainer.max_epochs: 3 there, 4 asked for"):
        run(checkpoint, tmp_path, max_epochs=4)


def killed(checkpoint: Path, out: Path, after: float | None = None) -> bool:
    """A process of its own runs until it is killed, after so many seconds or by itself; whether it was killed."""
    options = {"checkpoint_every": 1}
    child = multiprocessing.get_context("fork").Process(target=run, args=(checkpoint, out), kwargs=options)
    child.start()
    child.join(after)
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


def test_two_kills_inside_blocks_change_nothing(
    finished: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Interrupt, "stop", lambda self: os.kill(os.getpid(), signal.SIGKILL))
    for place in ((0, 7), (2, 3)):
        monkeypatch.setattr(Interrupt, "block", place[0])
        monkeypatch.setattr(Interrupt, "step", place[1])
        assert killed(checkpoint, tmp_path) and (tmp_path / RUNNING).exists()
    monkeypatch.setattr(Interrupt, "block", 9)
    assert count(lambda: run(checkpoint, tmp_path, checkpoint_every=1)) == 10
    assert written(tmp_path) == written(finished) and all(check.passed for check in verify(tmp_path))


@pytest.mark.slow
def test_ten_kills_at_any_moment_change_nothing(finished: Path, checkpoint: Path, tmp_path: Path) -> None:
    delays, longest, kills, out = random.Random(0), 1.0, 0, tmp_path / "out"
    while kills < 10:
        if killed(checkpoint, out, delays.uniform(0.1, longest)):
            kills += 1
            longest *= 1.2  # so that in the end some come as far as writing what is outside the blocks
        else:
            assert written(out) == written(finished)
            shutil.rmtree(out)
    if not (out / INDEX).exists():
        run(checkpoint, out, checkpoint_every=1)
    assert written(out) == written(finished) and all(check.passed for check in verify(out))
