"""A decoder block under calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plquant.blocks.discovery import Site, map_tensors
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.nn.packed_linear import PackedLinear
from plquant.nn.transformed_norm import TransformedNorm
from plquant.quant.affine import QTensor
from plquant.quant.grid import IntGrid
from plquant.transforms.scale_shift import ScaleShift


class QuantBlock(nn.Module):
    """One decoder block, its linears replaced in place by ``FakeQuantLinear``; the rest runs as it is.

    Args:
        layer: The block of the model; changed in place until ``pack_``.
        grid: Grid of every linear.
        sites: Where transforms fold in it.
        call: Its other arguments, which serve any batch size.
        index: Its place in the model.
        name: Its name in the model, ``model.layers.3``.
    """

    def __init__(
        self,
        layer: nn.Module,
        grid: IntGrid,
        sites: Sequence[Site],
        call: dict[str, Any],
        index: int = 0,
        name: str = "",
    ) -> None:
        super().__init__()
        self.layer, self.sites, self.index, self.name = layer, tuple(sites), index, name
        self._call = call  # tensors shared with the other blocks
        self._call_there: tuple[torch.device, dict[str, Any]] | None = None  # and on the block's device
        for module_name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                layer.set_submodule(module_name, FakeQuantLinear(module, grid))
        layer.requires_grad_(False)

    @property
    def linears(self) -> dict[str, FakeQuantLinear]:
        """Its linears by name."""
        return {name: m for name, m in self.layer.named_modules() if isinstance(m, FakeQuantLinear)}

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, H] -> [B, T, H]."""
        if self._call_there is None or self._call_there[0] != x.device:
            self._call_there = x.device, map_tensors(lambda t: t.to(x.device), self._call)
        out = self.layer(x, **self._call_there[1])
        return out[0] if isinstance(out, tuple) else out

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Within it the block is the original: no transform, no rounding."""
        switched = [m for m in self.modules() if isinstance(m, FakeQuantLinear | TransformedNorm)]
        for module in switched:
            module.enabled = False
        try:
            yield
        finally:
            for module in switched:
                module.enabled = True

    def num_channels(self, site: Site) -> int:
        """Width of a site's source."""
        source = self.layer.get_submodule(site.source)
        return (source.norm if isinstance(source, TransformedNorm) else source).get_parameter("weight").shape[0]

    def put_away(self) -> None:
        """Back to the CPU, leaving nothing on the device."""
        self.cpu()
        self._call_there = None

    def transform_(self, site: Site, transform: ScaleShift) -> None:
        """Put a transform at a site: the source writes through it, every consumer reads through it."""
        source = self.layer.get_submodule(site.source)
        if isinstance(source, FakeQuantLinear):
            source.writes = transform
        else:
            self.layer.set_submodule(site.source, TransformedNorm(source, transform, site.gain_offset))
        own_channel = torch.equal(site.channel, torch.arange(len(site.channel)))
        for name in site.consumers:
            consumer = self.linears[name]
            assert consumer.reads is None, f"{name} reads two sources"
            consumer.reads = transform
            consumer.reads_channel = None if own_channel else site.channel.to(consumer.weight.device)

    @torch.no_grad()
    def batches(self, x: Tensor, batch_size: int) -> Iterator[Tensor]:
        """The block's output for ``x`` [N, T, H], batch by batch, on the block's device."""
        device = next(self.layer.parameters()).device
        for batch in x.split(batch_size):
            yield self(batch.to(device))

    def map_(self, x: Tensor, batch_size: int) -> None:
        """Replace ``x`` [N, T, H] by the block's output for it."""
        for into, output in zip(x.split(batch_size), self.batches(x, batch_size), strict=True):
            into.copy_(output)

    @torch.no_grad()
    def pack_(self, round_weight: Callable[[FakeQuantLinear], QTensor] = FakeQuantLinear.quantize) -> None:
        """Fold the transforms, in fp64, and put a ``PackedLinear`` in the place of every linear."""
        packed = {}
        for name, linear in self.linears.items():
            bias = linear.transformed_bias(torch.float64)
            packed[name] = PackedLinear(round_weight(linear), None if bias is None else bias.to(linear.weight.dtype))
        for name, module in list(self.layer.named_modules()):
            if isinstance(module, TransformedNorm):
                self.layer.set_submodule(name, module.fold_())
        for name, packed_linear in packed.items():
            self.layer.set_submodule(name, packed_linear)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the packed block, by their full names in the model."""
        return {f"{self.name}.{name}": tensor for name, tensor in self.layer.state_dict().items()}

    def load_(self, tensors: dict[str, Tensor]) -> None:
        """Become the packed block that ``tensors`` came from."""
        for name, linear in self.linears.items():
            self.layer.set_submodule(name, PackedLinear.empty(linear, linear.grid))
        self.layer.load_state_dict({name.removeprefix(f"{self.name}."): t for name, t in tensors.items()})
