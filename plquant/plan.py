"""What a run will take and give, told from the configuration alone: ``plquant plan``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from plquant.block_module import BlockModule
from plquant.formats.checkpoint import effective_bits, predicted_bytes
from plquant.quant.grid import ActivationGrid, IntGrid

LATER = 100 * 2**20  # bytes of libraries that are loaded as a run goes on, measured on Linux


@dataclass(frozen=True)
class Plan:
    """A run that has not begun.

    Attributes:
        linears: Number of linears that will be quantized.
        output_bytes: Of the tensors that will be written, but those of run-time operations.
        effective_bits: Per quantized weight, without run-time operations.
        peak_bytes: Greatest memory of the process, about.
        runs_in: What opens the result.
    """

    linears: int
    output_bytes: int
    effective_bits: float
    peak_bytes: int
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
        tokens: int,
        step_tokens: int,
        blocks: int,
        process_bytes: int,
    ) -> Plan:
        """That of a run.

        Args:
            shapes: Of the linears, [O, I].
            parameters: Of the whole model.
            grid: Of the weights, settled.
            activations: Their grid, or ``None``.
            dtype: Of the model.
            method: The method, on any block.
            tokens: Of all calibration samples.
            step_tokens: Of one step.
            blocks: Number of fits.
            process_bytes: Memory that the process has now, without the model.
        """
        grids = dict.fromkeys(shapes, grid)
        weights = sum(out * width for out, width in shapes.values())
        hidden = max(min(shape) for shape in shapes.values())
        learns = bool(method.learnables())
        streams = tokens * hidden * dtype.itemsize * (3 if method.aug_loss else 2)
        # Of a block: the fake-quantized weights in fp32 and, in a fit, their gradients and what autograd keeps; what
        # goes in and out of its linears; one Hessian and its factor
        work = weights // blocks * 4 * (4 if learns else 1)
        work += step_tokens * sum(out + width for out, width in shapes.values()) // blocks * 4 * (2 if learns else 1)
        work += 2 * 4 * max(width for _, width in shapes.values()) ** 2 if method.rounding.wants_hessian else 0
        return cls(
            len(shapes),
            predicted_bytes(shapes, grids, parameters - weights, dtype),
            effective_bits(shapes, grids, dtype),
            process_bytes + LATER + parameters * dtype.itemsize + streams + work,
            _runs_in(shapes, method, activations),
        )

    def lines(self) -> list[str]:
        """For the terminal."""
        return [
            f"{self.linears} linears will be quantized, {self.effective_bits:.3f} effective bits per weight",
            f"{self.output_bytes / 2**20:.1f} MiB of tensors will be written",
            f"about {self.peak_bytes / 2**30:.2f} GiB of memory at the most",
            f"the result opens in {self.runs_in}",
        ]


def _runs_in(shapes: Mapping[str, object], method: BlockModule, activations: ActivationGrid | None) -> str:
    operations = any(part.runs_later for part in method.parts)
    experts = any(".experts." in name for name in shapes)
    if operations or experts:
        why = "run-time operations" if operations else "experts"
        return f"plquant.load only ({why})"
    if activations is not None:
        return "plquant.load; stock transformers leaves attention in floating point"
    return "stock transformers, and plquant.load"
