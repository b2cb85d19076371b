"""AffineQuant's gradual mask (arXiv 2403.12544): a matrix is opened band by band, diagonal first.

The released code counts bands by ``int((n - 1) / (epochs - 1) * epoch) + 1``, which floating point can leave one short
(n = 4096, 20 epochs: the corners are never opened), and divides by zero for one epoch. Here it is exact.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor, nn

# Letters: n width of a square matrix.

Share = Fraction | float


class Gradual(Protocol):
    """A transform that is opened over the run."""

    def progress_(self, share: Share) -> list[tuple[nn.Parameter, Tensor]]:
        """Open what belongs to this share of the run, in [0, 1].

        Returns:
            Each parameter with a mask, bool, of its shape or broadcast to it: the entries that this call opened, whose
            optimizer state has to begin with them (``reset_state_``).
        """


def share_of_run(epoch: int, epochs: int) -> Fraction:
    """Progress in [0, 1] at the start of an epoch, counted from 0: the first has 0, the last 1, an only one 1."""
    return Fraction(epoch, epochs - 1) if epochs > 1 else Fraction(1)


def gradual_mask(n: int, share: Share, device: torch.device | str | None = None) -> Tensor:
    """Bool [n, n], true within the bands that are open: ``|i - j| <= floor((n - 1) share)``.

    Args:
        n: Width of the matrix.
        share: Progress of the run in [0, 1]: 0 opens the diagonal, 1 everything. Taken exactly as it is, so prefer a
            ``Fraction``: the float nearest to 1/3 lies below it, and 3 x 1/3 then falls short of a band.
        device: Where to.
    """
    numerator, denominator = share.as_integer_ratio()
    if not 0 <= numerator <= denominator:
        raise ValueError(f"the progress of a run lies between 0 and 1, not at {share}")
    band = (n - 1) * numerator // denominator
    return torch.ones(n, n, dtype=torch.bool, device=device).triu(-band).tril(band)
