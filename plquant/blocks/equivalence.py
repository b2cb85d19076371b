"""How far the transforms of a block, with nothing rounded, leave its output from where it was."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plquant.blocks.nested import map_tensors
from plquant.blocks.quant_block import QuantBlock
from plquant.nn.corrections import Corrections
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.nn.transformed_norm import TransformedNorm
from plquant.nn.transformed_reader import TransformedReader
from plquant.transforms.base import Transforms


class _Unrounded(nn.Module):
    """A linear with its transforms, in the dtype of its input, and no rounding."""

    def __init__(self, linear: FakeQuantLinear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        for transform in self.linear.online:
            x = transform.online(x)
        return F.linear(x, self.linear.transformed().dense().to(x.dtype), self.linear.transformed_bias(x.dtype))


@torch.no_grad()
def equivalence_error(block: QuantBlock, x: Tensor) -> float | None:
    """||f'(x) - f(x)|| / ||f(x)|| in fp64, f the original block, f' the one with its transforms and no rounding.

    Those that change the function on purpose are left out: removed channels, learned gains of norms.

    Args:
        block: With what was learned in it; not touched.
        x: Hidden states [B, T, H], on the block's device.

    Returns:
        ``None`` if there are no transforms.
    """
    if not _preserving(block):
        return None  # before anything is copied: in fp64 a block is four times as large
    nudges = {id(linear.nudge): None for linear in block.linears.values() if linear.nudge is not None}
    own = copy.deepcopy(block, nudges).double()
    own._calls = map_tensors(lambda t: t.double() if t.is_floating_point() else t, own._calls)
    own._calls_there = None
    for module in own.layers.modules():
        _keep_equivalent_(module)
    with torch.autocast(block.device.type, enabled=False), own.full_precision():
        x = x.double()
        before = QuantBlock.forward(own, x)  # not what somebody has put in its place on the original
        for module in own.layers.modules():
            if isinstance(module, TransformedNorm | TransformedReader):
                module.enabled = True
        for name, linear in own.linears.items():
            own.layers.set_submodule(name, _Unrounded(linear))
        return float(
            (QuantBlock.forward(own, x) - before).norm() / before.norm().clamp(min=torch.finfo(torch.float64).tiny)
        )


def _preserving(block: QuantBlock) -> bool:
    """Whether there is a transform that preserves the function."""
    lists = (module for module in block.layers.modules() if isinstance(module, Transforms))
    return any(transform.preserves for transforms in lists for transform in transforms)


def _keep_equivalent_(module: nn.Module) -> None:
    """Leave only the transforms that preserve the function."""
    if isinstance(module, TransformedNorm):
        module.transforms = Transforms(t for t in module.transforms if t.preserves)
    elif isinstance(module, TransformedReader):
        module.reads = Transforms(t for t in module.reads if t.preserves)
    elif isinstance(module, FakeQuantLinear):
        kept = [(t, rows) for t, rows in zip(module.writes, module.write_rows, strict=True) if t.preserves]
        module.writes, module.write_rows = Transforms(t for t, _ in kept), [rows for _, rows in kept]
        module.reads = Transforms(t for t in module.reads if t.preserves)
        module.online = Transforms(t for t in module.online if t.preserves)
        module.corrections, module._settled, module.inputs = Corrections(), None, None
