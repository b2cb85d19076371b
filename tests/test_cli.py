"""The command line: help, configuration, and what a user is told when something is wrong."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import plquant as pq
from plquant.cli import COMMANDS, main
from plquant.lightning_cli import PlquantCLI, with_class_names

SMALL = (
    "--data BuiltinText --data.num_samples 4 --data.seq_len 32 --data.eval_seq_len 64 --data.eval_windows 2 "
    "--model.weights.group_size 16 --trainer.max_epochs 1 --trainer.accelerator cpu --trainer.enable_progress_bar false"
).split()


def calibrate(checkpoint: Path, out: Path, *options: str) -> None:
    code = main(["calibrate", "--model.checkpoint", str(checkpoint), "--output_dir", str(out), *SMALL, *options])
    assert code is None  # the console script exits with what main returns


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = "import sys, plquant.cli as c; c.main(['--help']); assert not {'torch', 'lightning'} & {*sys.modules}"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert time.monotonic() - start < 3
    assert all(command in done.stdout for command in COMMANDS)


def test_commands_are_those_of_the_trainer() -> None:
    ours = set(PlquantCLI.subcommands())  # the others have parsers of their own
    assert ours == {*COMMANDS} - {"verify", "generate", "tune"}
    assert all(hasattr(pq.BlockwiseTrainer, name) for name in ours)
    with pytest.raises(SystemExit, match="'calibrat' is not a command; there are calibrate, validate"):
        main(["calibrat"])


@pytest.mark.parametrize("given", [["--model.method", "gptq"], ["--model.method=gptq"], ["--model.method", "GPTQ"]])
def test_methods_may_be_named_in_lower_case(
    given: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        calibrate(checkpoint, tmp_path / "out", *given, "--model.method.damp", "0.25", "--print_config")
    printed = capsys.readouterr().out
    assert "class_path: plquant.methods.GPTQ" in printed and "damp: 0.25" in printed
    assert with_class_names(["--output_dir", "best", "--model.method=qllm"]) == [
        *("--output_dir", "best", "--model.method=QLLM")
    ]


def test_help_of_a_method_is_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", "--model.method.help", "OmniQuant"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--model.method.lwc_lr" in text and "Learning rate of the clipping strengths (logits)." in text


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["calibrate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for sentence in ("Width of a code, 2 to 8.", "Hub id, folder, .gguf file", "Passes over the calibration samples"):
        assert sentence in text


def test_printed_config_runs_again(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        calibrate(checkpoint, tmp_path / "out", "--model.method.let_lr", "0.25", "--print_config")
    config = tmp_path / "run.yaml"
    config.write_text(capsys.readouterr().out)
    assert "let_lr: 0.25" in config.read_text()
    main(["calibrate", "-c", str(config)])
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["method"]["let_lr"] == 0.25


def test_defaults_alone_work(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main(
        ["calibrate", "--model.checkpoint", str(checkpoint), "--output_dir", str(out), "--trainer.fast_dev_run", "true"]
    )
    first = next(line for line in capsys.readouterr().out.splitlines() if "linear layers" in line)
    assert first.startswith("OmniQuant W4A16 g32 (group_size: auto): 21 linear layers")


def test_callbacks_and_loggers_in_yaml(checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "extra.yaml"
    config.write_text(f"""
trainer:
  max_epochs: 4
  log_every_n_steps: 1
  callbacks:
    - class_path: lightning.pytorch.callbacks.EarlyStopping
      init_args: {{monitor: loss, patience: 1, min_delta: 100.0}}
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {{save_dir: {tmp_path}, name: logs, version: v0}}
""")
    calibrate(checkpoint, tmp_path / "out", "-c", str(config), "--trainer.max_epochs", "4", "--evaluate", "false")
    rows = (tmp_path / "logs" / "v0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("block")
    blocks = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert blocks == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]  # each block stops by itself, after its second epoch


def test_validate_writes_the_protocol_and_compares(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate(checkpoint, tmp_path / "out", "--evaluate", "false")
    text = tmp_path / "text.txt"
    text.write_text("There is nothing either good or bad, but thinking makes it so. " * 10)
    data = [
        "--data",
        "FileText",
        "--data.files",
        str(text),
        "--data.eval_seq_len",
        "64",
        "--trainer.accelerator",
        "cpu",
    ]

    def validate(model: Path, result: Path, *options: str) -> dict[str, Any]:
        main(["validate", "--model.checkpoint", str(model), "--result_file", str(result), *data, *options])
        return json.loads(result.read_text())

    full = validate(checkpoint, tmp_path / "full.json")
    assert full["protocol"]["windows"] == 9 and full["protocol"]["window_length"] == 64
    quantized = validate(tmp_path / "out", tmp_path / "q.json", "--baseline", str(tmp_path / "full.json"))
    assert quantized["perplexity"] != full["perplexity"]
    assert f"{quantized['perplexity'] / full['perplexity']:.4f} times that of {checkpoint}" in capsys.readouterr().out
    text.write_text("Something else entirely, to be or not to be. " * 20)
    with pytest.raises(SystemExit, match=r"(?s)different protocols.*text_sha256"):
        validate(tmp_path / "out", tmp_path / "other.json", "--baseline", str(tmp_path / "full.json"))


def bert(folder: Path) -> str:
    from transformers import BertConfig

    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(folder / "bert")
    return str(folder / "bert")


def empty_text(folder: Path) -> str:
    (folder / "empty.txt").write_text(" \n")
    return str(folder / "empty.txt")


def ids_file(folder: Path) -> str:
    save_file(
        {"calibration_ids": torch.full((2, 8), 9999), "evaluation_ids": torch.zeros(2, 8, dtype=torch.int64)},
        folder / "i.safetensors",
    )
    return str(folder / "i.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model.weights.bitts 3", "bitts"),
        ("--trianer.max_epochs 3", "trianer.max_epochs"),
        ("--model.weights.bits 9", "--model.weights.bits=9 .* choose 2 to 8"),
        (
            "--model.weights.group_size 48",
            "(?s)--model.weights.group_size=48 does not divide .*self_attn.q_proj.*32, 16, 8",
        ),
        ("--model.weights.group_size 0", "--model.weights.group_size=0"),
        ("--model.method OmniQuantt", "OmniQuantt"),
        ("--model.method OmniQuant --model.method.lwc false --model.method.let false", "leaves nothing to learn"),
        ("--data FileText --data.files {empty}", "empty.txt"),
        ("--data FileText --data.files /nowhere/*.txt", "/nowhere"),
        ("--data.num_samples 100000", "--data.num_samples=100000 .* tokens, but"),
        (
            "--data TokenIds --data.file {ids} --data.num_samples null --data.seq_len null --data.eval_seq_len null",
            "9999",
        ),
        ("--model.checkpoint /nowhere/model", "--model.checkpoint=/nowhere/model: no such checkpoint; give"),
        ("--model.checkpoint package:llm_none/x.gguf", "no package 'llm_none' is installed"),
        ("--model.checkpoint {bert}", "BertForMaskedLM, which is not a causal language model"),
        ("--trainer.precision 16-mixed", "--trainer.precision=16-mixed.*use bf16-mixed or 32-true"),
    ],
)
def test_bad_input_is_refused_before_the_work_and_leaves_nothing(
    options: str,
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_weights(*args: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("plquant.sources.Source.load", no_weights)
    made = {"empty": empty_text, "bert": bert, "ids": ids_file}
    for name, make in made.items():
        options = options.replace(f"{{{name}}}", make(tmp_path)) if f"{{{name}}}" in options else options
    with pytest.raises(SystemExit) as stop:
        calibrate(checkpoint, tmp_path / "out", *options.split())
    said = f"{stop.value.code}\n{capsys.readouterr().err}"
    assert re.search(message, said), said
    assert stop.value.code not in (0, None)
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_not_quantized_again(checkpoint: Path, tmp_path: Path) -> None:
    calibrate(checkpoint, tmp_path / "out", "--evaluate", "false")
    with pytest.raises(SystemExit, match="is quantized already; give the original model"):
        calibrate(tmp_path / "out", tmp_path / "twice")


def test_part_of_the_text_is_no_perplexity(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="63 of 126 tokens were measured.*--trainer.limit_val_batches"):
        calibrate(checkpoint, tmp_path / "out", "--trainer.limit_val_batches", "1")


def test_options_of_a_default_do_not_reach_the_class_chosen_instead(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """BuiltinText's number of samples is no option of a file of ids."""
    ids = tmp_path / "ids.safetensors"
    save_file({"calibration_ids": torch.ones(3, 16).int(), "evaluation_ids": torch.ones(2, 16).int()}, ids)
    command = ["calibrate", "--model.checkpoint", str(checkpoint), "--print_config"]
    for chosen in (["--data", "TokenIds"], ["--data=TokenIds"]):
        with pytest.raises(SystemExit):
            main([*command, *chosen, "--data.file", str(ids)])
        assert "num_samples: null" in capsys.readouterr().out
    config = tmp_path / "run.yaml"
    config.write_text(f"data:\n  class_path: TokenIds\n  init_args: {{file: {ids}}}\n")
    for flag in (["-c", str(config)], ["--config", str(config)], [f"--config={config}"]):
        with pytest.raises(SystemExit):
            main([*command, *flag])
        text = capsys.readouterr().out
        assert "num_samples: null" in text and "OmniQuant" in text


def test_parts_are_listed_in_yaml(checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "parts.yaml"
    config.write_text(
        "model:\n  method:\n    class_path: Composed\n    init_args:\n      parts:\n"
        "      - {class_path: LET, init_args: {lr: 0.02, alpha: search}}\n      - class_path: LWC\n"
    )
    calibrate(checkpoint, tmp_path / "out", "-c", str(config))
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())["method"]
    assert recipe["parts"] == [
        {"class": "LET", "lr": 0.02, "alpha": "search", "shift": True},
        {"class": "LWC", "lr": 0.1, "init": 4.0},
    ]
    config.write_text("model: {method: {class_path: Composed, init_args: {parts: [LWC, LET]}}}\n")
    with pytest.raises(SystemExit, match=r"LWC \(clipping\) -> LET \(scale and shift\) is not in the legal order"):
        calibrate(checkpoint, tmp_path / "other", "-c", str(config))
