"""A run of decoder blocks under calibration, one as a rule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plquant.architectures.moe import Experts, alike, routers
from plquant.bfloat16 import quick_products
from plquant.blocks.nested import map_tensors
from plquant.blocks.sites import Attention, QuerySite, Site
from plquant.blocks.stream_files import pieces
from plquant.nn.activation_quantizer import ActivationQuantizer
from plquant.nn.attention import CHILD, AttentionQuantizer, quantize_attention_
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.nn.online import attach_online_
from plquant.nn.packed_linear import PackedLinear
from plquant.nn.packed_structure import PackedStructure
from plquant.nn.token_norm import TokenNorm
from plquant.nn.transformed_norm import TransformedNorm
from plquant.nn.transformed_reader import TransformedReader
from plquant.quant.affine import QTensor
from plquant.quant.grid import ActivationGrid, IntGrid
from plquant.transforms.base import Transform
from plquant.transforms.online import OnlineOp
from plquant.transforms.query_key import QueryKey


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
        query_sites: Where transforms fold between queries and keys.
        attentions: Their modules that call transformers' attention interface.
        activations: What activations are rounded to, or ``None``.
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
        activations: ActivationGrid | None = None,
    ) -> None:
        super().__init__()
        self.layers, self.index, self.parent = nn.ModuleDict(layers), index, parent
        self.sites, self.query_sites = tuple(sites), tuple(query_sites)
        self.grid, self.activations = grid, activations
        self._calls = list(calls)  # tensors shared with the other blocks
        self._calls_there: tuple[torch.device, list[dict[str, Any]]] | None = None  # and on the block's device
        kept = routers(self.layers)
        for name, module in list(self.layers.named_modules()):
            if isinstance(module, nn.Linear) and name not in kept:
                linear = FakeQuantLinear(module, grid)
                if activations is not None and activations.bits is not None:
                    linear.inputs = ActivationQuantizer(activations.bits, activations.symmetric)
                self.layers.set_submodule(name, linear)
        self.attentions = tuple(attentions)
        if activations is not None:
            quantize_attention_(self.layers, [attention.name for attention in attentions], activations)
        self.layers.requires_grad_(False)

    @property
    def name(self) -> str:
        """Its name in the model, ``model.layers.3``, or ``model.layers.4-7``."""
        numbers = list(self.layers)
        return f"{self.parent}.{numbers[0]}" + (f"-{numbers[-1]}" if len(numbers) > 1 else "")

    @property
    def kept(self) -> list[str]:
        """Its modules that choose experts and stay as they are, beside linears of the model."""
        names = {name for site in self.sites for name in site.kept}
        return sorted(name for name in names if not isinstance(self.layers.get_submodule(name), nn.Linear))

    @property
    def has_experts(self) -> bool:
        """Some linears run only for the tokens that are sent to them."""
        return any(isinstance(module, Experts) for module in self.layers.modules())

    def in_expert(self, name: str) -> bool:
        """Whether a linear is an expert's: it runs only for the tokens that are sent there."""
        experts = [path for path, module in self.layers.named_modules() if isinstance(module, Experts)]
        return any(name.startswith(f"{path}.") for path in experts)

    @property
    def quantizes_attention(self) -> bool:
        """Queries or keys are rounded."""
        return self.activations is not None and bool(self.activations.bits or self.activations.kv_bits)

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
        with quick_products(x.device):
            for layer, call in zip(self.layers.values(), self._calls_there[1], strict=True):
                out = layer(x, **call)
                x = out[0] if isinstance(out, tuple) else out
        return x

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Within it the block is the original: no transform, no rounding."""
        kinds = FakeQuantLinear | TransformedNorm | TransformedReader | AttentionQuantizer
        switched = [m for m in self.modules() if isinstance(m, kinds)]
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

    def sees_scale(self, site: Site, folds: bool = True) -> bool:
        """Whether rounding is another with a scale per channel at a site.

        Groups of one input channel take it up in their own scale, and so do a row's groups of output channels; a norm
        is not rounded.

        Args:
            site: The site.
            folds: The source takes up its inverse; else that is a run-time operation.
        """
        linears = [self.linears[name] for name in site.consumers]
        source_sees = folds and site.kind == "linear" and self.linears[site.source].grid.axis == "out"
        return source_sees or any(linear.grid.axis == "in" or linear.inputs is not None for linear in linears)

    def put_away(self) -> None:
        """Back to the CPU, leaving nothing on the device."""
        self.cpu()
        self._calls_there = None

    def transform_(self, site: Site, transform: Transform) -> None:
        """Put a transform at a site: the source writes through it, every consumer reads through it."""
        if site.kind == "linear":
            self.linears[site.source].add_write(transform, site.rows)
        else:
            self.correct_norm_(site.source, transform, site.gain_offset)
        for name in site.consumers:
            self.linears[name].add_read(transform, online=site.kind == "linear")
        for name in site.kept:
            reader = self.layers.get_submodule(name)
            if not isinstance(reader, TransformedReader):
                reader = TransformedReader(reader)
                self.layers.set_submodule(name, reader)
            reader.reads.append(transform)

    def transform_queries_(self, site: QuerySite, transform: QueryKey) -> None:
        """Put a transform between queries and keys."""
        query, key = transform.sides()
        if site.kind == "linear":
            self.linears[site.query].add_write(query, site.query_rows)
            self.linears[site.key].add_write(key, site.key_rows)
        else:
            self.correct_norm_(site.query, query, site.gain_offset)
            self.correct_norm_(site.key, key, site.gain_offset)

    def rotate_heads_(self, attention: Attention, rotation: OnlineOp) -> None:
        """Rotate queries and keys after RoPE, where attention quantizes them."""
        quantizer = self.layers.get_submodule(f"{attention.name}.{CHILD}")
        attach_online_(quantizer, [rotation.to(next(self.layers.parameters()).dtype)])

    def correct_norm_(self, name: str, transform: Transform, gain_offset: float) -> None:
        """Let a norm write through a transform, without telling its consumers."""
        norm = self.layers.get_submodule(name)
        if not isinstance(norm, TransformedNorm):
            norm = TransformedNorm(norm, gain_offset)
            self.layers.set_submodule(name, norm)
        norm.transforms.append(transform)

    @torch.no_grad()
    def batches(self, x: Tensor, batch_size: int) -> Iterator[Tensor]:
        """The block's output for ``x`` [N, T, H], batch by batch, on the block's device."""
        for batch in pieces(x, batch_size):
            yield self(batch.to(self.device))

    def map_(self, x: Tensor, batch_size: int) -> None:
        """Replace ``x`` [N, T, H] by the block's output for it."""
        for into, output in zip(x.split(batch_size), self.batches(x, batch_size), strict=True):
            into.copy_(output)

    @torch.no_grad()
    def stages(self, inputs: Iterable[Tensor]) -> list[list[list[str]]]:
        """Names of the linears in the order they run, those that read the same tensor together.

        What stands at one place in all experts of a layer is one stage, whichever of them run: no expert reads what
        another gives. Any other linear that does not run comes last, alone.

        Args:
            inputs: Batches [B, T, H]; one is enough unless linears are left out, then the one that most run on counts.
        """
        best: list[list[list[str]]] = []
        enough = None if self.has_experts else 1  # without them all sequences run the same
        for x in inputs:
            best = max(best, self._stages_of(x[:enough].to(self.device)), key=lambda stages: len(_names(stages)))
            if len(_names(best)) == len(self.linears):
                break
        ran = _names(best)
        return best + [[[name]] for name in self.linears if name not in ran]

    def _stages_of(self, x: Tensor) -> list[list[list[str]]]:
        groups: list[list[str]] = []  # that read the same tensor
        last: list[Tensor] = []

        def record(name: str, inputs: Tensor) -> None:
            if last and last[-1] is inputs:
                groups[-1].append(name)
            else:
                groups.append([name])
            last[:] = [inputs]  # kept, so that its identity is not taken by another tensor

        hooks = [
            linear.register_forward_pre_hook(lambda _, args, name=name: record(name, args[0]))
            for name, linear in self.linears.items()
        ]
        with self.full_precision():
            self(x)
        for hook in hooks:
            hook.remove()
        siblings = {name: same for same in alike(self.layers, self.linears) for name in same}
        stages: list[list[list[str]]] = []
        for group in groups:
            if not stages or group[0] not in _names(stages):
                stages.append([list(names) for names in zip(*(siblings[name] for name in group), strict=True)])
        return stages

    @torch.no_grad()
    def pack_linear_(self, name: str, weight: QTensor) -> None:
        """Put a ``PackedLinear`` of these codes in the place of a linear, its bias folded in fp64."""
        linear = self.linears[name]
        bias = linear.transformed_bias(torch.float64)
        packed = PackedLinear(weight, None if bias is None else bias.to(linear.weight.dtype))
        packed.inputs = None if linear.inputs is None else linear.inputs.folded()
        attach_online_(packed, _operations(linear.online, linear.weight.dtype))
        self.layers.set_submodule(name, packed)

    def fold_sources_(self) -> None:
        """Make the transforms of the norms, and of what reads them in full precision, permanent, in fp64.

        A norm that all its readers quantize alike does so for them from now on.
        """
        for name, module in list(self.layers.named_modules()):
            if isinstance(module, TransformedNorm | TransformedReader):
                folded = module.fold_()
                self.layers.set_submodule(name, folded)
                if isinstance(module, TransformedNorm):
                    attach_online_(folded, _operations(module.transforms, folded.get_parameter("weight").dtype))
        for site in self.sites:
            if site.kind == "norm" and site.direct and not site.kept:
                norm = self.layers.get_submodule(site.source)
                own = TokenNorm.of(norm, [self.layers.get_submodule(name) for name in site.consumers])
                if own is not None:
                    attach_online_(own, getattr(norm, "online", ()))
                    self.layers.set_submodule(site.source, own)

    def pack_(self, round_weight: Callable[[FakeQuantLinear], QTensor] = FakeQuantLinear.quantize) -> None:
        """Pack every linear and fold the norms."""
        for name, linear in self.linears.items():
            self.pack_linear_(name, round_weight(linear))
        self.fold_sources_()

    def kept_layers(self) -> nn.ModuleDict:
        """The layers as they are now, for ``restore_``; what nothing changes is shared, linears' weights above all."""
        shared: list[Any] = [linear.weight for linear in self.linears.values()]
        shared += [module.config for module in self.layers.modules() if hasattr(module, "config")]
        return copy.deepcopy(self.layers, {id(part): part for part in shared})

    def restore_(self, kept: nn.ModuleDict) -> None:
        """Become what ``kept_layers`` gave; the model's layers are the same objects as before."""
        for name, layer in self.layers.items():
            layer.__dict__.update(kept[name].__dict__)

    def structure(self) -> PackedStructure:
        """What the packed block consists of besides its tensors."""
        return PackedStructure.of(self.layers, self.activations)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the packed block, by their full names in the model."""
        return {f"{self.parent}.{name}": tensor for name, tensor in self.layers.state_dict().items()}

    def load_(self, structure: PackedStructure, tensors: Mapping[str, Tensor]) -> None:
        """Become the packed block that ``structure`` and ``tensors`` came from."""
        own = {name.removeprefix(f"{self.parent}."): tensor for name, tensor in tensors.items()}
        structure.build_(self.layers, own)
        self.layers.load_state_dict(own)


def _names(stages: Iterable[Iterable[Iterable[str]]]) -> set[str]:
    return {name for stage in stages for group in stage for name in group}


def _operations(transforms: Iterable[Transform], dtype: torch.dtype) -> list[OnlineOp]:
    return [op.to(dtype) for transform in transforms if (op := transform.online_op()) is not None]
