"""AdaDim (arXiv 2309.15531): a linear's groups run along the axis on which rounding harms its output less.

    argmin over axis    E ||(W - Q) x||^2 = tr((W - Q) H (W - Q)^T),    H = E[x x^T]

This is the linear's error over all the inputs that H has seen, and needs none of them again. The candidates come as
they would be kept, with their clipping and by their rounding: GPTQ does not leave the two in the order that rounding to
nearest finds them in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from plquant.quant.affine import QTensor

# Letters: O output channels, I input channels.

Axis = Literal["in", "out"]
AXES: tuple[Axis, Axis] = ("in", "out")


@torch.no_grad()
def output_error(weight: Tensor, quantized: QTensor, hessian: Tensor) -> Tensor:
    """tr((W - Q) H (W - Q)^T): squared error of the output, its mean over inputs; an fp64 scalar.

    The product is made in fp32 and summed in fp64: within 1e-7 of all fp64 on SmolLM2, in half the time.

    Args:
        weight: [O, I], what ``quantized`` stands for.
        quantized: Its codes.
        hessian: fp32 [I, I], the mean of x x^T over inputs x.
    """
    difference = weight.to(hessian.dtype) - quantized.dequantize().to(hessian.dtype)
    return torch.sum(difference @ hessian * difference, dtype=torch.float64).clamp(min=0)


def choose_axis(*errors: Mapping[Axis, float], margin: float = 0.0) -> Axis:
    """The axis of least error; ``in``, which every kernel knows, where it makes no difference.

    Args:
        errors: Axis -> error of one linear; of several if they are to take the same axis, as those of one kernel call
            are. Then the sum decides.
        margin: By what share ``out`` has to be the less.

    Raises:
        ValueError: No axis has a finite error.
    """
    totals = {axis: sum(error.get(axis, math.inf) for error in errors) for axis in AXES}
    finite = [axis for axis in AXES if math.isfinite(totals[axis])]
    if not finite:
        raise ValueError(f"no axis has a finite error: {totals}; look for the activations that overflow")
    return min(finite, key=lambda axis: totals[axis] * (1 - margin if axis == "in" else 1))
