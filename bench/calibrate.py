"""What a calibration step costs, beside a plain forward and backward of the same block, and beside the papers' way.

    python bench/calibrate.py --tokens 256 2048

Interleaved runs, medians; a table for people, the last line is JSON. Three ways to spend a step on one block:

    plain     bf16 forward + backward of the block, gradients for its weights, no quantization
    plquant   a step of OmniQuant at all sites through its training_step, bf16 autocast, backward, AdamW
    fp32      the same step in plain autograd operations and fp32, as the papers' code computes it

and what the loop makes of it: a step inside Trainer.fit, and a whole block (--samples times --epochs steps, its start,
folding, packing, and both streams of activations passed on).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.rows import append, commit
from plquant import BlockwiseTrainer, IntGrid
from plquant.block_module import BlockModule, RunProgress
from plquant.blocks.activations import Activations
from plquant.blocks.capture import capture_inputs
from plquant.blocks.errors import token_error
from plquant.blocks.prepare import prepare_blocks
from plquant.blocks.quant_block import QuantBlock
from plquant.methods import OmniQuant
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.report import peak_bytes

SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 1024,
    "num_hidden_layers": 1,
}


class PlainFakeQuantLinear(FakeQuantLinear):
    """The same mathematics as chained autograd operations."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        clip, in_scale, out_scale = self._rounding()[2:]
        assert clip is not None
        weight = self.weight if in_scale is None else self.weight * in_scale
        weight = weight if out_scale is None else weight * out_scale[:, None]
        groups = weight.view(weight.shape[0], -1, self.grid.size(weight.shape[1]))
        low, high = groups.amin(-1, keepdim=True) * clip[0], groups.amax(-1, keepdim=True) * clip[1]
        scale = ((high - low) / self.grid.qmax).clamp(min=1e-5)
        zero_point = -(low / scale).round()
        steps = groups / scale
        codes = (steps + (steps.round() - steps).detach() + zero_point).clamp(0, self.grid.qmax)
        return F.linear(x, ((codes - zero_point) * scale).view_as(weight), self.bias)


def make_block(tokens: int, dtype: torch.dtype, grid: IntGrid) -> tuple[QuantBlock, Tensor, Tensor]:
    """A random block of SmolLM2's shape, an input [1, T, H] and its target."""
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(max_position_embeddings=tokens, **SMOLLM2)).eval()
    lm = lm.bfloat16() if dtype == torch.bfloat16 else lm
    ids = torch.randint(0, SMOLLM2["vocab_size"], (1, tokens))
    (block,) = prepare_blocks(lm, grid, ids)
    x = capture_inputs(lm, list(block.layers.values()), ids)
    with torch.no_grad(), block.full_precision():
        target = block(x)
    return block, x, target


def plain_step(tokens: int, grid: IntGrid) -> Callable[[], None]:
    """bf16 forward and backward."""
    block, x, target = make_block(tokens, torch.bfloat16, grid)
    for module in list(block.modules()):
        if isinstance(module, FakeQuantLinear):
            module.enabled = False
    weights = [p.requires_grad_() for p in block.parameters()]

    def step() -> None:
        token_error(block(x), target).backward()
        for weight in weights:
            weight.grad = None

    return step


def omniquant_step(tokens: int, grid: IntGrid, plain: bool) -> tuple[Callable[[], None], BlockModule]:
    """One step of OmniQuant: ours in bf16 autocast, or plain operations in fp32."""
    block, x, target = make_block(tokens, torch.float32 if plain else torch.bfloat16, grid)
    module = OmniQuant(block, alpha=None, schedule="constant")
    if plain:
        for linear in block.linears.values():
            linear.__class__ = PlainFakeQuantLinear
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    optimizer = module.configure_optimizers()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=not plain):
            loss = module.training_step([x, target], 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, module


def time_fit(tokens: int, grid: IntGrid, steps: int) -> float:
    """Milliseconds per step inside ``Trainer.fit``."""
    block, x, target = make_block(tokens, torch.bfloat16, grid)
    module = OmniQuant(block, alpha=None)
    module.activations = Activations((x, target), 1, 0)
    trainer = L.Trainer(
        max_epochs=steps,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    samples = (x.expand(steps, -1, -1), target.expand(steps, -1, -1))
    trainer.fit_loop.max_epochs = 1
    start = time.perf_counter()
    trainer.fit(module, Activations(samples, 1, 0).shuffled())
    return (time.perf_counter() - start) * 1e3 / steps


def time_block(tokens: int, grid: IntGrid, samples: int, epochs: int) -> float:
    """Seconds for a block, as ``BlockwiseTrainer.calibrate`` runs it."""
    block, x, _ = make_block(tokens, torch.bfloat16, grid)
    x_q, x_fp = x.repeat(samples, 1, 1), x.repeat(samples, 1, 1)
    trainer = BlockwiseTrainer(max_epochs=epochs, accelerator="cpu", enable_progress_bar=False)
    model: Any = SimpleNamespace(method=OmniQuant)
    return trainer._calibrate_block(block, model, 1, x_q, x_fp, RunProgress(0, 1)).seconds


def measure(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, one after the other in every round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append the rows, with when and where they were measured."""
    where = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    append(path, [where | {k: round(v, 3) for k, v in row.items()} for row in rows])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 2048], help="tokens of a step")
    parser.add_argument("--repeats", type=int, default=30, help="rounds")
    parser.add_argument("--samples", type=int, default=32, help="sequences that a block is fitted to, one a step")
    parser.add_argument("--epochs", type=int, default=10, help="passes over them")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument(
        "--results", default=str(Path(__file__).parent / "results" / "calibrate.csv"), help="rows go here"
    )
    options = parser.parse_args()
    grid = IntGrid(options.bits, options.group_size)
    rows: list[dict[str, Any]] = []
    for tokens in options.tokens:
        row: dict[str, Any] = {"tokens": tokens, "samples": options.samples, "epochs": options.epochs}
        seconds = time_block(tokens, grid, options.samples, options.epochs)
        peak = peak_bytes() / 2**30  # before the other two, which need more
        ours, _ = omniquant_step(tokens, grid, plain=False)
        papers, _ = omniquant_step(tokens, grid, plain=True)
        row |= measure({"plain": plain_step(tokens, grid), "plquant": ours, "fp32": papers}, options.repeats)
        row["in Trainer.fit"] = time_fit(tokens, grid, options.repeats)
        row |= {"plquant / plain": row["plquant"] / row["plain"], "plquant / fp32": row["plquant"] / row["fp32"]}
        row |= {"tokens per second": tokens / row["in Trainer.fit"] * 1e3, "s per block": seconds, "peak GiB": peak}
        rows.append(row)
    print(" | ".join(f"{name:>17}" for name in rows[0]))
    for row in rows:
        print(" | ".join(f"{value:17.2f}" if isinstance(value, float) else f"{value:17d}" for value in row.values()))
    print(f"steps in milliseconds, medians of {options.repeats}; {torch.get_num_threads()} threads")
    write_csv(Path(options.results), rows)
    print(json.dumps({"rows": rows, "threads": torch.get_num_threads(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
