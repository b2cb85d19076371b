"""Second moments of activations made invertible."""

from __future__ import annotations

import torch
from torch import Tensor


def damped_cholesky(moment: Tensor, damp: float) -> Tensor:
    """Lower Cholesky factor of ``moment + lambda I``, fp64 [K, K].

    Args:
        moment: Sum or mean of x x^T over tokens, [K, K].
        damp: lambda, as a share of the median of the diagonal; of channels that are ever active, so that many dead ones
            (ReLU, an idle expert) do not make it zero.
    """
    moment = moment.double()
    active = moment.diagonal()[moment.diagonal() > 0]
    damping = damp * active.median() if len(active) else moment.new_ones(())
    return torch.linalg.cholesky(moment + damping * torch.eye(len(moment), dtype=moment.dtype, device=moment.device))
