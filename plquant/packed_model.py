"""Open a quantized model so that it runs from its packed integers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from plquant.architectures.moe import Experts, unfuse_experts_
from plquant.formats.checkpoint import names_in, packed_linears, tensor_names
from plquant.formats.quantization_config import (
    activations_of,
    attention_of,
    grids_of,
    norms_of,
    online_of,
    quantization_config,
)
from plquant.nn.attention import serve_attention_
from plquant.nn.online import Online
from plquant.nn.output_layer import OutputLayer
from plquant.nn.packed_linear import PackedLinear
from plquant.nn.packed_structure import PackedStructure
from plquant.nn.token_norm import TokenNorm
from plquant.quant.grid import ActivationGrid

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANT_METHOD = "plquant"
# What building and filling a model raises where it is described by nonsense
DAMAGED = (KeyError, TypeError, AttributeError, IndexError, ArithmeticError, AssertionError, RuntimeError)


@register_quantization_config(QUANT_METHOD)
class PackedConfig(QuantizationConfigMixin):
    """Tells transformers' loader what the model consists of.

    Args:
        stored: The ``quantization_config`` of config.json.
        kernels: Lay weights out for kernels.
    """

    def __init__(self, stored: dict[str, Any], kernels: bool = True, **kwargs: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.stored, self.kernels = stored, kernels

    def structure(self, tensors: Iterable[str]) -> PackedStructure:
        """What a model with these tensors consists of."""
        return PackedStructure(
            grids_of(self.stored, packed_linears(tensors)),
            activations_of(self.stored),
            attention_of(self.stored),
            online_of(self.stored),
            norms_of(self.stored),
        )


@register_quantizer(QUANT_METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts everything in place before transformers fills in the tensors."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        config = self.quantization_config
        assert isinstance(config, PackedConfig)
        if checkpoint_files is None:
            raise ValueError("a model quantized by plquant is opened from the files of its folder only")
        self.files = [names_in([path]) for path in checkpoint_files]
        tensors = list(itertools.chain(*self.files))
        unfuse_experts_(model)
        config.structure(tensors).build_(model, set(tensors))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        assert isinstance(self.quantization_config, PackedConfig)
        if self.quantization_config.kernels:
            for names in self.files:
                _leave_file_(model, names)
            _lay_out_rest_(model)
        return model

    def is_serializable(self) -> bool:
        """The folder it came from is the serialized form."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Codes are fixed."""
        return False


def _leave_file_(lm: nn.Module, names: list[str]) -> None:
    """Lay the packed linears among these tensors, all of one file, out for kernels, and copy everything else.

    A file is mapped as a whole, and the last norm of it would keep its packed words in memory.
    """
    linears = [lm.get_submodule(name) for name in packed_linears(names)]
    for linear in linears:
        assert isinstance(linear, PackedLinear)
        linear.prepare_()
    if not linears or any(linear.prepared is None for linear in linears):
        return
    others = set(names)
    for name, tensor in itertools.chain(lm.named_parameters(), lm.named_buffers()):
        if name in others:
            tensor.data = tensor.data.clone()


def lay_out_(lm: PreTrainedModel, device: torch.device) -> None:
    """Let a model whose blocks are packed run as ``load`` gives it, by kernels of a device that it may yet go to."""
    for module in lm.modules():
        if isinstance(module, PackedLinear):
            module.kernels = True
            if next(module.buffers()).device.type == device.type:
                module.prepare_()
    _lay_out_rest_(lm)


def _lay_out_rest_(lm: PreTrainedModel) -> None:
    for module in lm.modules():
        if isinstance(module, Online):
            module.kernels = True
        if isinstance(module, TokenNorm):
            module.prepare_()
    serve_attention_(lm)
    head = lm.get_output_embeddings()
    if type(head) is nn.Linear:
        lm.set_output_embeddings(OutputLayer.of(head))


def stored_config(lm: nn.Module, activations: ActivationGrid | None = None) -> dict[str, Any]:
    """The ``quantization_config`` of a model whose blocks are packed.

    Args:
        lm: The model.
        activations: The grid that its activations were quantized on.
    """
    structure = PackedStructure.of(lm, activations)
    unquantized = [name for name, module in lm.named_modules() if isinstance(module, nn.Linear)]
    return quantization_config(
        structure.grids,
        unquantized,
        structure.activations,
        structure.attention,
        structure.online,
        structure.norms,
        rewritten=any(isinstance(m, Experts) or getattr(m, "clip", None) is not None for m in lm.modules()),
    )


def load(
    folder: str | Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False, kernels: bool = True
) -> PreTrainedModel:
    """A model quantized by plquant, its linears running from packed integers, activations quantized as in its run.

    Args:
        folder: Output folder of ``plquant calibrate``.
        dtype: Of activations, scales and what is not quantized; the folder's own if not given.
        trust_remote_code: Run Python code that comes with the model.
        kernels: Multiply with the packed integers where there are kernels for the device. Without, weights are unpacked
            in every forward, to the numbers that stock transformers and the fit of the blocks compute with: kernels do
            not round the product of code and scale to the model's dtype, which differs from these by that rounding.

    Raises:
        ValueError: The folder's model is not quantized in a format that plquant reads, or damaged.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        stored = getattr(config, "quantization_config", None)
        if stored is None:
            raise ValueError(f"{folder} holds no quantized model; give the output folder of `plquant calibrate`")
        PackedConfig(stored).structure(tensor_names(Path(folder)))  # refuses other formats
        config.quantization_config = {"quant_method": QUANT_METHOD, "stored": stored, "kernels": kernels}
        lm = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype or config.dtype, trust_remote_code=trust_remote_code
        )
    except DAMAGED as error:
        raise ValueError(
            f"{folder}: config.json or the tensors are not what plquant writes, {error!r}; `plquant verify` says which "
            "is damaged"
        ) from error
    return lm.eval().requires_grad_(False)
