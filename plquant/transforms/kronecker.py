"""A matrix over all channels at the price of two small ones: ``A = P1 kron P2``, as in FlatQuant (arXiv 2410.09426).

    online:    x  -> x (P1 kron P2)^-1 = P1^-T X P2^-1,   X [n1, n2] the row x
    consumer:  W  -> W (P1 kron P2)^T = P1 X P2^T for each row of W

n (n1 + n2) multiply-adds a token in place of n^2, and n1^2 + n2^2 numbers to store. Opened band by band from the
identity this is AffineQuant with a factored matrix; the gradual mask acts on each factor.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from plquant.quant.scaled_weight import ScaledWeight
from plquant.transforms.base import Transform
from plquant.transforms.dominant_matrix import DominantMatrix
from plquant.transforms.gradual_mask import Share
from plquant.transforms.hadamard import orthogonal, split_width
from plquant.transforms.online import KroneckerOp, apply_kronecker

# Letters: n = n1 n2 channels; O and I output and input channels of a linear.


class KroneckerAffine(Transform):
    """A learnable Kronecker product in front of linears, applied at run time.

    It starts as the identity, or as a random rotation, which spreads outliers over all channels; both factors are then
    Hadamard matrices where such are known.

    The factors are ``DominantMatrix``: invertible at every step, and so is their product. A scale per channel that the
    source can take up, and a shift, go before it as a ``ScaleShift``.

    Args:
        width: Channels, n, of the consumers' input. A prime number leaves one dense matrix of that width, and a
            warning.
        stability: Constant factor on the off-diagonals of both factors (AffineQuant's alpha).
        rotate: Chooses the rotation to start as, if given.
    """

    is_online = True

    def __init__(self, width: int, stability: float = 1.0, rotate: torch.Generator | None = None) -> None:
        super().__init__()
        n1, n2 = split_width(width)
        if n1 == 1 < n2:
            warnings.warn(f"{width} is prime: its Kronecker product is a dense matrix of that width", stacklevel=2)
        left, right = (None if rotate is None else orthogonal(n, rotate)[None] for n in (n1, n2))
        self.left = DominantMatrix(1, n1, stability, left)
        self.right = DominantMatrix(1, n2, stability, right)

    def progress_(self, share: Share) -> list[tuple[nn.Parameter, Tensor]]:
        """Open the bands of this share of the run in both factors; see ``Gradual``."""
        return self.left.progress_(share) + self.right.progress_(share)

    def condition_number(self) -> Tensor:
        """That of a product is the product of both."""
        return self.left.condition_number() * self.right.condition_number()

    def read_weight(self, weight: ScaledWeight) -> ScaledWeight:
        """The weight: ``W (P1 kron P2)^T``."""
        left, right = self.left.matrix()[0], self.right.matrix()[0]
        return weight.map_in(lambda dense: apply_kronecker(dense, left, right.mT))

    def online(self, x: Tensor) -> Tensor:
        """``x (P1 kron P2)^-1``."""
        return apply_kronecker(x, *self._inverses())

    @torch.no_grad()
    def online_op(self) -> KroneckerOp:
        """The two inverses as they are now."""
        left, right = (inverse.to(self.left.log_scale.dtype) for inverse in self._inverses())
        return KroneckerOp(left, right)

    def _inverses(self) -> tuple[Tensor, Tensor]:
        """P1^-T and P2^-1, in fp64, laid out as ``KroneckerOp`` keeps them: strides choose how they are multiplied."""
        return self.left.inverse()[0].mT.contiguous(), self.right.inverse()[0].contiguous()
