"""Small float64 models with a transform put into them, the way the pipeline puts it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plquant.quant.scaled_weight import ScaledWeight
from plquant.transforms.base import Transform


def randomized(module: nn.Module, spread: float = 1.0) -> nn.Module:
    """In float64, every parameter drawn at random."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-spread, spread)
    return module


def read(linear: nn.Linear, x: Tensor, transforms: Sequence[Transform]) -> Tensor:
    """What a consumer makes of ``x``."""
    weight, bias = ScaledWeight(linear.weight), linear.bias
    for transform in transforms:
        bias = transform.read_bias(linear.weight, bias)
        weight = transform.read_weight(weight)
    return F.linear(x, weight.dense(), bias)


def write(linear: nn.Linear, transform: Transform, rows: slice = slice(None)) -> tuple[Tensor, Tensor | None]:
    """A source's weight, and its bias if it has one (whole rows only)."""
    return transform.write_weight(ScaledWeight(linear.weight), rows).dense(), transform.write_bias(linear.bias)


def two_linears(
    transform: Transform, source: nn.Linear, consumer: nn.Linear, x: Tensor, channel: Tensor
) -> tuple[Tensor, Tensor]:
    """What two linears make of ``x``, input j of the second reading output ``channel[j]``: before and after."""
    before = consumer(source(x)[..., channel])
    return before, read(consumer, F.linear(x, *write(source, transform))[..., channel], [transform])


@torch.no_grad()
def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
