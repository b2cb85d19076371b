"""What a run will take and give, told from the configuration alone: ``plquant plan``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from plquant.block_module import BlockModule
from plquant.formats.checkpoint import effective_bits, predicted_bytes
from plquant.quant.grid import ActivationGrid, IntGrid
from plquant.report import duration
from plquant.trial import Trial

# Of vLLM's Marlin kernel for compressed-tensors' pack-quantized linears, read in its source
VLLM_BITS, VLLM_GROUPS = (4, 8), (None, 32, 64, 128)
LATER = 70 * 2**20  # bytes of libraries that a run loads after its blocks: 20 to 100 on two Linux machines


@dataclass(frozen=True)
class Plan:
    """A run that has not begun.

    Attributes:
        linears: Number of linears that will be quantized.
        least_bytes: Of the tensors that will be written, those of run-time operations as a block that was tried has
            them; less than the next only where the method chooses the axis of groups, or channels to split and merge.
        output_bytes: The most that they can be.
        online_bytes: How many of these are of run-time operations.
        effective_bits: Per quantized weight, with run-time operations as a block that was tried has them.
        online_share: Multiply-adds of run-time operations in units of those of the linears, by the same block.
        peak_bytes: Greatest memory of a process, about.
        gpu_bytes: Greatest memory of a GPU while blocks are calibrated, about; 0 without one.
        model_bytes: Of the model as it is evaluated, on the GPU if there is one; of one block with streaming.
        processes: How many there are on a machine.
        disk_bytes: Of what is written, and of the activations on disk of a machine's processes.
        seconds: Of the calibration of all blocks, about.
        runs_in: What opens the result.
    """

    linears: int
    least_bytes: int
    output_bytes: int
    online_bytes: int
    effective_bits: float
    online_share: float
    peak_bytes: int
    gpu_bytes: int
    model_bytes: int
    processes: int
    disk_bytes: int
    seconds: float
    runs_in: str

    @classmethod
    def of(
        cls,
        shapes: Mapping[str, tuple[int, int]],
        parameters: int,
        grid: IntGrid,
        activations: ActivationGrid | None,
        dtype: torch.dtype,
        method: BlockModule,
        run: Run,
        trial: Trial,
    ) -> Plan:
        """That of a run.

        Args:
            shapes: Of the linears, [O, I].
            parameters: Of the whole model.
            grid: Of the weights, settled.
            activations: Their grid, or ``None``.
            dtype: Of the model.
            method: The method, on any block.
            run: What else decides time and memory.
            trial: What one block takes.
        """
        weights = sum(out * width for out, width in shapes.values())
        least, most = output_range(shapes, grid, method, parameters - weights, dtype)
        model = trial.held_bytes if run.streaming else parameters * dtype.itemsize
        streams = 0 if run.on_disk else run.stream_bytes
        steps = run.epochs * -(-run.samples // run.batch_size)
        blocks = weights / trial.weights  # as many as the one that was tried, if all are alike
        bits, macs = (
            trial.outside[0] + blocks * trial.cost.online_bits,
            trial.outside[1] + blocks * trial.cost.online_macs,
        )
        by_data = sum(part.bytes_a_channel for part in method.parts) * sum(width for _, width in shapes.values())
        online = by_data or round(bits / 8)
        least, most = least + (0 if by_data else online), most + online
        return cls(
            linears=len(shapes),
            least_bytes=least,
            output_bytes=most,
            online_bytes=online,
            effective_bits=effective_bits(shapes, dict.fromkeys(shapes, grid), dtype, bits),
            online_share=macs / weights,
            peak_bytes=trial.peak_bytes + LATER + model - trial.held_bytes + max(streams - trial.stream_bytes, 0),
            gpu_bytes=trial.gpu_bytes,
            model_bytes=model,
            processes=run.processes,
            disk_bytes=most + (run.stream_bytes * run.processes if run.on_disk else 0),
            seconds=run.fits * trial.block_seconds(run.samples, steps, weights / run.num_fits)
            + (run.num_fits - run.fits) * trial.pass_seconds(run.samples, weights / run.num_fits),
            runs_in=_runs_in(shapes, grid, method, activations),
        )

    def lines(self) -> list[str]:
        """For the terminal."""
        size = f"{self.output_bytes / 2**20:.1f} MiB"
        if self.least_bytes < self.output_bytes:
            size = f"{self.least_bytes / 2**20:.1f} to {size}, by what is chosen for each linear,"
        if self.online_bytes:
            size += f" ({self.online_bytes / 2**20:.1f} of run-time operations at the most)"
        each = f", in each of {self.processes} processes" if self.processes > 1 else ""
        on_gpu = f"; of a GPU's {self.gpu_bytes / 2**30:.2f}, and {self.model_bytes / 2**30:.2f} to evaluate"
        return [
            f"{self.linears} linears will be quantized, {self.effective_bits:.3f} effective bits per weight, "
            f"run-time MACs +{self.online_share:.1%}",
            f"{size} of tensors will be written, {self.disk_bytes / 2**30:.2f} GiB of disk are needed at the most",
            f"about {self.peak_bytes / 2**30:.2f} GiB of memory at the most{on_gpu if self.gpu_bytes else ''}{each}",
            f"about {duration(self.seconds)} of calibration on this machine, by a block that was timed; reading and "
            "evaluation come on top",
            f"the result opens in {self.runs_in}",
        ]


@dataclass(frozen=True)
class Run:
    """What decides the time and memory of a run, beside the model and the method.

    Attributes:
        num_fits: Number of fits.
        fits: Of these in a process.
        samples: Calibration samples of a process.
        batch_size: Of them in a step.
        epochs: Passes over them, where anything is learned.
        stream_bytes: Of all activations between two blocks, of a process.
        on_disk: They are on disk.
        streaming: One block's weights are in memory at a time.
        processes: How many there are on a machine.
    """

    num_fits: int
    fits: int
    samples: int
    batch_size: int
    epochs: int
    stream_bytes: int
    on_disk: bool
    streaming: bool
    processes: int


def output_range(
    shapes: Mapping[str, tuple[int, int]], grid: IntGrid, method: BlockModule, rest: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Least and greatest ``predicted_bytes``, each linear on any axis that the method may choose."""
    axes = {grid.axis, *(axis for part in method.parts for axis in part.axes)}
    outside = predicted_bytes({}, {}, rest, dtype)
    sizes = [
        [predicted_bytes({name: shape}, {name: replace(grid, axis=axis)}, 0, dtype) for axis in axes]
        for name, shape in shapes.items()
    ]
    return outside + sum(map(min, sizes)), outside + sum(map(max, sizes))


def _runs_in(
    shapes: Mapping[str, object], grid: IntGrid, method: BlockModule, activations: ActivationGrid | None
) -> str:
    operations = any(part.runs_later for part in method.parts)
    experts = any(".experts." in name for name in shapes)
    if operations or experts:
        why = "run-time operations" if operations else "experts"
        return f"plquant.load only ({why})"
    if activations is not None:
        return "plquant.load; stock transformers leaves attention in floating point"
    axes = {grid.axis, *(axis for part in method.parts for axis in part.axes)}
    in_vllm = axes == {"in"} and grid.bits in VLLM_BITS and grid.group_size in VLLM_GROUPS
    return (
        f"stock transformers, plquant.load{', and vLLM (Marlin kernel)' if in_vllm else '; vLLM has no kernel for it'}"
    )
