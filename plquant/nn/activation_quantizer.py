"""What a linear does to its input when activations are quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plquant.quant.clipping import LearnedShares
from plquant.quant.token_quantize import TokenCodes, quantize_tokens, token_codes


class ActivationQuantizer(nn.Module):
    """Rounds activations token by token, each with its own range.

    Args:
        bits: Width of a code, 2 to 8.
        symmetric: No zero-point.
        offset: fp32 [K]: what the copies of a split channel add before rounding; ``None`` if no channel is split.
        clip: fp32 [2], share of the lower and of the upper end of every range that is kept; ``None`` for all of it.

    Attributes:
        learned: The shares while they are learned, in place of ``clip``; or ``None``.
    """

    offset: Tensor | None
    clip: Tensor | None

    def __init__(
        self, bits: int, symmetric: bool = False, offset: Tensor | None = None, clip: Tensor | None = None
    ) -> None:
        super().__init__()
        self.bits, self.symmetric = bits, symmetric
        self.register_buffer("offset", offset)
        self.register_buffer("clip", clip)
        self.learned: LearnedShares | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., K], of the same dtype."""
        return quantize_tokens(x, self.bits, self.symmetric, self.offset, self.shares())

    def codes(self, x: Tensor) -> TokenCodes:
        """The integers behind ``forward``, as integer kernels take them."""
        return token_codes(x, self.bits, self.symmetric, self.offset, self.shares())

    def shares(self) -> tuple[Tensor, Tensor] | None:
        """Of the two ends, fp32 scalars; ``None`` where the whole range is kept."""
        if self.learned is not None:
            return self.learned()
        return None if self.clip is None else (self.clip[0], self.clip[1])

    @torch.no_grad()
    def folded(self) -> ActivationQuantizer:
        """The same with nothing that is learned."""
        shares = self.shares()
        clip = None if shares is None else torch.stack(shares)
        return ActivationQuantizer(self.bits, self.symmetric, self.offset, clip)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """``to`` and the like; offset and clip are fp32 in a model of halves, too."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = buffer.to(after.device)
        return self

    def extra_repr(self) -> str:
        """Width and kind, for ``print(model)``."""
        return f"bits={self.bits}, symmetric={self.symmetric}"
