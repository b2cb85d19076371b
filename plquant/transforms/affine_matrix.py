"""AffineQuant's equivalent transformation (arXiv 2403.12544): a matrix where LET has a scale per channel.

    source:    y  -> (y - shift) A^-1
    consumer:  W  -> W A^T,   b -> b + W shift

A linear takes A^-1 up in its rows: between v and o, where attention leaves the channels of a head to themselves, one
matrix per head folds at no cost. A norm cannot: its gain is a diagonal. There the matrix is an online operation, with
its storage and its multiplications: as in the released scripts for weight-only OPT and LLaMA-1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plquant.quant.scaled_weight import ScaledWeight
from plquant.transforms.base import Transform
from plquant.transforms.dominant_matrix import DominantMatrix
from plquant.transforms.gradual_mask import Share
from plquant.transforms.online import MatrixOp, apply_matrix
from plquant.transforms.scale_shift import consumer_bias, shifted_bias

# Letters: C channels of a source = h heads of n channels; O and I output and input channels of a linear.


class AffineMatrix(Transform):
    """One learnable matrix for all channels of a site, or one for each head; starts as the identity.

    The matrix is ``DominantMatrix``: invertible at every step, opened band by band with ``progress_``. Its inverse is
    computed in fp64 in training and in the fold.

    Args:
        width: Channels, C: of the source's output, or of the consumers' input if ``online``.
        heads: Number of matrices; 1 mixes all channels.
        channel: int64 [I]: the source's channel which each input channel of a consumer reads, whole heads in any
            order; its own if not given.
        stability: Constant factor on the off-diagonals (the paper's alpha).
        shift: Learn a shift too; only where source and consumers have a bias (``online``: the consumers).
        online: The source takes nothing up; the inverse is applied to its output at run time.
        rotation: Orthogonal matrix, fp64 [heads or 1, n, n], that it starts as; the identity if not given.
    """

    head: Tensor | None

    def __init__(
        self,
        width: int,
        heads: int = 1,
        channel: Tensor | None = None,
        stability: float = 1.0,
        shift: bool = False,
        online: bool = False,
        rotation: Tensor | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{width} channels are not {heads} heads of one width")
        self.heads, self.size, self.is_online = heads, width // heads, online
        self.matrix = DominantMatrix(heads, self.size, stability, rotation)
        self.shift = nn.Parameter(torch.zeros(width, dtype=torch.float32)) if shift else None
        self.register_buffer("head", None if channel is None else self._heads_read(channel.cpu()), persistent=False)

    @property
    def log_scale(self) -> nn.Parameter:
        """Logarithm of the diagonal, [C], as that of ``ScaleShift``."""
        return self.matrix.log_scale

    def progress_(self, share: Share) -> list[tuple[nn.Parameter, Tensor]]:
        """Open the bands of this share of the run; see ``Gradual``."""
        return self.matrix.progress_(share)

    def condition_number(self) -> Tensor:
        """The largest of all heads."""
        return self.matrix.condition_number()

    def write_weight(self, weight: ScaledWeight, rows: slice = slice(None)) -> ScaledWeight:
        """The weight: ``A^-T W`` on each head's rows; A^-T is D^-1 (I + N)^-T, and D stays a scale."""
        if self.is_online:
            return weight

        def mix(dense: Tensor) -> Tensor:
            inverse = self.matrix.unit_inverse().to(dense.dtype)
            return torch.einsum("hde,hdi->hei", inverse, dense.unflatten(0, (self.heads, self.size))).flatten(0, 1)

        return weight.map_out(mix, rows).scale_out(1 / self.matrix.scale, rows)

    def write_bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias: ``(b - shift) A^-1``; without one, a shift is an error."""
        if self.is_online:
            return bias
        bias = shifted_bias(bias, self.shift)
        return None if bias is None else apply_matrix(bias, self.matrix.inverse())

    def write_norm(self, weight: Tensor, bias: Tensor | None, gain_offset: float) -> tuple[Tensor, Tensor | None]:
        """A norm takes nothing up.

        Raises:
            ValueError: The matrix is not online.
        """
        if not self.is_online:
            raise ValueError("a matrix does not fold into a norm, whose gain is a diagonal; use online=True or a scale")
        return weight, bias

    def read_weight(self, weight: ScaledWeight) -> ScaledWeight:
        """The weight: ``W A^T`` on each head's columns."""

        def mix(dense: Tensor) -> Tensor:
            unit = self._read(self.matrix.unit()).to(dense.dtype)
            return torch.einsum("ohd,hed->ohe", dense.unflatten(1, unit.shape[:2]), unit).flatten(1)

        return weight.map_in(mix).scale_in(self._read(self.matrix.scale.view(self.heads, -1)).flatten())

    def read_bias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The bias: ``b + W shift``; without one, a shift is an error."""
        shift = None if self.shift is None else self._read(self.shift.view(self.heads, -1)).flatten()
        return consumer_bias(weight, bias, shift)

    def online(self, x: Tensor) -> Tensor:
        """``(x - shift) A^-1`` if it is an online operation."""
        return apply_matrix(x, self.matrix.inverse().contiguous(), self.shift) if self.is_online else x

    @torch.no_grad()
    def online_op(self) -> MatrixOp | None:
        """The inverse, and the shift, as they are now."""
        if not self.is_online:
            return None
        shift = None if self.shift is None else self.shift.clone()
        return MatrixOp(self.matrix.inverse().to(self.log_scale.dtype), shift)

    def _read(self, per_head: Tensor) -> Tensor:
        """What belongs to each head of the source, [h, ...], for each head of a consumer."""
        return per_head if self.head is None else per_head[self.head]

    def _heads_read(self, channel: Tensor) -> Tensor | None:
        """Which head of the source each head of a consumer reads; ``None`` if its own."""
        own = torch.arange(self.heads * self.size)
        if torch.equal(channel, own):
            return None
        if self.is_online:
            raise ValueError("an online matrix acts on the channels in the consumers' own order; leave channel out")
        first = channel[:: self.size]
        whole = (first[:, None] + own[: self.size]).flatten()
        if not (torch.equal(channel, whole) and bool((first % self.size == 0).all())):
            raise ValueError(f"the consumers do not read whole heads of {self.size} channels in their order")
        return first // self.size
