"""A quantized linear at run time: packed words and scales are all it keeps in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plquant.formats.packing import pack, unpack
from plquant.kernels import run_time
from plquant.kernels.cpu_layout import Shape
from plquant.nn.activation_quantizer import ActivationQuantizer
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.nn.kronecker import applied, factors_of
from plquant.quant.affine import QTensor
from plquant.quant.grid import IntGrid

STORED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


class PackedLinear(nn.Module):
    """y = x W^T + b with W in integers.

    As it is made, its buffers are named and laid out as in the checkpoint, to be saved and loaded, and the weight is
    unpacked in every forward. ``prepare_`` puts it into the order that kernels read instead; it is still saved under
    the checkpoint's names.

    Args:
        weight: The quantized weight.
        bias: [O] or ``None``.

    Attributes:
        online: Run-time operations on the input, [..., I] -> [..., I'], where its source is no norm; or ``None``.
        inputs: Quantizes what is multiplied with the weight, or ``None`` for 16-bit activations.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None
    scale: Tensor

    def __init__(self, weight: QTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.grid: IntGrid = weight.grid
        self.out_features, self.in_features = weight.codes.shape
        for name, tensor in pack(weight).items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)
        self.prepared: run_time.RunTime | None = None
        self.kernels = False  # wanted, wherever the weight goes
        self.online: nn.Module | None = None
        self.inputs: ActivationQuantizer | None = None

    @classmethod
    def empty(cls, linear: nn.Linear | FakeQuantLinear, grid: IntGrid) -> PackedLinear:
        """One to load tensors into, of the shape, dtype and device of ``linear``."""
        weight = linear.weight
        codes = torch.empty_like(weight, dtype=torch.int8 if grid.symmetric else torch.uint8)
        out_features, in_features = weight.shape
        size = grid.size(grid.grouped_width(weight.shape))
        along_in, along_out = (out_features, in_features // size), (out_features // size, in_features)
        groups = along_in if grid.axis == "in" else along_out
        scale = torch.empty(groups, dtype=weight.dtype, device=weight.device)
        zero_point = None if grid.symmetric else torch.empty(groups, dtype=torch.uint8, device=weight.device)
        bias = None if linear.bias is None else torch.empty_like(linear.bias)
        return cls(QTensor(codes, scale, zero_point, grid), bias)

    @torch.no_grad()
    def prepare_(self) -> None:
        """Lay the weight out for the kernels of its device, and again when it is moved to another.

        Nothing is done where there are no kernels for it.
        """
        self.kernels = True
        if self.prepared is not None:
            return
        along_out, shape = self.grid.axis == "out", (self.out_features, self.in_features)
        sizes = Shape(*shape, self.grid.bits, self.grid.size(self.grid.grouped_width(shape)), along_out)
        scale = self.weight_scale
        kind = run_time.kind(scale.device, scale.dtype, sizes, self.inputs is not None)
        if kind is None:
            return
        weight, middle = self.quantized(), 1 << (self.grid.bits - 1)
        codes = weight.codes.view(torch.uint8) + middle if self.grid.symmetric else weight.codes
        for name in STORED:
            self._buffers.pop(name, None)
        self.prepared, tensors = kind.lay_out(run_time.Affine(codes, scale, weight.zero_point), sizes)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def _restore_(self) -> None:
        """Undo ``prepare_``."""
        assert self.prepared is not None
        stored = pack(self.quantized())
        for name in self.prepared.names:
            del self._buffers[name]
        self.prepared = None
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)

    @contextmanager
    def laid_out(self) -> Iterator[None]:
        """Within it as after ``prepare_``; afterwards as before, from what was kept meanwhile."""
        if self.prepared is not None:
            yield
            return
        wanted, kept = self.kernels, {name: self._buffers[name] for name in STORED if name in self._buffers}
        try:
            self.prepare_()
            yield
        finally:
            self.kernels = wanted
            if self.prepared is not None:
                for name in self.prepared.names:
                    del self._buffers[name]
            self.prepared = None
            for name in kept.keys() - self._buffers.keys():
                self.register_buffer(name, kept[name])

    def quantized(self) -> QTensor:
        """The codes, scale and zero-point, unpacked."""
        if self.prepared is not None:
            codes, scale, zero_point = self.prepared.restore(self._tensors())
            signed = (codes - (1 << (self.grid.bits - 1))).view(torch.int8) if self.grid.symmetric else codes
            return QTensor(signed, scale, zero_point, self.grid)
        tensors = {name: tensor for name, tensor in self.named_buffers(recurse=False) if name != "bias"}
        return unpack(tensors, torch.Size((self.out_features, self.in_features)), self.grid)

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype of the stored scale."""
        return self.weight_scale.dtype if self.prepared is None else self.prepared.dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., I], or tokens that a ``TokenNorm`` quantized -> [..., O]."""
        if x.dtype == torch.int8:
            assert isinstance(self.prepared, run_time.Integers) and self.inputs is not None
            bias = None if self.bias is None else self.bias.to(self.prepared.dtype)
            return self.prepared.of_tokens(x, self._tensors(), bias, self.inputs.symmetric)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        inputs = None
        if self.inputs is not None:
            quantizer = self.inputs
            inputs = run_time.Inputs(quantizer.bits, quantizer.symmetric, quantizer.offset, quantizer.clip)
        if isinstance(self.prepared, run_time.Integers) and isinstance(self.online, nn.Sequential):
            *before, last = self.online
            for op in before:
                x = applied(op, x)
            factors = factors_of(last, x) if inputs is not None and inputs.clip is None else None
            x = x if factors is not None else applied(last, x)
            return self.prepared.linear(x, self._tensors(), bias, inputs, factors)
        x = x if self.online is None else self.online(x)
        if self.prepared is None:
            x = x if self.inputs is None else self.inputs(x)
            return F.linear(x, self.quantized().dequantize().to(x.dtype), bias)
        return self.prepared.linear(x, self._tensors(), bias, inputs)

    def _tensors(self) -> run_time.Tensors:
        assert self.prepared is not None
        return {name: self._buffers[name] for name in self.prepared.names}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """``to`` and the like: another device or dtype has kernels of its own, or none."""
        if self.prepared is not None:
            device, dtype = self.scale.device, self.prepared.dtype
            probe = fn(torch.empty(0, dtype=dtype, device=device))
            if (probe.device, probe.dtype) != (device, dtype):
                self._restore_()
        laid_out = {} if self.prepared is None else {name: self._buffers.pop(name) for name in self.prepared.names}
        super()._apply(fn, recurse)
        for name, tensor in laid_out.items():
            if tensor is not None and (moved := fn(tensor)).dtype == tensor.dtype:  # else it is fp32 in any model
                tensor = moved
            self._buffers[name] = tensor
        if self.kernels:
            self.prepare_()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.prepared is not None:
            destination.update({prefix + name: tensor for name, tensor in pack(self.quantized()).items()})

    def extra_repr(self) -> str:
        """Shape and grid, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, grid={self.grid}"
