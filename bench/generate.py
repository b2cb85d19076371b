"""Tokens per second and memory of a packed model, beside the same weights in bf16 through transformers.

    python bench/generate.py out/w4 --prompt_tokens 128 --new_tokens 32

One process, one thread, the ways in turn, CPU time, medians:

    bf16        the dequantized weights in plain linears, transformers' ``generate``
    packed      the packed model, transformers' ``generate``
    plquant     the packed model in the loop of ``plquant generate``
    compiled    the same with a compiled step (--compile)

A table for people, the last line is JSON. The texts are compared as well.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

import plquant
from plquant.generation import generate
from plquant.nn.packed_linear import PackedLinear

TEXT = Path(__file__).parent.parent / "README.md"


def dequantized_(lm: nn.Module) -> None:
    """Put plain linears in the place of packed ones; inputs are rounded as before."""
    for name, packed in [(n, m) for n, m in lm.named_modules() if isinstance(m, PackedLinear)]:
        weight = packed.quantized().dequantize()
        linear = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None, dtype=weight.dtype)
        linear.weight.data = weight
        if packed.bias is not None:
            linear.bias.data = packed.bias
        steps = [step for step in (packed.online, packed.inputs) if step is not None]
        lm.set_submodule(name, nn.Sequential(*steps, linear) if steps else linear)


def mebibytes(lm: nn.Module) -> float:
    """Of all parameters and buffers, each counted once."""
    tensors = {t.data_ptr(): t for t in (*lm.parameters(), *lm.buffers())}
    return sum(t.nbytes for t in tensors.values()) / 2**20


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of `plquant calibrate`")
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="measure the compiled step too")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    ids = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[:, : options.prompt_tokens]
    mask, new = torch.ones_like(ids), options.new_tokens
    packed, plain = plquant.load(options.folder), plquant.load(options.folder)
    dequantized_(plain)
    for lm in (packed, plain):
        lm.generation_config.eos_token_id = None  # all write as many tokens

    def stock(lm: Any) -> Callable[[int], Tensor]:
        return lambda count: lm.generate(
            ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
        )

    def lean(compiled: bool) -> Callable[[int], Tensor]:
        return lambda count: torch.stack([*generate(packed, ids, mask, count, compiled)], 1)

    ways = {"bf16": stock(plain), "packed": stock(packed), "plquant": lean(False)}
    if options.compile:
        ways["compiled"] = lean(True)
        ways["compiled"](2)
    texts, prefill, decode = {}, {w: [] for w in ways}, {w: [] for w in ways}  # type: ignore[var-annotated]
    for _ in range(options.rounds):
        for name, way in ways.items():
            start = time.thread_time()
            way(1)
            first = time.thread_time()
            texts[name] = way(new)[0, -new:].tolist()
            prefill[name].append(first - start)
            decode[name].append((time.thread_time() - first) - (first - start))
    size = {"bf16": mebibytes(plain)}
    rows = []
    for name in ways:
        row = {
            "way": name,
            "prefill_tokens_per_s": round(ids.shape[1] / statistics.median(prefill[name]), 1),
            "decode_tokens_per_s": round((new - 1) / statistics.median(decode[name]), 2),
            "weights_mib": round(size.get(name, mebibytes(packed)), 1),
            "tokens_as_bf16": next((i for i in range(new) if texts[name][i] != texts["bf16"][i]), new),
        }
        rows.append(row)
        print("   ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    where = {"model": f"{options.folder.parent.name}/{options.folder.name}", "prompt": ids.shape[1], "new": new}
    where |= {"torch": torch.__version__, "commit": commit}
    if options.csv:
        fresh = not options.csv.exists()
        with options.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*where, *rows[0]])
            if fresh:
                writer.writeheader()
            writer.writerows(where | row for row in rows)
    print(json.dumps(where | {"results": rows}))


if __name__ == "__main__":
    main()
