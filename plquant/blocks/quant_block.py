"""A run of decoder blocks under calibration, one as a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plquant.architectures.moe import routers
from plquant.blocks.nested import map_tensors
from plquant.blocks.sites import Attention, QuerySite, Site
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.nn.packed_linear import PackedLinear
from plquant.nn.transformed_norm import TransformedNorm
from plquant.nn.transformed_reader import TransformedReader
from plquant.quant.affine import QTensor
from plquant.quant.grid import IntGrid
from plquant.transforms.base import Transform


class QuantBlock(nn.Module):
    """Consecutive decoder blocks, their linears replaced in place by ``FakeQuantLinear``; the rest runs as it is.

    Modules are named as in the model's list of blocks: ``3.self_attn.q_proj`` is in its fourth.

    Args:
        layers: The blocks of the model by their number in it; changed in place until ``pack_linear_`` and
            ``fold_sources_``.
        grid: Grid of every linear.
        sites: Where transforms fold in them.
        calls: For each, its other arguments, which serve any batch size.
        index: Its place in the run.
        parent: Name of the list of blocks in the model, ``model.layers``.
        query_sites: Where transforms fold between their queries and keys.
        attentions: Their modules that call transformers' attention interface.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        grid: IntGrid,
        sites: Sequence[Site] = (),
        calls: Sequence[dict[str, Any]] = ({},),
        index: int = 0,
        parent: str = "",
        query_sites: Sequence[QuerySite] = (),
        attentions: Sequence[Attention] = (),
    ) -> None:
        super().__init__()
        self.layers, self.sites, self.index, self.parent = nn.ModuleDict(layers), tuple(sites), index, parent
        self.query_sites, self.attentions = tuple(query_sites), tuple(attentions)
        self.grid = grid
        self._calls = list(calls)  # tensors shared with the other blocks
        self._calls_there: tuple[torch.device, list[dict[str, Any]]] | None = None  # and on the block's device
        kept = routers(self.layers)
        for name, module in list(self.layers.named_modules()):
            if isinstance(module, nn.Linear) and name not in kept:
                self.layers.set_submodule(name, FakeQuantLinear(module, grid))
        self.layers.requires_grad_(False)

    @property
    def name(self) -> str:
        """Its name in the model, ``model.layers.3``, or ``model.layers.4-7``."""
        numbers = list(self.layers)
        return f"{self.parent}.{numbers[0]}" + (f"-{numbers[-1]}" if len(numbers) > 1 else "")

    @property
    def linears(self) -> dict[str, FakeQuantLinear]:
        """Its linears that are not packed yet, by name."""
        return {name: m for name, m in self.layers.named_modules() if isinstance(m, FakeQuantLinear)}

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.layers.parameters()).device

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, H] -> [B, T, H]."""
        if self._calls_there is None or self._calls_there[0] != x.device:
            self._calls_there = x.device, [map_tensors(lambda t: t.to(x.device), call) for call in self._calls]
        for layer, call in zip(self.layers.values(), self._calls_there[1], strict=True):
            out = layer(x, **call)
            x = out[0] if isinstance(out, tuple) else out
        return x

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Within it the block is the original: no transform, no rounding."""
        switched = [m for m in self.modules() if isinstance(m, FakeQuantLinear | TransformedNorm | TransformedReader)]
        for module in switched:
            module.enabled = False
        try:
            yield
        finally:
            for module in switched:
                module.enabled = True

    def num_channels(self, site: Site) -> int:
        """Number of channels that a site's source writes."""
        source = self.layers.get_submodule(site.source)
        weight = (source.norm if isinstance(source, TransformedNorm) else source).get_parameter("weight")
        return len(range(weight.shape[0])[site.rows])

    def put_away(self) -> None:
        """Back to the CPU, leaving nothing on the device."""
        self.cpu()
        self._calls_there = None

    def transform_(self, site: Site, transform: Transform) -> None:
        """Put a transform at a site: the source writes through it, every consumer reads through it."""
        source = self.layers.get_submodule(site.source)
        if isinstance(source, FakeQuantLinear):
            source.add_write(transform, site.rows)
        else:
            if not isinstance(source, TransformedNorm):
                source = TransformedNorm(source, site.gain_offset)
                self.layers.set_submodule(site.source, source)
            source.transforms.append(transform)
        for name in site.consumers:
            self.linears[name].add_read(transform, online=transform.is_online and site.kind == "linear")
        for name in site.kept:
            reader = self.layers.get_submodule(name)
            if not isinstance(reader, TransformedReader):
                reader = TransformedReader(reader)
                self.layers.set_submodule(name, reader)
            reader.reads.append(transform)

    @torch.no_grad()
    def batches(self, x: Tensor, batch_size: int) -> Iterator[Tensor]:
        """The block's output for ``x`` [N, T, H], batch by batch, on the block's device."""
        for batch in x.split(batch_size):
            yield self(batch.to(self.device))

    def map_(self, x: Tensor, batch_size: int) -> None:
        """Replace ``x`` [N, T, H] by the block's output for it."""
        for into, output in zip(x.split(batch_size), self.batches(x, batch_size), strict=True):
            into.copy_(output)

    @torch.no_grad()
    def stages(self, x: Tensor) -> list[list[str]]:
        """Names of the linears in the order they run on ``x`` [B, T, H], those that read the same tensor together.

        Those that do not run (an expert that no token is sent to) come last, each alone.
        """
        stages: list[list[str]] = []
        last: list[Tensor] = []

        def record(name: str, inputs: Tensor) -> None:
            if last and last[-1] is inputs:
                stages[-1].append(name)
            else:
                stages.append([name])
            last[:] = [inputs]  # kept, so that its identity is not taken by another tensor

        hooks = [
            linear.register_forward_pre_hook(lambda _, args, name=name: record(name, args[0]))
            for name, linear in self.linears.items()
        ]
        with self.full_precision():
            self(x)
        for hook in hooks:
            hook.remove()
        ran = {name for stage in stages for name in stage}
        return stages + [[name] for name in self.linears if name not in ran]

    @torch.no_grad()
    def pack_linear_(self, name: str, weight: QTensor) -> None:
        """Put a ``PackedLinear`` of these codes in the place of a linear, its bias folded in fp64."""
        linear = self.linears[name]
        bias = linear.transformed_bias(torch.float64)
        self.layers.set_submodule(name, PackedLinear(weight, None if bias is None else bias.to(linear.weight.dtype)))

    def fold_sources_(self) -> None:
        """Make the transforms of the norms, and of what reads them in full precision, permanent, in fp64."""
        for name, module in list(self.layers.named_modules()):
            if isinstance(module, TransformedNorm | TransformedReader):
                self.layers.set_submodule(name, module.fold_())

    def pack_(self, round_weight: Callable[[FakeQuantLinear], QTensor] = FakeQuantLinear.quantize) -> None:
        """Pack every linear and fold the norms."""
        for name, linear in self.linears.items():
            self.pack_linear_(name, round_weight(linear))
        self.fold_sources_()

    def grids(self) -> dict[str, IntGrid]:
        """Full name in the model of every packed linear, and its grid."""
        return {
            f"{self.parent}.{name}": m.grid for name, m in self.layers.named_modules() if isinstance(m, PackedLinear)
        }

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the packed block, by their full names in the model."""
        return {f"{self.parent}.{name}": tensor for name, tensor in self.layers.state_dict().items()}

    def load_(self, tensors: Mapping[str, Tensor]) -> None:
        """Become the packed block that ``tensors`` came from."""
        for name, linear in self.linears.items():
            self.layers.set_submodule(name, PackedLinear.empty(linear, linear.grid))
        self.layers.load_state_dict({name.removeprefix(f"{self.parent}."): t for name, t in tensors.items()})
