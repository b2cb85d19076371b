"""The q <-> k transforms that rotary position embedding leaves alone: one complex number per pair of channels.

RoPE turns each pair of a head's channels by an angle that depends on the position, another angle for each pair. What
commutes with all of these turns is multiplication of each pair, as a complex number, by one number r e^(i theta):

    queries:  q -> r^-1 e^(i theta) q        keys:  k -> r e^(i theta) k

so that Re(q conj(k)) stays. OmniQuant's released code scales single channels before RoPE and AffineQuant's mixes all
those of a head: with RoPE neither is an equivalent transformation.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from plquant.transforms.query_key import QueryKey

# Letters: d channels of a head, of which P pairs are turned and F are free: d = 2 P + F.


class RotaryPairs(QueryKey):
    """A learnable complex number per key head and rotary pair, a positive scale per free channel; all start at 1.

    Args:
        heads: Query heads.
        kv_heads: Key heads; query heads that share one share its numbers.
        head_dim: Channels of a head, d.
        pairs: int64 [P, 2]: channels of a head that RoPE turns together.
        free: int64 [F]: the others, all of them without RoPE.
        kind: What writes queries and keys: ``linear``, or a ``norm`` of one head's width, whose gain all heads share:
            then there is one scale per pair for all of them, and no angle.
        rotate: Learn the angles too; the scales alone cost less, and a quantizer per channel sees only them.
    """

    column: Tensor
    partner: Tensor
    sign: Tensor

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        pairs: Tensor,
        free: Tensor,
        kind: Literal["linear", "norm"] = "linear",
        rotate: bool = True,
    ) -> None:
        super().__init__(*((1, 1) if kind == "norm" else (heads, kv_heads)), head_dim)
        pairs, free = pairs.cpu().reshape(-1, 2), free.cpu()
        if not torch.equal(torch.cat([pairs.flatten(), free]).sort().values, torch.arange(head_dim)):
            raise ValueError(f"pairs and free channels must name each of a head's {head_dim} channels once")
        if kind == "norm" and rotate:
            raise ValueError("a norm takes up no rotation, its gain is a diagonal; use rotate=False")
        self.mixes = rotate and len(pairs) > 0
        self.log_scale = nn.Parameter(torch.zeros(self.kv_heads, len(pairs) + len(free), dtype=torch.float32))
        self.angle = nn.Parameter(torch.zeros(self.kv_heads, len(pairs), dtype=torch.float32)) if self.mixes else None
        column, partner, sign = torch.empty(head_dim).long(), torch.arange(head_dim), torch.zeros(head_dim)
        column[pairs] = torch.arange(len(pairs))[:, None]
        column[free] = len(pairs) + torch.arange(len(free))
        partner[pairs] = pairs.flip(1)
        sign[pairs] = torch.tensor([-1.0, 1.0])
        self.register_buffer("column", column, persistent=False)  # [d]: of log_scale, the pairs' first
        self.register_buffer("partner", partner, persistent=False)  # [d]: the other channel of the pair, or itself
        self.register_buffer("sign", sign, persistent=False)  # [d]: -1 for a real part, 1 for an imaginary one, 0 free

    def scale(self, is_query: bool) -> Tensor:
        """1 / r for queries, r for keys; [kv_heads, d]."""
        return (-self.log_scale if is_query else self.log_scale).exp()[:, self.column]

    def mix(self, rows: Tensor, head: Tensor, is_query: bool) -> Tensor:
        """Both sides turn by the same angle: a rotation is its own inverse transpose."""
        assert self.angle is not None
        angle = nn.functional.pad(self.angle, (0, self.log_scale.shape[1] - self.angle.shape[1]))[:, self.column]
        cos, sin = angle.cos()[head, :, None].to(rows.dtype), (angle.sin() * self.sign)[head, :, None].to(rows.dtype)
        return rows * cos + rows[:, self.partner] * sin
