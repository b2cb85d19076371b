"""A weight as the quantizer sees it, group by group, and what it finds of every group."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Letters: R, G, g as in ``affine``.


class GroupedWeight(NamedTuple):
    """A weight to be quantized, ``groups`` * ``inner`` * ``outer``, and how much of its ranges is kept.

    Attributes:
        groups: [R, G, g], any floating dtype.
        inner: [1, G, g], multiplies the columns.
        outer: [R, 1, 1], multiplies the rows.
        low: Share of the lower end, [R, G, 1].
        high: Share of the upper end, [R, G, 1].
        nudge: v, [R, G, g].
    """

    groups: Tensor
    inner: Tensor | None
    outer: Tensor | None
    low: Tensor | None
    high: Tensor | None
    nudge: Tensor | None


class Ranges(NamedTuple):
    """What is known of every group: each [R, G, 1], fp32 (fp64 for an fp64 weight)."""

    low: Tensor  # the range of the weight,
    high: Tensor
    lo: Tensor  # what clipping keeps of it,
    hi: Tensor
    scale: Tensor  # and the grid this gives
    zero_point: Tensor


Gradients = tuple[Tensor | None, ...]  # of the fields of a ``GroupedWeight``; ``None`` where it was not asked for
