"""Open a quantized model so that it runs from its packed integers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from plquant.formats.checkpoint import grid_of, packed_linears
from plquant.nn.packed_linear import PackedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANT_METHOD = "plquant"


@register_quantization_config(QUANT_METHOD)
class PackedConfig(QuantizationConfigMixin):
    """Tells transformers' loader which linears are packed, and on which grid."""

    def __init__(self, stored: dict[str, Any], linears: list[str], **kwargs: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.stored, self.linears = stored, linears


@register_quantizer(QUANT_METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts ``PackedLinear`` in place before transformers fills in the tensors."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        assert isinstance(config, PackedConfig)
        grid = grid_of(config.stored)
        for name in config.linears:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, PackedLinear.empty(linear, grid))
        return model

    def is_serializable(self) -> bool:
        """The folder it came from is the serialized form."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Codes are fixed."""
        return False


def load(folder: str | Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model quantized by plquant, its linears running from packed integers.

    Args:
        folder: Output folder of ``plquant calibrate``.
        dtype: Of activations, scales and what is not quantized; the folder's own if not given.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ValueError: The folder's model is not quantized in a format that plquant reads.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        raise ValueError(f"{folder} holds no quantized model; give the output folder of `plquant calibrate`")
    grid_of(stored)  # refuses other formats
    linears = packed_linears(Path(folder))
    config.quantization_config = {"quant_method": QUANT_METHOD, "stored": stored, "linears": linears}
    lm = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype or config.dtype, trust_remote_code=trust_remote_code
    )
    return lm.eval().requires_grad_(False)
