"""What a linear does to its input when activations are quantized."""

from __future__ import annotations

from torch import Tensor, nn

from plquant.quant.token_quantize import TokenCodes, quantize_tokens, token_codes


class ActivationQuantizer(nn.Module):
    """Rounds activations token by token, each with its own range.

    Args:
        bits: Width of a code, 2 to 8.
        symmetric: No zero-point.
        offset: fp32 [K]: what the copies of a split channel add before rounding; ``None`` if no channel is split.
    """

    offset: Tensor | None

    def __init__(self, bits: int, symmetric: bool = False, offset: Tensor | None = None) -> None:
        super().__init__()
        self.bits, self.symmetric = bits, symmetric
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., K], of the same dtype."""
        return quantize_tokens(x, self.bits, self.symmetric, self.offset)

    def codes(self, x: Tensor) -> TokenCodes:
        """The integers behind ``forward``, as integer kernels take them."""
        return token_codes(x, self.bits, self.symmetric, self.offset)

    def extra_repr(self) -> str:
        """Width and kind, for ``print(model)``."""
        return f"bits={self.bits}, symmetric={self.symmetric}"
