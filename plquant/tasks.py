"""Accuracy on tasks, by lm-eval (the extra ``eval``): multiple-choice questions and what else it has."""

from __future__ import annotations

import difflib
import hashlib
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from plquant.bfloat16 import quick_products
from plquant.model import QuantizedLM

KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}  # ending -> builder of datasets


def load_tasks(
    model: QuantizedLM, names: str, folder: str | None = None, processes: int = 1
) -> tuple[dict[str, Any], dict[str, Any]]:
    """lm-eval's tasks with their data, so that what is missing shows before any long work.

    Args:
        model: The model that will answer.
        names: Names of lm-eval, or paths of its YAML files, separated by commas.
        folder: Of local data, one file for each task: ``piqa.jsonl``, ``piqa_validation.jsonl`` and so on, with the
            columns of the task's own data; ``None`` takes that from the hub.
        processes: Of the run; only one can answer.

    Returns:
        Name -> task; name -> where its data is from.

    Raises:
        ValueError: lm-eval is missing, does not know a task, or a task's data is not there.
    """
    if model.streaming:
        raise ValueError(f"--tasks={names} needs the whole model in memory; leave out --model.streaming")
    if processes > 1:
        raise ValueError(f"--tasks={names} is answered by one process; use --trainer.devices=1")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"--tasks={names} needs lm-eval: pip install 'plquant[eval]' ({error})") from error
    manager, made = TaskManager(), tempfile.TemporaryDirectory(prefix="plquant-tasks")
    tasks: dict[str, Any] = {}
    sources: dict[str, Any] = {}
    for name in filter(None, map(str.strip, names.split(","))):
        spec = name
        source: dict[str, Any] = {"data": "as lm-eval's task names it"}
        if name not in manager.all_tasks and not Path(name).is_file():
            close = ", ".join(difflib.get_close_matches(name, manager.all_tasks, 5)) or "`lm-eval ls tasks` lists them"
            raise ValueError(f"--tasks={name} is no task of lm-eval, nor a YAML file of one; close to it: {close}")
        if folder is not None:
            file = _file(folder, name)
            base = Path(name) if Path(name).is_file() else manager.task_index[name].yaml_path
            if base is None:
                raise ValueError(f"--tasks={name} is a group, which has no data of its own; name its tasks")
            spec = _local(name, base, file, Path(made.name))
            source = {"data": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        try:
            loaded = manager.load([spec])["tasks"]
        except Exception as error:  # whatever datasets raises: no network, no such column, a damaged file
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
            raise ValueError(
                f"--tasks={name}: its data can't be loaded ({said}); --task_data=FOLDER takes it from local files"
            ) from error
        tasks |= loaded
        sources |= dict.fromkeys(loaded, source)
    if not tasks:
        raise ValueError(f"--tasks={names} names no task; give some, such as --tasks=piqa,arc_easy")
    return tasks, sources


@torch.no_grad()
def measure(
    model: QuantizedLM,
    tasks: dict[str, Any],
    sources: dict[str, Any],
    device: torch.device,
    batch_size: int = 1,
    limit: int | None = None,
) -> dict[str, Any]:
    """Answer the tasks' questions.

    Args:
        model: The model.
        tasks: From ``load_tasks``.
        sources: Likewise.
        device: Where the model answers.
        batch_size: Questions in a forward pass.
        limit: Of each task take the first so many; ``None`` takes all.

    Returns:
        Name -> its figures, each with a standard error (``None`` where lm-eval has none), the number of questions and
        of shots, version and source of the data.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    lm: Any = nn.Module.to(model.lm, device)
    answering = HFLM(pretrained=lm, tokenizer=model.tokenizer, batch_size=batch_size)
    with quick_products(device):
        found = lm_eval.simple_evaluate(answering, tasks=list(tasks.values()), limit=limit, log_samples=False)
    return {
        name: {
            "figures": _figures(found["results"][name]),
            "questions": found["n-samples"][name]["effective"],
            "shots": found["n-shot"][name],
            "version": found["versions"][name],
            "lm_eval": lm_eval.__version__,
            **sources[name],
        }
        for name in tasks
    }


def lines(measured: dict[str, Any]) -> list[str]:
    """For the terminal, one for each figure."""
    return [
        f"{name}: {metric} {figure['value']:.4f}"
        + ("" if figure["standard_error"] is None else f" +- {figure['standard_error']:.4f}")
        + f" on {task['questions']} questions, {task['shots']} shots"
        for name, task in measured.items()
        for metric, figure in task["figures"].items()
    ]


def _figures(result: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Of lm-eval's ``acc,none`` and ``acc_stderr,none``."""
    figures: dict[str, dict[str, float | None]] = {}
    for key, value in result.items():
        metric, _, way = key.partition(",")
        if way and not metric.endswith("_stderr") and isinstance(value, float | int):
            error = result.get(f"{metric}_stderr,{way}")
            known = isinstance(error, float | int) and math.isfinite(error)
            name = metric if way == "none" else f"{metric} ({way})"
            figures[name] = {"value": float(value), "standard_error": float(error) if known else None}  # type: ignore[arg-type]
    return figures


def _file(folder: str, name: str) -> Path:
    """The task's file in the folder."""
    stem = Path(name).stem
    there = sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []
    exact = [path for path in there if path.suffix in KINDS and path.stem == stem]
    found = exact or [path for path in there if path.suffix in KINDS and path.stem.startswith(f"{stem}_")]
    if len(found) != 1:
        what, names = "several files" if found else "no file", ", ".join(path.name for path in found or there)
        raise ValueError(
            f"--task_data={folder} has {what} for {name}: {names or 'nothing'} is there; "
            f"name one {stem}.jsonl (or .json, .parquet, .csv)"
        )
    return found[0]


def _local(name: str, base: Path, file: Path, folder: Path) -> str:
    """A YAML file in the folder: the task with a file in the place of its own data."""
    spec = folder / f"{Path(name).stem}.yaml"
    own = {
        "include": str(base.absolute()),
        "task": Path(name).stem,
        "dataset_path": KINDS[file.suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(file.absolute())}},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
        "fewshot_split": None,
    }
    spec.write_text(yaml.safe_dump(own))
    return str(spec)
