"""Memory and time of a calibration against the number of blocks and of samples, in processes of their own.

    python bench/scale.py
    python bench/scale.py --shape llama-2-7b --blocks 4 8 32 --samples 2 --seq_len 256 --method RTN --folder /mnt/big

Writes Llama-shaped checkpoints of random weights, tensor by tensor, runs `plquant calibrate` on each and reads the
greatest resident memory and the time of the process. A table for people, the last line is JSON; rows are appended
to bench/results/scale.csv, and a plot is written beside it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.rows import append, commit

SHAPES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "vocab_size": 4096},
    "medium": {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "vocab_size": 8192},
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000},
}
RESULTS = Path(__file__).parent / "results"


def write_checkpoint(folder: Path, shape: str, blocks: int) -> None:
    """A checkpoint in bf16, a shard for each block; no more than one shard is in memory."""
    complete, folder = folder, folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = LlamaConfig(**SHAPES[shape], num_hidden_layers=blocks, tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(name.partition(".layers.")[2].partition(".")[0] or name, []).append(name)
    generator, total = torch.Generator().manual_seed(0), 0
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups.values()):
        shard = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: random_weight(shapes[name], generator) for name in names}
        save_file(tensors, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    folder.rename(complete)


def random_weight(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A gain of one, or a matrix that keeps the size of what it multiplies."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5).bfloat16()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def calibrate(checkpoint: Path, out: Path, samples: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run it; GiB and seconds of the process, wall and CPU, and of its blocks."""
    flags = {
        **{"model.checkpoint": checkpoint, "output_dir": out, "model.method": options.method},
        **{"model.streaming": str(options.streaming).lower(), "trainer.activations": options.activations},
        **{"model.weights.bits": 4, "model.weights.group_size": 128, "evaluate": "false"},
        **{"data.num_samples": samples, "data.seq_len": options.seq_len},
        **{"trainer.max_epochs": options.epochs, "trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false"},
    }
    command = [sys.executable, "-m", "plquant", "calibrate", *(f"--{key}={value}" for key, value in flags.items())]
    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)}\nended with {process.returncode}:\n{log.read().decode()[-2000:]}")
    seconds = time.monotonic() - began
    with open(out / "blocks.csv", newline="") as file:
        per_block = [float(row["seconds"]) for row in csv.DictReader(file)]
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    own = usage.ru_utime + usage.ru_stime  # what other work on the machine does not lengthen
    times = {"seconds": seconds, "CPU seconds": own, "seconds a block": sum(per_block) / len(per_block)}
    return {"GiB": peak / 2**30} | times


def cases(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Blocks and samples: all numbers of blocks with the first number of samples, then the others with the fewest."""
    yield from ((blocks, options.samples[0]) for blocks in options.blocks)
    yield from ((options.blocks[0], samples) for samples in options.samples[1:])


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each case."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="scale-") as temporary:
        root = Path(options.folder or temporary)
        for blocks, samples in cases(options):
            checkpoint = root / f"{options.shape}-{blocks}"
            if not checkpoint.exists():
                write_checkpoint(checkpoint, options.shape, blocks)
            on_disk = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
            case = {"shape": options.shape, "blocks": blocks, "checkpoint GiB": on_disk / 2**30, "samples": samples}
            how = {name: getattr(options, name) for name in ("seq_len", "method", "epochs", "streaming", "activations")}
            with tempfile.TemporaryDirectory(prefix="scale-out-", dir=root) as out:
                rows.append(case | how | calibrate(checkpoint, Path(out), samples, options))
            print(line(rows[-1]), flush=True)
            write_csv(Path(options.results), rows[-1])
    return rows


def line(row: dict[str, Any]) -> str:
    """A line of the table."""
    return " | ".join(f"{value:15.2f}" if isinstance(value, float) else f"{value!s:>15}" for value in row.values())


def write_csv(path: Path, row: dict[str, Any]) -> None:
    """Append the row, with when and where it was measured."""
    where = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    append(path, [where | {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}])


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Memory and time, against blocks and against samples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(9, 6), constrained_layout=True)
    for column, (axis, fixed) in enumerate((("blocks", "samples"), ("samples", "blocks"))):
        shown = [row for row in rows if row[fixed] == rows[0][fixed]]
        for axes, quantity in zip(grid[:, column], ("GiB", "CPU seconds"), strict=True):
            points = sorted((row[axis], row[quantity]) for row in shown)
            axes.plot(*zip(*points, strict=True), "o-")
            axes.set(
                xlabel=f"{axis} ({rows[0][fixed]} {fixed})", ylabel=quantity, ylim=(0, 1.1 * max(y for _, y in points))
            )
            axes.grid(alpha=0.3)
    first = rows[0]
    figure.suptitle(f"{first['method']} of {first['shape']}, streaming: {first['streaming']}, {first['activations']}")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--samples", type=int, nargs="+", default=[8, 32], help="the first with all --blocks")
    parser.add_argument("--seq_len", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--method", default="GPTQ")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--streaming", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--activations", choices=["memory", "disk"], default="disk")
    parser.add_argument(
        "--folder", help="where the checkpoints are written for a while; the system's for temporary files"
    )
    parser.add_argument("--results", default=str(RESULTS / "scale.csv"), help="rows go here, the plot beside it")
    options = parser.parse_args()
    rows = measure(options)
    print("\n" + " | ".join(f"{name:>15}" for name in rows[0]))
    for row in rows:
        print(line(row))
    path = Path(options.results)
    how = "streaming" if options.streaming else "whole"
    plot(path.with_name(f"scale_{options.shape}_{options.method}_{how}.png"), rows)
    print(json.dumps({"rows": rows, "threads": torch.get_num_threads(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
