"""A change of a weight that is not learned: the closed-form compensation."""

from __future__ import annotations

from torch import Tensor

from plquant.nn.corrections import Correction


class FixedDelta(Correction):
    """A constant that is added to a weight after all transforms, before rounding.

    Args:
        value: fp32 [O, I'], in the coordinates of the weight as it is rounded.
    """

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def delta(self) -> Tensor:
        """The change, fp32 [O, I']."""
        return self.value
