"""What a linear does to its input when activations are quantized."""

from __future__ import annotations

from torch import Tensor, nn

from plquant.quant.clipping import LearnedClipping
from plquant.quant.token_quantize import TokenCodes, quantize_tokens, token_codes


class ActivationQuantizer(nn.Module):
    """Rounds activations token by token, each with its own range.

    Args:
        bits: Width of a code, 2 to 8.
        symmetric: No zero-point.
        offset: fp32 [K]: what the copies of a split channel add before rounding; ``None`` if no channel is split.

    Attributes:
        clip: Learned share of every token's range that is kept, one for all tokens; ``None`` keeps all of it.
    """

    offset: Tensor | None

    def __init__(self, bits: int, symmetric: bool = False, offset: Tensor | None = None) -> None:
        super().__init__()
        self.bits, self.symmetric = bits, symmetric
        self.register_buffer("offset", offset)
        self.clip: LearnedClipping | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., K], of the same dtype."""
        return quantize_tokens(x, self.bits, self.symmetric, self.offset, self._shares())

    def codes(self, x: Tensor) -> TokenCodes:
        """The integers behind ``forward``."""
        return token_codes(x, self.bits, self.symmetric, self.offset, self._shares())

    def extra_repr(self) -> str:
        """Width and kind, for ``print(model)``."""
        return f"bits={self.bits}, symmetric={self.symmetric}"

    def _shares(self) -> tuple[Tensor, Tensor] | None:
        if self.clip is None:
            return None
        low, high = self.clip()
        return low.reshape(()), high.reshape(())
