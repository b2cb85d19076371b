"""Accuracy on tasks through lm-eval, from local files."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import plquant as pq
from plquant.cli import main
from plquant.tasks import load_tasks

SMALL = "--data BuiltinText --data.eval_seq_len 64 --data.eval_windows 2 --trainer.enable_progress_bar false".split()
QUESTIONS = [{"goal": f"count to {n}", "sol1": "one two three", "sol2": "blue", "label": n % 2} for n in range(12)]


def validate(checkpoint: Path, out: Path, *options: str) -> dict[str, Any]:
    main(["validate", "--model.checkpoint", str(checkpoint), "--result_file", str(out), *SMALL, *options])
    content: dict[str, Any] = json.loads(out.read_text())
    return content


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "piqa_validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return folder


def test_without_lm_eval_it_says_what_to_install(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(SystemExit, match=r"--tasks=piqa needs lm-eval: pip install 'plquant\[eval\]'"):
        validate(checkpoint, tmp_path / "result.json", "--tasks", "piqa")
    assert not (tmp_path / "result.json").exists()


def test_accuracy_with_its_standard_error(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    result = validate(checkpoint, tmp_path / "result.json", "--tasks", "piqa", "--task_data", str(data))
    piqa = result["tasks"]["piqa"]
    assert result["perplexity"] > 1 and piqa["questions"] == 12 and piqa["shots"] == 0
    assert piqa["data"] == "piqa_validation.jsonl" and len(piqa["sha256"]) == 64
    accuracy = piqa["figures"]["acc"]  # labels alternate, the answers do not: half of them are right
    assert accuracy["value"] == 0.5
    assert accuracy["standard_error"] == pytest.approx((0.25 / 11) ** 0.5)
    assert "piqa: acc 0.5000 +- 0.1508 on 12 questions, 0 shots" in capsys.readouterr().out
    limited = validate(
        *(checkpoint, tmp_path / "few.json", "--tasks", "piqa", "--task_data", str(data), "--task_limit", "4")
    )
    assert limited["tasks"]["piqa"]["questions"] == 4


def test_a_task_of_ones_own(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    task = tmp_path / "mine.yaml"
    task.write_text(
        f"""
task: mine
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data / "piqa_validation.jsonl"}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{goal}}}}"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list:
  - metric: acc
"""
    )
    result = validate(checkpoint, tmp_path / "result.json", "--tasks", str(task))
    assert result["tasks"]["mine"]["figures"]["acc"]["value"] == 0.5


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("piqqa", r"--tasks=piqqa is no task of lm-eval.*close to it: piqa"),
        ("arc_easy", r"has no file for arc_easy: piqa_validation.jsonl is there; name one arc_easy.jsonl"),
        (" , ", "names no task"),
    ],
)
def test_wrong_tasks_are_refused_by_name(names: str, message: str, data: Path, checkpoint: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match=message):
        load_tasks(pq.QuantizedLM(str(checkpoint), pq.methods.RTN), names, str(data))


def test_several_processes_and_streaming_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="answered by one process"):
        load_tasks(pq.QuantizedLM(str(checkpoint), pq.methods.RTN), "piqa", None, 2)
    with pytest.raises(ValueError, match="leave out --model.streaming"):
        load_tasks(pq.QuantizedLM(str(checkpoint), pq.methods.RTN, streaming=True), "piqa")
