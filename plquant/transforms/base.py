"""What every transform is: a function-preserving rewrite at a site, one object with two sides.

At a site a *source* (a norm or a linear) writes channels that *consumers* (linears) read. A transform rewrites what
goes between them as ``x'' = Phi x`` and the consumers as ``W'' = W Phi^-1``, so that without rounding the output is the
same number. ``Phi`` is taken up by the source where it can be (``write_...``): that costs nothing at run time. What the
source cannot take up stays as an *online* operation, which is saved, loaded, executed and counted.

Training and folding call the same functions. Weights are rewritten in fp32 at all times, so that the codes of the fold
are those of the training forward; biases and norms in the dtype that is asked for, fp64 in the fold.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from plquant.quant.scaled_weight import ScaledWeight
from plquant.transforms.online import OnlineOp

# Letters: C channels of a source, O and I output and input channels of a linear.


class Transform(nn.Module):
    """Base of all transforms; this one changes nothing, a subclass overrides the sides it has."""

    is_online: bool = False  # something stays to be done at run time
    preserves: bool = True  # without rounding the block's output is the same number

    def write_weight(self, weight: ScaledWeight, rows: slice = slice(None)) -> ScaledWeight:
        """The source linear's weight [O, I], its rows ``rows`` being the C channels written here."""
        return weight

    def write_bias(self, bias: Tensor | None) -> Tensor | None:
        """The source's bias [C]; computed in the dtype of ``bias``."""
        return bias

    def write_norm(self, weight: Tensor, bias: Tensor | None, gain_offset: float) -> tuple[Tensor, Tensor | None]:
        """The source norm's weight and bias [C], in their dtype; it multiplies by ``weight + gain_offset``."""
        return weight, self.write_bias(bias)

    def read_weight(self, weight: ScaledWeight) -> ScaledWeight:
        """A consumer's weight [O, I] -> [O, I']."""
        return weight

    def read_bias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """A consumer's bias [O], computed in its dtype; ``weight`` [O, I] is the original one."""
        return bias

    def online(self, x: Tensor) -> Tensor:
        """What stays to be done to the source's output at run time, [..., I] -> [..., I']; differentiable."""
        return x

    def online_op(self) -> OnlineOp | None:
        """``online`` as a module without parameters, for the quantized model; ``None`` if there is nothing to do."""
        return None


class Transforms(nn.ModuleList):
    """The transforms of one place, in order."""

    def __iter__(self) -> Iterator[Transform]:
        """One by one."""
        return super().__iter__()  # type: ignore[return-value]
