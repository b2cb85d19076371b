"""What a quantized model costs: bits per weight and multiply-adds per token, run-time operations included."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from plquant.formats.checkpoint import effective_bits
from plquant.nn.attention import AttentionQuantizer
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.nn.online import Online
from plquant.nn.packed_linear import PackedLinear


@dataclass(frozen=True)
class Cost:
    """Of the quantized linears and of what was put beside them.

    Attributes:
        effective_bits: Per weight: codes, scales, zero-points, and the tensors of run-time operations.
        macs: Multiply-adds of the linears for one token: one for each of their weights.
        online_macs: Multiply-adds of the run-time operations for one token.
        operations: Number of run-time operations; with any the model needs plquant to run.
        online_bits: Of the tensors of run-time operations, and of input quantizers.
        unquantized_bits: Of a weight in the model's dtype.
    """

    effective_bits: float
    macs: int
    online_macs: int
    operations: int
    online_bits: int
    unquantized_bits: int

    @property
    def online_share(self) -> float:
        """Multiply-adds of the run-time operations in units of those of the linears."""
        return self.online_macs / self.macs

    @classmethod
    def of(cls, model: nn.Module) -> Cost:
        """That of a quantized model; every expert counts as if it saw every token.

        A linear that is not packed counts as rounded to nearest, without what is being fitted to it.
        """
        linears = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear | FakeQuantLinear)}
        ops = [op for m in model.modules() if isinstance(m, Online) for op in m]
        macs = sum(op.macs_per_token for op in ops)
        for attention in (m for m in model.modules() if isinstance(m, AttentionQuantizer)):
            if isinstance(attention.online, Online):  # done to every head, and counted for one so far
                macs += (attention.heads - 1) * sum(op.macs_per_token for op in attention.online)
        of_inputs = [buffer for m in linears.values() if m.inputs is not None for buffer in m.inputs.buffers()]
        other = sum(op.stored_bits for op in ops) + sum(8 * buffer.nbytes for buffer in of_inputs)
        shapes = {name: (m.out_features, m.in_features) for name, m in linears.items()}
        dtype = next(iter(linears.values())).scale_dtype
        return cls(
            effective_bits(shapes, {name: m.grid for name, m in linears.items()}, dtype, other),
            sum(out * width for out, width in shapes.values()),
            macs,
            len(ops),
            other,
            8 * dtype.itemsize,
        )
