"""The output folder of a run: killed or out of room at any write it goes on, and what is not its own is left alone."""

import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import plquant as pq
from plquant.formats.checkpoint import INDEX, REST
from plquant.manifest import MANIFEST
from plquant.run_folder import RECIPE, RunFolder
from plquant.verify import verify
from tests.test_resume import written

BLOCK_1 = "model-block-001.safetensors"


def run(checkpoint: Path, out: Path, method: Any = pq.methods.RTN, **trainer: Any) -> None:
    L.seed_everything(0, verbose=False)
    model = pq.QuantizedLM(str(checkpoint), method, pq.IntGrid(3, 16))
    data = pq.data.BuiltinText(num_samples=2, seq_len=32)
    options = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False} | trainer
    fitting = pq.BlockwiseTrainer(**options)
    fitting.run_config = "yaml"
    fitting.calibrate(model, data, output_dir=str(out), evaluate=False)


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("folder") / "out"
    run(checkpoint, out)
    return out


def in_a_process(job: Callable[[], Any], log: Path) -> int | None:
    """Exit code of a process of its own; what it raised is in the log."""

    def logged() -> None:
        try:
            job()
        except Exception as error:
            log.write_text(f"{type(error).__name__}: {error}")
            os._exit(1)

    child = multiprocessing.get_context("fork").Process(target=logged)
    child.start()
    child.join()
    return child.exitcode


def dies_at(name: str, half_written: bool) -> None:
    """This process is killed where a file of this name is finished: what is there of it is half, or all."""
    replace = os.replace

    def kill(source: Any, target: Any) -> None:
        if Path(target).name != name:
            return replace(source, target)
        if half_written:
            os.truncate(source, os.path.getsize(source) // 2)
        else:
            replace(source, target)
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = kill


ALL = sorted({RECIPE, "config.yaml", "model-block-000.safetensors", "model-block-000.safetensors.json", BLOCK_1})
ALL += [f"{BLOCK_1}.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", REST]
ALL += ["report.json", "blocks.csv", "README.md", "blocks.png", MANIFEST, INDEX]
SOME = (RECIPE, BLOCK_1, MANIFEST)


@pytest.mark.parametrize("half_written", [True, False])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SOME else pytest.mark.slow) for n in ALL])
def test_a_kill_where_a_file_is_written_changes_nothing(
    name: str, half_written: bool, finished: Path, checkpoint: Path, tmp_path: Path
) -> None:
    def dying() -> None:
        dies_at(name, half_written)
        run(checkpoint, tmp_path / "out")

    assert in_a_process(dying, tmp_path / "log") == -signal.SIGKILL
    if name == INDEX and not half_written:
        with pytest.raises(ValueError, match="holds the finished run"):
            run(checkpoint, tmp_path / "out")
    else:
        run(checkpoint, tmp_path / "out")
    assert written(tmp_path / "out") == written(finished) and all(check.passed for check in verify(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.partial"))


def room_ends_at(owner: Any, name: str, limit: int) -> None:
    """From a call of this on no file of this process may grow longer: what a full disk says, for one user alone."""
    original = getattr(owner, name)

    def limited(*args: Any, **kwargs: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return original(*args, **kwargs)

    setattr(owner, name, limited)


@pytest.mark.parametrize(
    ("owner", "call", "limit", "method", "file"),
    [
        (RunFolder, "write_block", 5000, pq.methods.RTN, "model-block-000.safetensors"),  # by safetensors
        (pq.BlockwiseTrainer, "_fit", 5000, pq.methods.OmniQuant, "model-block-running.ckpt"),  # inside a fit
        (pq.QuantizedLM, "save_rest", 4000, pq.methods.RTN, ""),  # by tokenizers
        (RunFolder, "finish", 4000, pq.methods.RTN, MANIFEST),
    ],
    ids=["block", "checkpoint", "tokenizer", "manifest"],
)
def test_no_room_left_is_said_and_the_run_goes_on(
    owner: Any, call: str, limit: int, method: Any, file: str, checkpoint: Path, tmp_path: Path
) -> None:
    def runs_out() -> None:
        room_ends_at(owner, call, limit)
        run(checkpoint, tmp_path / "out", method, checkpoint_every=1)

    assert in_a_process(runs_out, tmp_path / "log") == 1
    said = (tmp_path / "log").read_text()
    assert said.startswith(f"OSError: {tmp_path / 'out' / file} could not be written: File too large. What was finishe")
    assert not list((tmp_path / "out").glob("*.partial")) and not (tmp_path / "out" / INDEX).exists()
    run(checkpoint, tmp_path / "out", method, checkpoint_every=1)
    run(checkpoint, tmp_path / "whole", method, checkpoint_every=1)
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    assert all(check.passed for check in verify(tmp_path / "out"))


def test_what_others_put_there_is_left_alone(finished: Path, checkpoint: Path, tmp_path: Path) -> None:
    """A log beside the results, as one may well keep it, and loggers with folders of their own."""
    RunFolder(tmp_path, {}).create()
    (tmp_path / "run.log").write_text("mine")
    (tmp_path / "lightning_logs" / "version_0").mkdir(parents=True)
    (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").write_text("mine")
    run(checkpoint, tmp_path)
    assert written(tmp_path) == written(finished) and all(check.passed for check in verify(tmp_path))
    certified = json.loads((tmp_path / MANIFEST).read_text())["files"]
    assert "run.log" not in certified and (tmp_path / "run.log").read_text() == "mine"


def test_tensors_of_others_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    RunFolder(tmp_path, {}).create()
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"--output_dir=.* holds model.safetensors, that no run wrote; take it out"):
        run(checkpoint, tmp_path)


def test_a_damaged_recipe_is_said(checkpoint: Path, tmp_path: Path) -> None:
    assert in_a_process(lambda: (dies_at(BLOCK_1, False), run(checkpoint, tmp_path / "out")), tmp_path / "log") == -9
    path = tmp_path / "out" / RECIPE
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"--output_dir=.*recipe.json is damaged"):
        run(checkpoint, tmp_path / "out")


def test_other_weights_under_the_same_name_do_not_go_on(checkpoint: Path, tmp_path: Path) -> None:
    lm = load_file(checkpoint / "model.safetensors")
    model = tmp_path / "model"
    model.mkdir()
    for path in checkpoint.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    assert in_a_process(lambda: (dies_at(BLOCK_1, False), run(model, tmp_path / "out")), tmp_path / "log") == -9
    lm["model.layers.2.mlp.up_proj.weight"][3, 4] += 1
    save_file(lm, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"(?s)holds another run.*model.weights_sha256: \w{64} there, \w{64} asked"):
        run(model, tmp_path / "out")


def test_files_in_folders_of_the_tokenizer_are_certified(checkpoint: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in checkpoint.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(model)
    run(model, tmp_path / "out")
    template = "additional_chat_templates/tools.jinja"
    assert (tmp_path / "out" / template).read_text() == "{{ tools }}" and verify(tmp_path / "out")[0].passed
    (tmp_path / "out" / template).write_text("{{ tool }}")
    assert verify(tmp_path / "out")[0].found == f"{template} is damaged"
