"""What is added to a transformed weight before it is rounded, so that what is trained is what is rounded."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


class Correction(nn.Module):
    """Base of all corrections."""

    def delta(self) -> Tensor:
        """The change, fp32 [O, I], in the coordinates of the weight as it is rounded; to be called outside autocast."""
        raise NotImplementedError(f"{type(self).__name__}.delta gives the change of the weight")


class Corrections(nn.ModuleList):
    """Those of one weight, in order."""

    def __iter__(self) -> Iterator[Correction]:
        """One by one."""
        return super().__iter__()  # type: ignore[return-value]
