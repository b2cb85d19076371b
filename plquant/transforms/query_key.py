"""Transforms between queries and keys: attention sees only their products.

    queries of a head:  q -> q M        keys:  k -> k M^-T        so that  q M (k M^-T)^T = q k^T

Both are linears' rows (or norms behind them), so both sides fold. Query heads that share a key head share M.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plquant.quant.scaled_weight import ScaledWeight
from plquant.transforms.base import Transform

# Letters: d channels of a head; C = heads x d channels of a side, queries or keys.


class QueryKey(nn.Module):
    """What one q <-> k transform learns; ``sides`` are its two views. Either is a mixing of rows, then a scale.

    Args:
        heads: Query heads.
        kv_heads: Key heads, a divisor of it; each has an M of its own.
        head_dim: Channels of a head, d.
    """

    mixes = True  # whether there is something to do before the scale

    def __init__(self, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads evenly")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim

    def scale(self, is_query: bool) -> Tensor:
        """Positive factors of each key head's channels, [kv_heads, d]."""
        raise NotImplementedError(f"{type(self).__name__}.scale gives the factors of a side")

    def mix(self, rows: Tensor, head: Tensor, is_query: bool) -> Tensor:
        """Mix the channels of each head, [heads of this side, d, K] -> the same, in the dtype of ``rows``.

        Args:
            rows: Weight rows, or a bias with K = 1.
            head: int64 [heads of this side]: the key head of each.
            is_query: Which side.
        """
        raise NotImplementedError(f"{type(self).__name__}.mix mixes the channels of a side's heads")

    def sides(self) -> tuple[QueryKeySide, QueryKeySide]:
        """The transform of the queries' source and that of the keys', which share what is learned."""
        return QueryKeySide(self, is_query=True), QueryKeySide(self, is_query=False)


class QueryKeySide(Transform):
    """The queries' or the keys' half of a q <-> k transform: only ever written, read by attention.

    Args:
        shared: What is learned, shared with the other half.
        is_query: Which half.
    """

    head: Tensor

    def __init__(self, shared: QueryKey, is_query: bool) -> None:
        super().__init__()
        self.shared, self.is_query = shared, is_query
        heads = shared.heads if is_query else shared.kv_heads
        head = torch.arange(shared.kv_heads).repeat_interleave(heads // shared.kv_heads)
        self.register_buffer("head", head, persistent=False)

    def write_weight(self, weight: ScaledWeight, rows: slice = slice(None)) -> ScaledWeight:
        """Mix the rows of each head, then scale them."""
        if self.shared.mixes:
            weight = weight.map_out(self._mix, rows)
        return weight.scale_out(self._scale(), rows)

    def write_bias(self, bias: Tensor | None) -> Tensor | None:
        """As the rows."""
        if bias is None:
            return None
        mixed = self._mix(bias[:, None])[:, 0] if self.shared.mixes else bias
        return mixed * self._scale().to(bias.dtype)

    def write_norm(self, weight: Tensor, bias: Tensor | None, gain_offset: float) -> tuple[Tensor, Tensor | None]:
        """The gain, ``weight + gain_offset``, times the scale.

        Raises:
            ValueError: The transform mixes channels.
        """
        if self.shared.mixes:
            raise ValueError("a transform that mixes channels does not fold into a norm, whose gain is a diagonal")
        return (weight + gain_offset) * self._scale().to(weight.dtype) - gain_offset, self.write_bias(bias)

    def _scale(self) -> Tensor:
        return self.shared.scale(self.is_query)[self.head].flatten()

    def _mix(self, rows: Tensor) -> Tensor:
        per_head = rows.unflatten(0, (len(self.head), self.shared.head_dim))
        return self.shared.mix(per_head, self.head, self.is_query).flatten(0, 1)
