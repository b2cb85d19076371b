"""Square matrices that are strictly diagonally dominant whatever is learned, hence invertible; rotated or not."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from plquant.transforms.gradual_mask import Share, gradual_mask
from plquant.transforms.hadamard import near_root

# Letters: h matrices, each n x n.

# Sums of a row's off-diagonals in units of its diagonal: what they never reach, and up to where they are left alone.
DOMINANCE, FREE = 0.99, 0.9


class DominantMatrix(nn.Module):
    r"""A batch of matrices ``A = D (I + N)``: D a positive diagonal, N off-diagonal with row sums below 0.99.

        D = diag(exp(log_scale))
        P = stability * off_diagonal inside the open bands, 0 elsewhere and on the diagonal
        N_ij = P_ij g(r_i) / r_i,    r_i = sum_j |P_ij|
        g(r) = r up to 0.9, then 0.9 + 0.09 t / (t + 0.09) with t = r - 0.9

    g rises everywhere and never reaches 0.99, so the theorem of Levy and Desplanques holds at every step: a matrix with
    ``|A_ii| > sum_{j != i} |A_ij|`` in all rows is invertible; and by Varah's bound, in the norm of row sums,

        ||(I + N)^-1|| <= 1 / (1 - 0.99) = 100,    cond(I + N) <= 1.99 * 100 = 199,    ||A^-1|| <= 100 / min_i D_ii.

    (Rows cut off at a bound would have no gradient back from it.) AffineQuant (arXiv 2403.12544) argues with this
    theorem; its released code neither enforces nor checks it, and learns off-diagonals in absolute units. In units of
    their row's diagonal a learning rate means the same in all rows.

    The start is the identity, or with a ``rotation`` Q, orthogonal and fixed, ``A = D (I + N) Q``, which is as
    invertible: ``Q^T (I + N)^-1 D^-1``. ``stability`` is the paper's alpha, a factor on the off-diagonals: with Adam it
    makes their learning rate ``stability`` times that of the diagonal.

    Args:
        count: Number of matrices, h.
        size: Width of each, n.
        stability: Factor on the off-diagonals.
        rotation: Q, orthogonal, fp64 [h or 1, n, n].
    """

    opened: Tensor
    rotation: Tensor | None

    def __init__(self, count: int, size: int, stability: float = 1.0, rotation: Tensor | None = None) -> None:
        super().__init__()
        self.count, self.size, self.stability = count, size, stability
        # The entries of a Hadamard matrix over sqrt(n) are made powers of two, which the inverse has in any dtype.
        start = 0.0 if rotation is None else math.log(near_root(size) / math.sqrt(size))
        self.log_scale = nn.Parameter(torch.full((count * size,), start, dtype=torch.float32))
        self.off_diagonal = nn.Parameter(torch.zeros(count, size, size, dtype=torch.float32))
        self.register_buffer("opened", torch.zeros(size, size, dtype=torch.bool), persistent=False)
        self.register_buffer("rotation", rotation, persistent=False)

    def progress_(self, share: Share) -> list[tuple[nn.Parameter, Tensor]]:
        """Open the bands of this share of the run; see ``Gradual``. Before the first call only the diagonal is."""
        device = self.opened.device
        opened = gradual_mask(self.size, share, device) & ~torch.eye(self.size, dtype=torch.bool, device=device)
        newly, self.opened = opened & ~self.opened, opened
        return [(self.off_diagonal, newly)]

    @property
    def scale(self) -> Tensor:
        """The diagonals of D one after another, [h n]."""
        return self.log_scale.exp()

    def unit(self) -> Tensor:
        """(I + N) Q, [h, n, n]: fp32, or fp64 if there is a Q."""
        unit = self._dominant()
        return unit if self.rotation is None else unit.double() @ self.rotation

    def _dominant(self) -> Tensor:
        """I + N, [h, n, n]."""
        off = self.stability * self.off_diagonal * self.opened
        room = DOMINANCE - FREE
        row = off.abs().sum(-1, keepdim=True).clamp(min=FREE)  # below it bounded / row is exactly 1
        bounded = FREE + room * (1 - room / (row - FREE + room))
        return off * (bounded / row) + torch.eye(self.size, dtype=off.dtype, device=off.device)

    def unit_inverse(self) -> Tensor:
        """Q^T (I + N)^-1, [h, n, n] in fp64: codes depend on it, so it is that of ``unit`` to the last bit of fp32."""
        inverse = torch.linalg.inv_ex(self._dominant().double())[0]  # inv would wait for the device: is it singular?
        return inverse if self.rotation is None else self.rotation.mT @ inverse

    def matrix(self) -> Tensor:
        """A, [h, n, n]."""
        return self.scale.view(self.count, self.size, 1) * self.unit()

    def inverse(self) -> Tensor:
        """A^-1, [h, n, n] in fp64."""
        return self.unit_inverse() / self.scale.double().view(self.count, 1, self.size)

    @torch.no_grad()
    def condition_number(self) -> Tensor:
        """The largest, over the batch, ratio of a matrix's singular values; to be logged."""
        return torch.linalg.cond(self.matrix().double()).amax()
