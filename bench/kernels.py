"""What a packed product costs on this machine's CPU, beside torch's bf16 and fp32 products and its own low-bit ops.

    python bench/kernels.py --shape 4096 4096 --rows 1 512 --csv bench/results/kernels_cpu.csv

One process, one thread, the ways in turn, CPU time, medians. Copies of every weight go round, so that they come from
memory and not from a cache. GB/s are those of the weight; "read" adds up as many bytes as bf16 has: what memory gives.
A table for people, the last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from plquant.kernels import native, ops
from plquant.kernels.cpu_layout import Shape, lay_out

Way = Callable[[Tensor], Tensor]
GRIDS: list[tuple[str, int, bool, int | None]] = [  # name, bits, groups along the output, bits of the activations
    *[("W2 g128", 2, False, None), ("W3 g128", 3, False, None), ("W4 g128", 4, False, None)],
    *[("W4 g128 along out", 4, True, None), ("W6 g128", 6, False, None), ("W8 g128", 8, False, None)],
    *[("W4A4", 4, False, 4), ("W8A8", 8, False, 8)],
]


def copies(tensor: Tensor, megabytes: int) -> list[Tensor]:
    """As many as take so much memory, at least two."""
    return [tensor.clone() for _ in range(max(2, megabytes * 2**20 // tensor.nbytes))]


def ours(n: int, k: int, bits: int, along_out: bool, x_bits: int | None, megabytes: int) -> tuple[Way, int]:
    """A product of ours with a random weight, and its bytes; per channel where activations are quantized."""
    shape = Shape(n, k, bits, k if x_bits else 128, along_out)
    groups = (shape.groups, k) if along_out else (n, shape.groups)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    zero_point = torch.randint(0, 1 << bits, groups, dtype=torch.uint8)
    weight = lay_out(codes, torch.rand(groups).bfloat16(), zero_point, shape)
    rest = (*weight[1:], None, *shape)
    turn = itertools.cycle(copies(weight.codes, megabytes))
    size = sum(tensor.nbytes for tensor in weight if tensor is not None)
    if x_bits is None:
        return (lambda x: ops.linear(x, next(turn), *rest)), size
    return (lambda x: ops.quantized_linear(x, next(turn), *rest, x_bits, False, None)), size


def dense(n: int, k: int, megabytes: int) -> dict[str, tuple[Way, int]]:
    """The bf16 product, reading its weight, and the fp32 product of the same activations."""
    weights = itertools.cycle(copies(torch.randn(n, k).bfloat16(), megabytes))
    wide = itertools.cycle(copies(torch.randn(n, k), megabytes))
    return {
        "bf16": (lambda x: F.linear(x, next(weights)), 2 * n * k),
        "fp32": (lambda x: F.linear(x.float(), next(wide)), 4 * n * k),
        "read": (lambda x: next(weights).view(torch.int64).sum(), 2 * n * k),
    }


def baselines(n: int, k: int, megabytes: int) -> dict[str, tuple[Way, int]]:
    """Torch's 4-bit op, and bitsandbytes."""
    import bitsandbytes as bnb

    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (n, k), dtype=torch.int32), 2)
    four = itertools.cycle(copies(packed, megabytes))
    scales = torch.rand(k // 128, n, 2).bfloat16()
    layers = []
    for _ in range(max(2, megabytes * 2**20 // (n * k // 2))):
        layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layers.append(layer.to("cpu").to(torch.bfloat16).eval())
    nf4 = itertools.cycle(layers)
    return {
        "torch int4pack g128": (
            lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, next(four), 128, scales),
            packed.nbytes + scales.nbytes,
        ),
        "bitsandbytes NF4": (lambda x: next(nf4)(x), n * k // 2 + 4 * n * k // 64),
    }


def measured(ways: Mapping[str, Way], x: Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.thread_time()
            way(x)
            if turn:
                times[name].append(1e3 * (time.thread_time() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Measure, print, append."""
    sys.path[0] = str(Path(__file__).parent.parent)  # not this folder, whose names hide packages
    from bench.rows import append, commit

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], help="out_features, in_features")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 512], help="numbers of activations")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=400, help="of copies of every weight")
    parser.add_argument("--ours", action="store_true", help="leave out the low-bit baselines")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    n, k = options.shape
    cpu = next(
        (s.split(":")[1].strip() for s in open("/proc/cpuinfo") if s.startswith("model name")), platform.machine()
    )
    cpu += f" {native.vectors()}"
    rows = []
    with torch.inference_mode():
        ways = dense(n, k, options.megabytes)
        if not options.ours:
            ways |= baselines(n, k, options.megabytes)
        ways |= {name: ours(n, k, bits, out, x, options.megabytes) for name, bits, out, x in GRIDS}
        for m in options.rows:
            run = {name: way for name, (way, _) in ways.items()}
            found = measured(run, torch.randn(m, k).bfloat16(), options.rounds)
            for name, ms in found.items():
                ratio, speed = found["bf16"] / ms, ways[name][1] / ms / 1e6
                print(f"M={m:<4} {name:22} {ms:9.3f} ms   {ratio:5.2f} x bf16   {speed:5.1f} GB/s", flush=True)
                row = {"rows": m, "way": name, "ms": round(ms, 4), "times_bf16": round(ratio, 3)}
                rows.append(row | {"gb_per_s": round(speed, 2)})
    where = {"shape": f"{n}x{k}", "cpu": cpu, "torch": torch.__version__, "commit": commit()}
    if options.csv:
        append(options.csv, [where | row for row in rows])
    print(json.dumps(where | {"results": rows}))


if __name__ == "__main__":
    main()
