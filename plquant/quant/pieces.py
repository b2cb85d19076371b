"""How much of a tensor to work on at once.

A chain of elementwise operations on a large tensor is as slow as memory: on a CPU each takes four times as long as on a
piece that stays in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A few fp32 buffers of this size fit the cache of a CPU's core; an accelerator wants few, large kernels.
PER_CPU_THREAD, ON_ACCELERATOR = 1 << 17, 1 << 26


def piece_size(values: Tensor) -> int:
    """Number of elements of ``values`` to work on at once."""
    return PER_CPU_THREAD * torch.get_num_threads() if values.device.type == "cpu" else ON_ACCELERATOR
