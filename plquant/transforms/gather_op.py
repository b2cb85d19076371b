"""The part of a channel reassembly that stays at run time: one gather and a few additions."""

from __future__ import annotations

import torch
from torch import Tensor

from plquant.transforms.online import OnlineOp

# Letters: K original channels, K' channels at run time, A additions.


class GatherOp(OnlineOp):
    """Reads channels in a new order, some several times or not at all, and adds others to them.

    Its buffers are named and laid out as in the checkpoint.

    Args:
        index: integer [K']: the channel that each channel at run time reads.
        adds: integer [A, 2]: a channel that is merged, and the position that it is added at.
    """

    kind = "gather"
    index: Tensor
    adds: Tensor

    def __init__(self, index: Tensor, adds: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index.to(torch.int32))
        self.register_buffer("adds", adds.to(torch.int32))

    @classmethod
    def empty(cls, width: int, adds: int) -> GatherOp:
        """One to load tensors into: K' and A."""
        return cls(torch.zeros(width, dtype=torch.int32), torch.zeros(adds, 2, dtype=torch.int32))

    def config(self) -> dict[str, int]:
        """Arguments of ``empty``."""
        return {"width": len(self.index), "adds": len(self.adds)}

    @property
    def macs_per_token(self) -> int:
        """Additions; the gather itself multiplies nothing."""
        return len(self.adds)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., K']; activations, multiplied by their coefficients before, or the columns of a weight."""
        gathered = x.index_select(-1, self.index)
        if not len(self.adds):
            return gathered
        # Three and more of one cluster are summed in fp32 and rounded once: in bf16 their order would show.
        dtype = torch.promote_types(x.dtype, torch.float32)
        merged = x.index_select(-1, self.adds[:, 0]).to(dtype)
        return gathered.to(dtype).index_add(-1, self.adds[:, 1], merged).to(x.dtype)
