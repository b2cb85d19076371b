"""Tokens per second and memory of a packed model, beside the same weights in other ways.

    python bench/generate.py out/w4 --prompt_tokens 128 --new_tokens 32 --compile --peers

One process, one thread, the ways in turn, CPU time, medians:

    bf16                          the dequantized weights in plain linears, transformers' ``generate``
    fp32                          the same in fp32
    packed                        the packed model, transformers' ``generate``
    plquant                       the packed model in the loop of ``plquant generate``
    compiled                      the same with a compiled step (--compile)
    bf16 compiled                 the dequantized weights in that loop with a compiled step (--compile)
    NF4, int8, torchao, quanto    bench/ways.py, transformers' ``generate`` (--peers)
    torchao compiled              in that loop with a compiled step (--compile --peers)

Of a peer that is not installed or fails, the reason is told. A table for people, the last line is JSON. The texts are
compared as well; a peer rounds the weights once more, to its own codes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

import plquant
from bench.rows import append, commit
from bench.ways import PEERS, CannotRun, dequantized_, mebibytes, opened, write_plain
from plquant.generation import generate

TEXT = Path(__file__).parent.parent / "README.md"
Way = tuple[Any, Callable[[int], Tensor]]  # the model, and so many tokens of it


class Ways:
    """What is compared, on one prompt.

    Args:
        ids: int64 [1, T].
        new: Tokens that are generated.
    """

    def __init__(self, ids: Tensor, new: int) -> None:
        self.ids, self.mask, self.new = ids, torch.ones_like(ids), new
        self.found: dict[str, Way] = {}
        self.texts: dict[str, list[int]] = {}
        self.missing: dict[str, str] = {}

    def add(self, name: str, lm: Any, loop: str | None = None) -> None:
        """In transformers' ``generate``, or in ours: "eager" or "compiled"."""
        lm.generation_config.eos_token_id = None  # all write as many tokens

        def stock(count: int) -> Tensor:
            return lm.generate(
                self.ids, attention_mask=self.mask, max_new_tokens=count, do_sample=False, pad_token_id=0
            )

        def lean(count: int) -> Tensor:
            return torch.stack([*generate(lm, self.ids, self.mask, count, loop == "compiled")], 1)

        way = lean if loop else stock
        self.texts[name] = way(self.new)[0, -self.new :].tolist()  # what compiles does so now
        self.found[name] = (lm, way)

    def leave_out(self, name: str, reason: str) -> None:
        """Say why."""
        self.missing[name] = (reason.strip().splitlines() or [""])[0]
        print(f"{name:18} does not run here: {self.missing[name]}", flush=True)

    @contextmanager
    def or_why_not(self, name: str) -> Iterator[None]:
        """What another package does within it may fail."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  of whatever kind: the reason is told
            self.leave_out(name, str(error) if isinstance(error, CannotRun) else f"{type(error).__name__}: {error}")

    def add_peers(self, folder: Path, compiled: bool) -> None:
        """Those that are installed."""
        with tempfile.TemporaryDirectory() as temporary:
            plain = Path(temporary) / "plain"
            try:
                write_plain(folder, plain)
            except CannotRun as reason:
                for peer in PEERS:
                    self.leave_out(peer, str(reason))
                return
            for peer in PEERS:
                with self.or_why_not(peer):
                    lm = opened(peer, plain)
                    self.add(peer, lm)
                    if peer == "torchao" and compiled:
                        with self.or_why_not("torchao compiled"):
                            self.add("torchao compiled", lm, "compiled")


def measured(ways: Ways, rounds: int) -> list[dict[str, Any]]:
    """Medians of each, in rows."""
    new = ways.new
    prefill: dict[str, list[float]] = {name: [] for name in ways.found}
    decode: dict[str, list[float]] = {name: [] for name in ways.found}
    for _ in range(rounds):
        for name, (_, way) in ways.found.items():
            start = time.thread_time()
            way(1)
            first = time.thread_time()
            way(new)
            prefill[name].append(first - start)
            decode[name].append((time.thread_time() - first) - (first - start))
    rows: list[dict[str, Any]] = []
    for name, (lm, _) in ways.found.items():
        same = next((i for i in range(new) if ways.texts[name][i] != ways.texts["bf16"][i]), new)
        row: dict[str, Any] = {
            "way": name,
            "prefill_tokens_per_s": round(ways.ids.shape[1] / statistics.median(prefill[name]), 1),
            "decode_tokens_per_s": round((new - 1) / statistics.median(decode[name]), 2),
            "weights_mib": round(mebibytes(lm), 1),
            "tokens_as_bf16": same,
        }
        times = row["decode_tokens_per_s"] / rows[0]["decode_tokens_per_s"] if rows else 1.0
        print("   ".join(f"{key} {value}" for key, value in row.items()), f"  ({times:.2f} x bf16)", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Measure, print, append."""
    here = str(Path(__file__).parent)  # it hides packages from peers
    sys.path[:] = [path for path in sys.path if path != here]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of `plquant calibrate`")
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="measure compiled steps too")
    parser.add_argument("--peers", action="store_true", help="measure other packages too")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    ids = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[:, : options.prompt_tokens]
    packed = plquant.load(options.folder)
    plain, exact = (plquant.load(options.folder, dtype, kernels=False) for dtype in (torch.bfloat16, torch.float32))
    dequantized_(plain)
    dequantized_(exact)
    ways = Ways(ids, options.new_tokens)
    ways.add("bf16", plain)
    ways.add("fp32", exact)
    ways.add("packed", packed)
    ways.add("plquant", packed, "eager")
    if options.compile:
        ways.add("compiled", packed, "compiled")
        ways.add("bf16 compiled", plain, "compiled")
    if options.peers:
        ways.add_peers(options.folder, options.compile)
    rows = measured(ways, options.rounds)
    where = {"model": f"{options.folder.parent.name}/{options.folder.name}"}
    where |= {"prompt": ids.shape[1], "new": options.new_tokens, "torch": torch.__version__, "commit": commit()}
    if options.csv:
        append(options.csv, [where | row for row in rows])
    print(json.dumps(where | {"results": rows, "missing": ways.missing}))


if __name__ == "__main__":
    main()
