"""What a run tells: a line per block, a table at the end, and the same as CSV, JSON, a plot and a model card."""

from __future__ import annotations

import csv
import platform
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import plquant
from plquant.files import replacing, write_json
from plquant.nn.cost import Cost
from plquant.perplexity import PerplexityResult
from plquant.quant.grid import ActivationGrid, IntGrid

STOCK = """Stock transformers with compressed-tensors opens this folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

compressed-tensors 0.18 and later fail to load asymmetric group and channel grids on the meta device unless
`quantization_config=CompressedTensorsConfig(dequantize=True)` is passed. `plquant.load(folder)` keeps the weights
packed in memory. Where the run quantized activations it does so as the run did; stock transformers leaves queries, keys
and values in floating point, so that its figures are not those above."""

# Bits per quantized weight with all that comes with them; multiply-adds that run-time operations add to the linears'.
COLUMNS = ("model", "perplexity", "word perplexity", "bits", "run-time MACs", "size")


@dataclass(frozen=True)
class BlockRecord:
    """Numbers of one block.

    Attributes:
        block: Index.
        name: Name in the model.
        error_before: Relative error per token of its output when rounded to nearest, on the quantized stream.
        error_after: The same for the calibrated, packed block.
        squared_error: Of the calibrated block, over all tokens: sum of squares relative to that of the target.
        squared_error_rest: The same without the token that has the most of it.
        seconds: Wall time.
        unseen: Linears of experts that no calibration token was sent to: rounded to nearest.
        notes: What the parts of the method have to say.
        equivalence: Relative error that the transforms alone make, in fp64 with nothing rounded; ``None`` without any.
        rolled_back: Why the block is rounded to nearest and not what the method made of it; empty if it is that.
        condition_number: The largest of its learned matrices; ``None`` without any, where they were given up, and of a
            block that an earlier version finished.
    """

    block: int
    name: str
    error_before: float
    error_after: float
    squared_error: float
    squared_error_rest: float
    seconds: float
    unseen: Sequence[str] = ()
    notes: Sequence[str] = ()
    rolled_back: str = ""
    equivalence: float | None = None
    condition_number: float | None = None

    def line(self, num_blocks: int) -> str:
        """For the terminal."""
        return (
            f"block {self.block + 1:>3}/{num_blocks}  error {self.error_before:.3e} -> {self.error_after:.3e} "
            f"({self.error_after / max(self.error_before, 1e-30):.2f}x)  {self.seconds:.1f} s"
            f"{'  rounded to nearest: ' + self.rolled_back if self.rolled_back else ''}"
        )


@dataclass
class Report:
    """Everything a run measured.

    Attributes:
        checkpoint: What was quantized.
        method: Name of the method.
        grid: Grid of the weights.
        activations: Of the activations, or ``None``.
        blocks: One record per block.
        perplexities: ``full precision``, ``RTN`` and the run itself, as far as they were evaluated.
        bytes_before: Size of the checkpoint's parameters in the dtype they were loaded in.
        bytes_after: Size of the tensors written.
        cost: Effective bits and multiply-adds of the quantized linears.
        nearest_cost: The same of the model rounded to nearest, if that was evaluated.
        axes: Number of linears by the axis of their groups.
        num_blocks: Decoder blocks of the model.
        opens_in_stock: Stock transformers opens the result: it has no operations at run time, no rewritten modules.
        unquantized: Linears that keep their floating-point weight.
        seconds: Wall time of the run.
    """

    checkpoint: str
    method: str
    grid: IntGrid
    activations: ActivationGrid | None = None
    blocks: list[BlockRecord] = field(default_factory=list)
    perplexities: dict[str, PerplexityResult] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    cost: Cost | None = None
    nearest_cost: Cost | None = None
    axes: dict[str, int] = field(default_factory=dict)
    num_blocks: int = 0
    opens_in_stock: bool = True
    unquantized: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def title(self) -> str:
        """The run in the words of papers: ``OmniQuant W4A16 g64``."""
        group = "per channel" if self.grid.group_size is None else f"g{self.grid.group_size}"
        axis = "" if self.grid.axis == "in" else " per input channel"
        activations = "A16" if self.activations is None else self.activations.title
        return (
            f"{self.method} W{self.grid.bits}{activations} {group}{axis}{' symmetric' if self.grid.symmetric else ''}"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """A cell for each of ``COLUMNS``, of each model measured."""
        sizes = {"full precision": self.bytes_before, "RTN": self.bytes_after, self.title: self.bytes_after}
        costs = {name: ("", "") for name in sizes}
        if self.cost is not None:
            costs["full precision"] = f"{self.cost.unquantized_bits:.3f}", f"+{0:.1%}"
        for name, cost in (("RTN", self.nearest_cost), (self.title, self.cost)):
            if cost is not None:
                costs[name] = f"{cost.effective_bits:.3f}", f"+{cost.online_share:.1%}"
        return [
            (name, f"{r.perplexity:,.3f}", f"{r.word_perplexity:,.2f}", *costs[name], f"{sizes[name] / 2**20:.1f} MiB")
            for name, r in self.perplexities.items()
        ]

    def print(self) -> None:
        """The table at the end of a run."""
        from rich.console import Console
        from rich.table import Table

        console = Console()
        if self.perplexities:
            protocol = next(iter(self.perplexities.values())).protocol
            table = Table(
                title=f"{protocol['text']}: {protocol['windows']} windows of {protocol['window_length']} tokens"
            )
            for column in COLUMNS:
                table.add_column(column, justify="left" if column == "model" else "right")
            for row in self.rows():
                table.add_row(*row)
            console.print(table)
        for line in self.summary():
            console.print(line)

    def summary(self) -> list[str]:
        """What is quantized where, and what it costs."""
        lines = [f"weights of {sum(self.axes.values())} linears: {self.grid.bits} bits"]
        if len(self.axes) > 1:
            lines[0] += ", " + ", ".join(
                f"{count} with groups along the {axis}put" for axis, count in self.axes.items()
            )
        if self.activations is not None:
            lines += [f"{place}: {grid}" for place, grid in self.activations.describe()]
        if self.cost is not None:
            lines.append(f"effective bits per weight: {self.cost.effective_bits:.3f}")
            if self.cost.operations:
                share = f"{self.cost.online_share:.2%}"
                lines.append(f"run-time operations: {self.cost.operations}, {share} of the multiply-adds on top")
        if unseen := [name for block in self.blocks for name in block.unseen]:
            lines.append(f"rounded to nearest, since no calibration token was sent to them: {', '.join(unseen)}")
        lines += [f"{b.name} is rounded to nearest: {b.rolled_back}" for b in self.blocks if b.rolled_back]
        lines += dict.fromkeys(note for block in self.blocks for note in block.notes)
        if not self.opens_in_stock:
            lines.append("to be opened with plquant.load; other loaders refuse it")
        elif self.activations is not None:
            lines.append("to be opened with plquant.load; stock transformers leaves attention in floating point")
        lines.append(f"not quantized: {', '.join(self.unquantized) or 'none'}")
        if self.blocks:
            worst = max(self.blocks, key=lambda block: block.squared_error)
            line = (
                f"largest squared error of a block's output, relative to the target: {worst.squared_error:.2e} "
                f"({worst.name}); {worst.squared_error_rest:.2e} without its heaviest token"
            )
            if conditions := [b.condition_number for b in self.blocks if b.condition_number is not None]:
                own = "none" if worst.condition_number is None else f"{worst.condition_number:.1f}"
                line += f"; condition number of its matrices {own}, of all blocks' at most {max(conditions):.1f}"
            lines.append(line)
        lines.append(
            f"{self.title}: {self.bytes_after / 2**20:.1f} MiB on disk ({self.bytes_before / 2**20:.1f} before), "
            f"{duration(self.seconds)}, peak memory {peak_memory()}"
        )
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        simple = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("grid", "activations", "cost", "nearest_cost", "blocks", "perplexities")
        }
        return simple | {
            "grid": asdict(self.grid),
            "activations": None if self.activations is None else asdict(self.activations),
            "cost": None if self.cost is None else asdict(self.cost),
            "nearest_cost": None if self.nearest_cost is None else asdict(self.nearest_cost),
            "blocks": [asdict(block) for block in self.blocks],
            "perplexities": {name: result.as_dict() for name, result in self.perplexities.items()},
            "peak_memory": peak_memory(),
            "peak_bytes": peak_bytes(),
            "versions": versions(),
        }

    def made(self, began: datetime) -> dict[str, Any]:
        """For the certificate."""
        return {
            "versions": versions(),
            "started": began.isoformat(timespec="seconds"),
            "seconds": self.seconds,
            "equivalence": {block.name: block.equivalence for block in self.blocks},
        }

    def write(self, folder: Path) -> None:
        """blocks.csv, report.json, blocks.png and README.md."""
        write_json(folder / "report.json", self.as_dict())
        with replacing(folder / "blocks.csv") as partial, open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(BlockRecord)])
            writer.writeheader()
            writer.writerows(asdict(block) for block in self.blocks)
        with replacing(folder / "README.md") as partial:
            partial.write_text(self.card())
        self.plot(folder / "blocks.png")

    def plot(self, path: Path) -> None:
        """Error of every block's output before and after."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        indices = [block.block for block in self.blocks]
        axes.plot(indices, [block.error_before for block in self.blocks], "o-", label="rounded to nearest")
        axes.plot(indices, [block.error_after for block in self.blocks], "o-", label=self.title)
        axes.set(xlabel="block", ylabel="relative error per token", yscale="log", title=self.checkpoint)
        axes.grid(alpha=0.3)
        axes.legend()
        with replacing(path) as partial:
            figure.savefig(partial, format="png", dpi=120)

    def card(self) -> str:
        """The model card."""
        rows = (
            "\n".join(f"| {' | '.join(row)} |" for row in self.rows())
            or f"| not evaluated {'| ' * len(COLUMNS)}".rstrip()
        )
        measured = ""
        if self.perplexities:
            protocol = next(iter(self.perplexities.values())).protocol
            measured = (
                f"\nMeasured on {protocol['text']}: {protocol['windows']} windows of {protocol['window_length']} "
                f"tokens, text sha256 `{protocol['text_sha256'][:16]}`.\n"
            )
        summary = "\n".join(f"- {line}" for line in self.summary())
        opens = STOCK if self.opens_in_stock else "`plquant.load(folder)` opens it, and other loaders refuse."
        return f"""---
base_model: {self.checkpoint}
tags: [plquant, compressed-tensors, quantized]
---
# {self.title}

Quantized from `{self.checkpoint}` by plquant {plquant.__version__}.

| {" | ".join(COLUMNS)} |
{"|---" * len(COLUMNS)}|
{rows}
{measured}
{summary}

`config.yaml`, where there is one, repeats the run. {opens}
"""


def peak_bytes() -> int:
    """Greatest resident memory of this process."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    # On Linux this begins with the memory of the process that started this one.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def gpu_bytes() -> int:
    """Greatest allocation on this process's GPU; 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def duration(seconds: float) -> str:
    """For people: minutes, or hours from two on."""
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def peak_memory() -> str:
    """Greatest resident memory of this process, and on a GPU the greatest allocation, in GiB."""
    on_gpu = f", GPU {gpu_bytes() / 2**30:.2f} GiB" if torch.cuda.is_available() else ""
    return f"{peak_bytes() / 2**30:.2f} GiB{on_gpu}"


def versions() -> dict[str, str]:
    """Versions of what took part."""
    import compressed_tensors
    import lightning
    import transformers

    modules = {"plquant": plquant, "torch": torch, "lightning": lightning, "transformers": transformers}
    found = {name: module.__version__ for name, module in modules.items()}
    return found | {"compressed-tensors": compressed_tensors.__version__, "python": platform.python_version()}
