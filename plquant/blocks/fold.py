"""Folding written out from the definition, against which sites are proven: no scale kept apart, nothing rounded."""

# Letters: C channels of a source = h heads of n, O and I output and input channels of a linear.

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from plquant.blocks.sites import Stream


class Fold:
    """Parameters of a block after transforms ``y -> A (y - shift)`` of the channels that its modules write.

    ``A`` is a matrix for each head, [h, n, n]; a scale of each channel is one with n = 1. All in fp64.

    Args:
        modules: The modules of the block by name; their own parameters are left alone.

    Attributes:
        parameters: By name, those that changed.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self.parameters: dict[str, Tensor] = {}

    def write(
        self,
        name: str,
        matrix: Tensor,
        shift: Tensor | None = None,
        rows: slice = slice(None),
        gain_offset: float = 0.0,
    ) -> None:
        """A source writes its channels through the transform: W -> A W, b -> A (b - shift).

        Args:
            name: Of a linear, or of a norm, which takes n = 1 only.
            matrix: A, [h, n, n].
            shift: [C].
            rows: The linear's output channels that are the C channels.
            gain_offset: Of the norm, which multiplies by ``weight + gain_offset``.
        """
        weight, bias = self._get(name, "weight"), self._get(name, "bias")
        assert weight is not None
        self.parameters[f"{name}.weight"] = _on_heads(matrix, weight + gain_offset, rows) - gain_offset
        if bias is not None:
            bias = bias.clone()
            bias[rows] -= 0 if shift is None else shift
            self.parameters[f"{name}.bias"] = _on_heads(matrix, bias, rows)

    def read(self, name: str, inverse: Tensor, shift: Tensor | None = None) -> None:
        """A consumer reads them through it: W -> W A^-1, b -> b + W shift.

        Args:
            name: Of a module with a weight [O, I].
            inverse: A^-1 for each head of its input, [h', n, n].
            shift: [I].
        """
        weight, bias = self._get(name, "weight"), self._get(name, "bias")
        assert weight is not None
        if shift is not None and bias is not None:
            self.parameters[f"{name}.bias"] = bias + weight @ shift
        heads = weight.unflatten(1, inverse.shape[:2])
        self.parameters[f"{name}.weight"] = torch.einsum("ohn,hni->ohi", heads, inverse).flatten(1)

    def take_gain(self, name: str, gain_offset: float) -> tuple[Tensor, Tensor | None]:
        """Leave a norm a gain of one and no bias.

        Args:
            name: Of the norm.
            gain_offset: It multiplies by ``weight + gain_offset``.

        Returns:
            The gain and bias that it had, each [C].
        """
        weight, bias = self._get(name, "weight"), self._get(name, "bias")
        assert weight is not None
        self.parameters[f"{name}.weight"] = torch.full_like(weight, 1 - gain_offset)
        if bias is not None:
            self.parameters[f"{name}.bias"] = torch.zeros_like(bias)
        return weight + gain_offset, bias

    def rotate(self, stream: Stream, rotation: Tensor) -> None:
        """The block reads and writes x Q in the place of x.

        Gains and biases of norms go into what reads them; then W -> W Q there, and W -> Q^T W, b -> b Q in what writes.

        Args:
            stream: What reads and writes it.
            rotation: Q, orthogonal, [H, H].
        """
        for site in stream.norms:
            gain, bias = self.take_gain(site.source, site.gain_offset)
            for name in site.readers:
                self.read(name, gain[:, None, None], bias)
                self.read(name, rotation[None])
        for name in stream.writers:
            self.write(name, rotation.mT[None])

    def _get(self, module: str, name: str) -> Tensor | None:
        found = self.parameters.get(f"{module}.{name}")
        if found is None:
            found = getattr(self._modules[module], name, None)
        return None if found is None else found.double()


def _on_heads(matrix: Tensor, values: Tensor, rows: slice) -> Tensor:
    """``matrix`` times the rows of each head, [C, ...] within [O, ...]."""
    result = values.clone()
    heads = values[rows].unflatten(0, matrix.shape[:2])
    result[rows] = torch.einsum("hmn,hn...->hm...", matrix, heads).flatten(0, 1)
    return result
