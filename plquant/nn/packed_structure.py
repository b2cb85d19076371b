"""What a quantized model consists of besides its tensors: read off a packed model, and put in place before loading."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from plquant.nn.activation_quantizer import ActivationQuantizer
from plquant.nn.attention import CHILD, AttentionQuantizer, quantize_attention_
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.nn.online import attach_online_, make_ops, online_entries
from plquant.nn.packed_linear import PackedLinear
from plquant.nn.token_norm import TokenNorm
from plquant.quant.grid import ActivationGrid, IntGrid


@dataclass(frozen=True)
class PackedStructure:
    """What a quantized model, or a block of one, consists of.

    Attributes:
        grids: Name of every packed linear -> its grid.
        activations: Grid of the activations, or ``None``.
        attention: Names of the attention modules that are quantized inside.
        online: Name of every module with run-time operations -> these, as ``online_entries`` gives them.
        norms: Name of every ``TokenNorm`` -> its epsilon and the names of the linears that read it.
    """

    grids: Mapping[str, IntGrid]
    activations: ActivationGrid | None = None
    attention: Collection[str] = ()
    online: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    norms: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, activations: ActivationGrid | None) -> PackedStructure:
        """That of a packed model.

        Args:
            model: The model or block.
            activations: The grid its activations were quantized on.
        """
        packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
        bits = None if activations is None else activations.bits
        for name, linear in packed.items():
            found = None if linear.inputs is None else linear.inputs.bits
            assert found == bits, f"the input of {name} has {found} bits, not {bits}"
        attention = [
            name for name, m in model.named_modules() if isinstance(getattr(m, CHILD, None), AttentionQuantizer)
        ]
        names = {linear: name for name, linear in packed.items()}
        norms = {
            name: {"eps": m.eps, "readers": [names[linear] for linear in m.readers]}
            for name, m in model.named_modules()
            if isinstance(m, TokenNorm)
        }
        return cls({name: m.grid for name, m in packed.items()}, activations, attention, online_entries(model), norms)

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "grids": {name: asdict(grid) for name, grid in self.grids.items()},
            "activations": None if self.activations is None else asdict(self.activations),
            "attention": list(self.attention),
            "online": dict(self.online),
            "norms": dict(self.norms),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PackedStructure:
        """The inverse of ``as_dict``."""
        activations = content["activations"]
        return cls(
            {name: IntGrid(**grid) for name, grid in content["grids"].items()},
            None if activations is None else ActivationGrid(**activations),
            content["attention"],
            content["online"],
            content.get("norms", {}),  # blocks of an earlier version have none
        )

    def build_(self, model: nn.Module, tensors: Collection[str]) -> None:
        """Put all of it in the place of the original modules, empty.

        Args:
            model: The original model or block, its linears on the grid of the calibration or not.
            tensors: Names of the tensors that will be loaded, which tell whether input quantizers have offsets or clip.
        """
        if self.activations is not None:
            quantize_attention_(model, self.attention, self.activations)
        with _in_float32():
            for name, grid in self.grids.items():
                linear = model.get_submodule(name)
                assert isinstance(linear, nn.Linear | FakeQuantLinear)
                packed = PackedLinear.empty(linear, grid)
                packed.inputs = self._inputs(f"{name}.inputs", packed, tensors)
                model.set_submodule(name, packed)
            for name, entry in self.norms.items():
                readers = [model.get_submodule(reader) for reader in entry["readers"]]
                linears = [reader for reader in readers if isinstance(reader, PackedLinear)]
                if not linears or len(linears) < len(readers) or not isinstance(entry["eps"], float):
                    raise ValueError(f"{name} is no norm of quantized linears: {entry}")
                norm = TokenNorm(model.get_submodule(name).get_parameter("weight"), entry["eps"], linears)
                model.set_submodule(name, norm)
            for name, entry in self.online.items():
                module = model.get_submodule(name)
                device = next(itertools.chain(module.parameters(), module.buffers(), model.parameters())).device
                attach_online_(module, [op.to(device) for op in make_ops(entry)], entry["at"])

    def _inputs(self, name: str, linear: PackedLinear, tensors: Collection[str]) -> ActivationQuantizer | None:
        if self.activations is None or self.activations.bits is None:
            return None
        device = linear.weight_packed.device
        offset = torch.empty(linear.in_features, device=device) if f"{name}.offset" in tensors else None
        clip = torch.empty(2, device=device) if f"{name}.clip" in tensors else None
        return ActivationQuantizer(self.activations.bits, self.activations.symmetric, offset, clip)


@contextmanager
def _in_float32() -> Iterator[None]:
    """Within it new tensors are fp32: while transformers loads a model they would be in the model's dtype."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
