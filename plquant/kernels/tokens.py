"""What a token is between its quantization and the products with it, and what the quantization reads of a gather."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Letters: M rows, K' channels; T most sources of a channel, A additions.


@dataclass(frozen=True)
class QuantizedTokens:
    """Activations as signed codes, x = scale (code - zero_point), all of a token in one row of bytes.

    So one tensor of the shape of the activations can take their place between two modules.

    Attributes:
        rows: int8 [M, row_bytes(K')]: the codes, what fills them up to a multiple of 16, then fp32 scale, int32
            zero-point, int32 sum of the codes, and four bytes of nothing.
        width: K'.
        symmetric: There is no zero-point.
    """

    rows: Tensor
    width: int
    symmetric: bool

    @classmethod
    def empty(cls, x: Tensor, width: int, symmetric: bool) -> QuantizedTokens:
        """Room for the codes of the rows of ``x``."""
        return cls(x.new_empty(len(x), row_bytes(width), dtype=torch.int8), width, symmetric)

    @property
    def codes(self) -> Tensor:
        """int8 [M, K'], in [-2^(bits - 1), 2^(bits - 1)); those of an asymmetric grid are less by half its range."""
        return self.rows[:, : self.width]

    @property
    def scale(self) -> Tensor:
        """fp32 [M]."""
        return self._rest(torch.float32)[:, 0]

    @property
    def zero_point(self) -> Tensor | None:
        """int32 [M], in the units of ``codes``; ``None``: symmetric."""
        return None if self.symmetric else self._rest(torch.int32)[:, 1]

    @property
    def sums(self) -> Tensor:
        """int32 [M], of the codes of each row."""
        return self._rest(torch.int32)[:, 2]

    def _rest(self, dtype: torch.dtype) -> Tensor:
        return self.rows[:, -16:].view(dtype)


def row_bytes(width: int) -> int:
    """Of ``QuantizedTokens`` with so many codes."""
    return -(-width // 16) * 16 + 16


def sources(index: Tensor, adds: Tensor) -> Tensor:
    """What each channel of a gather is the sum of.

    Args:
        index: integer [K'], the channel that each one reads.
        adds: integer [A, 2], a channel and the position that it is added at.

    Returns:
        int32 [T, K'], padded with -1; the sums are taken in this order.
    """
    columns: list[list[int]] = [[channel] for channel in index.tolist()]
    for channel, position in adds.tolist():
        columns[position].append(channel)
    most = max(map(len, columns))
    table = torch.tensor([column + [-1] * (most - len(column)) for column in columns], dtype=torch.int32)
    return table.T.contiguous().to(index.device)
