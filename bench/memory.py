"""Memory of a packed model: its weights on disk and loaded, and the peak while loading and generating.

    python bench/memory.py out/w4 --csv bench/results/memory_cpu.csv

Every way opens the model and continues a text in a process of its own:

    plquant     the packed folder
    bf16        the same weights dequantized, from a plain folder that is written for this
    NF4, int8   that folder through bitsandbytes, where it is installed
    torchao     that folder in its int4, where it is installed
    quanto      that folder in its int4, where it is installed

"weights" are parameters and buffers, each counted once; the peak is resident memory, less what the process had before
it opened the model. A table for people, the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MIB = 2**20


def resident(field: str) -> float:
    """MiB of this process: VmRSS, or VmHWM for the peak since ``forget_peak``."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """Start the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(way: str, folder: Path, prompt: int, new: int) -> dict[str, float]:
    """In a fresh process: sizes in MiB."""
    import torch

    import plquant
    from bench.ways import mebibytes, opened

    torch.set_num_threads(1)
    opened_nothing = resident("VmRSS")
    forget_peak()
    lm: Any = plquant.load(folder) if way == "plquant" else opened(way, folder)
    row = {"weights": mebibytes(lm), "peak_loading": resident("VmHWM") - opened_nothing}
    forget_peak()
    ids = torch.arange(prompt)[None] % 100 + 3
    lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False)
    row["peak_generating"] = resident("VmHWM") - opened_nothing
    return {name: round(value, 1) for name, value in row.items()}


def on_disk(folder: Path) -> float:
    """MiB of all tensors' files."""
    return round(sum(path.stat().st_size for path in folder.glob("*.safetensors")) / MIB, 1)


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of `plquant calibrate`, 16-bit activations")
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # this process is one way's
    options = parser.parse_args()
    sys.path[0] = str(Path(__file__).parent.parent)  # not this folder, which hides packages
    counts = (options.prompt_tokens, options.new_tokens)
    if options.one:
        print(json.dumps(measure(options.one, options.folder, *counts)))
        return
    from bench.rows import append, commit
    from bench.ways import PEERS, CannotRun, write_plain

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary) / "plain"
        try:
            write_plain(options.folder, plain)
        except CannotRun as reason:
            raise SystemExit(str(reason)) from None
        for way in ("bf16", "plquant", *PEERS):
            folder = options.folder if way == "plquant" else plain
            command = [sys.executable, __file__, str(folder), "--one", way]
            command += ["--prompt_tokens", str(counts[0]), "--new_tokens", str(counts[1])]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{way:8} does not run here: {done.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            row = {"way": way, "disk": on_disk(folder)} | json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            of_bf16 = row["weights"] / rows[0]["weights"]
            print("   ".join(f"{key} {value}" for key, value in row.items()), f"  ({of_bf16:.2f} of bf16)", flush=True)
    import torch

    where = {"model": f"{options.folder.parent.name}/{options.folder.name}", "prompt": counts[0], "new": counts[1]}
    where |= {"machine": platform.machine(), "torch": torch.__version__, "commit": commit()}
    if options.csv:
        append(options.csv, [where | row for row in rows])
    print(json.dumps(where | {"unit": "MiB", "results": rows}))


if __name__ == "__main__":
    main()
