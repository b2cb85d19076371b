"""AffineQuant's q <-> k transform (arXiv 2403.12544): a matrix per head, for models without rotary positions.

    queries:  q -> q A^-1        keys:  k -> k A^T

With RoPE it would move the scores; ``RotaryPairs`` is what may be done there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plquant.transforms.dominant_matrix import DominantMatrix
from plquant.transforms.gradual_mask import Share
from plquant.transforms.query_key import QueryKey


class QueryKeyMatrix(QueryKey):
    """One learnable matrix per key head, shared by the query heads that read it; starts as the identity.

    Args:
        heads: Query heads.
        kv_heads: Key heads.
        head_dim: Channels of a head, d.
        stability: Constant factor on the off-diagonals (the paper's alpha).
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, stability: float = 1.0) -> None:
        super().__init__(heads, kv_heads, head_dim)
        self.matrix = DominantMatrix(kv_heads, head_dim, stability)

    @property
    def log_scale(self) -> nn.Parameter:
        """Logarithm of the diagonal, [kv_heads d]."""
        return self.matrix.log_scale

    def progress_(self, share: Share) -> list[tuple[nn.Parameter, Tensor]]:
        """Open the bands of this share of the run; see ``Gradual``."""
        return self.matrix.progress_(share)

    def condition_number(self) -> Tensor:
        """The largest of all heads."""
        return self.matrix.condition_number()

    def scale(self, is_query: bool) -> Tensor:
        """D^-1 for queries, D for keys; [kv_heads, d]."""
        log_scale = self.log_scale.view(self.kv_heads, self.head_dim)
        return (-log_scale if is_query else log_scale).exp()

    def mix(self, rows: Tensor, head: Tensor, is_query: bool) -> Tensor:
        """(I + N)^-T for queries, I + N for keys."""
        matrix = self.matrix.unit_inverse().mT if is_query else self.matrix.unit()
        return torch.einsum("hed,hdk->hek", matrix[head].to(rows.dtype), rows)
