"""Whether kernels compute what the packed weights say: logits against an evaluation of the same weights in fp32.

    python bench/agreement.py out/w4

bf16 rounds after every operation, so two orders of adding the same products give other logits; where activations are
quantized a rounding moves them to other codes, in fp32 too. So what the model's own arithmetic costs is measured beside
the kernels:

    reference    weights dequantized, then multiplied by torch
    kernels      the packed model

both in fp32 and bf16, with all tokens at once and one by one (with a cache), against the reference in fp32 at once.
Texts of so many greedy tokens are compared as well. A table for people, the last line is JSON. The exit code is 1 if an
error of the kernels exceeds 1.1 times the greatest of the reference in the same dtype (in fp32, and 1e-2), or if the
texts in fp32 differ though the reference's own errors are below 1e-2 there.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import plquant
from bench.generate import TEXT
from bench.ways import dequantized_
from plquant.generation import generate

EXACT = "reference fp32"


def opened(folder: Path, dtype: torch.dtype, kernels: bool) -> Any:
    """The model, its weights packed for kernels or dequantized."""
    lm = plquant.load(folder, dtype=dtype, kernels=kernels)
    if not kernels:
        dequantized_(lm)
    if lm.generation_config is not None:
        lm.generation_config.eos_token_id = None  # all write as many tokens
    return lm


@torch.inference_mode()
def logits(lm: Any, windows: Tensor, one_by_one: bool = False) -> Tensor:
    """float64 [windows, tokens, vocabulary]."""
    if not one_by_one:
        return torch.cat([lm(window[None], use_cache=False).logits.double() for window in windows])
    cache, steps = None, []
    for token in windows.t():
        output = lm(token[:, None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits.double())
    return torch.cat(steps, 1)


def compared(found: Tensor, exact: Tensor) -> dict[str, float]:
    """Errors relative to the largest logit and to all of them, and the share of tokens with the same likeliest next."""
    error = found - exact
    return {
        "max_error": round((error.abs().max() / exact.abs().max()).item(), 8),
        "error": round((error.norm() / exact.norm()).item(), 8),
        "same_likeliest": round((found.argmax(-1) == exact.argmax(-1)).double().mean().item(), 4),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of `plquant calibrate`")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="of a window")
    parser.add_argument("--new_tokens", type=int, default=64, help="of the texts that are compared")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(options.folder)(TEXT.read_text(), return_tensors="pt").input_ids
    windows = ids[0, : options.windows * options.tokens].view(options.windows, options.tokens)
    found, texts = {}, {}
    for dtype, kernels in product((torch.float32, torch.bfloat16), (False, True)):
        lm = opened(options.folder, dtype, kernels)
        way = f"{'kernels' if kernels else 'reference'} {'fp32' if dtype == torch.float32 else 'bf16'}"
        found[way] = logits(lm, windows)
        found[f"{way} one by one"] = logits(lm, windows, one_by_one=True)
        prompt = windows[:1, :16]
        texts[way] = torch.cat([*generate(lm, prompt, torch.ones_like(prompt), options.new_tokens)]).tolist()
    rows = {way: compared(some, found[EXACT]) for way, some in found.items()}
    for way, row in rows.items():
        if way in texts:
            pairs = zip(texts[way], texts[EXACT], strict=True)
            row["tokens_as_exact"] = next((i for i, (a, b) in enumerate(pairs) if a != b), options.new_tokens)
        print(f"{way:25}", "   ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    where = {"model": str(options.folder), "windows": options.windows, "tokens": options.tokens}
    print(json.dumps(where | {"rows": rows}))
    return int(not all(agrees(rows, dtype) for dtype in ("fp32", "bf16")))


def agrees(rows: dict[str, dict[str, float]], dtype: str) -> bool:
    """Whether kernels do as well as the reference."""
    ours, theirs = (
        max(rows[f"{way} {dtype}{how}"]["error"] for how in ("", " one by one")) for way in ("kernels", "reference")
    )
    if dtype == "bf16":
        return ours <= 1.1 * theirs
    text = rows["kernels fp32"]["tokens_as_exact"] == rows[EXACT]["tokens_as_exact"]
    return ours <= max(1e-2, 1.1 * theirs) and (text or theirs > 1e-2)


if __name__ == "__main__":
    sys.exit(main())
