"""Weights fitted anew to what a linear really reads: reassembled and quantized activations.

A least-squares problem with a closed form, solved before anything is learned; low-rank correction (``LoRA``) starts
from it. It makes good what dropping or merging channels lost, and part of the activations' rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plquant.transforms.damping import damped_cholesky

# Letters: O output channels, K original channels, K' channels at run time.


def compensate(
    weight: Tensor, reassembled: Tensor, cross_moment: Tensor, second_moment: Tensor, damp: float = 0.1
) -> Tensor:
    """What to add to a reassembled weight W', fp32 [O, K'], to bring W' x' nearer to W x.

        E[(W x - W' x') x'^T] (E[x' x'^T] + lambda I)^-1,    lambda = damp * median of the diagonal of E[x' x'^T]

    This minimises E|W x - (W' + D) x'|^2 + lambda |D|^2: it is the *change* that is kept small. Shrinking the weight
    itself towards 0 is worse than no fit at all where tokens are few; so is any fit to fewer than about 6 tokens a
    channel.

    The result is one number per weight in the *final* coordinates: no change of the original weight says the same,
    since copies of one column may now differ. So it is kept beside the weight until the fold, a constant that is
    added after all transforms (``FixedDelta``) and rounded with the weight. A scale before the reassembly may still be
    learned: its columns move, the constant does not.

    Args:
        weight: W, [O, K].
        reassembled: W', [O, K'].
        cross_moment: E[x x'^T] or the sum over tokens, [K, K']: x is the full-precision input that W reads (both
            original, or both after the transforms before the reassembly), x' what W' reads, quantized.
        second_moment: E[x' x'^T] or the sum over the same tokens, [K', K'].
        damp: Strength of the regularisation.
    """
    moment, reassembled = second_moment.double(), reassembled.double()
    residual = weight.double() @ cross_moment.double() - reassembled @ moment
    return torch.cholesky_solve(residual.t(), damped_cholesky(moment, damp)).t().float()
