"""One decoder block of a checkpoint, or what is outside of the blocks, read with all that transformers does to weights.

Renamed, merged (experts) and tied as in a load of the whole model: transformers itself loads, into a model in which the
other blocks are empty.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PART_METHOD = "plquant-part"


@register_quantization_config(PART_METHOD)
class PartConfig(QuantizationConfigMixin):
    """Tells transformers' loader which blocks to leave out; nothing is quantized.

    Args:
        blocks: Name of the list of decoder blocks.
        number: Of the one that is read, or ``None``.
    """

    def __init__(self, blocks: str, number: int | None = None, **kwargs: Any) -> None:
        self.quant_method = PART_METHOD  # type: ignore[assignment]
        self.blocks, self.number = blocks, number


@register_quantizer(PART_METHOD)
class PartQuantizer(HfQuantizer):
    """Empties the other blocks before transformers looks for their tensors."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        assert isinstance(config, PartConfig)
        layers = model.get_submodule(config.blocks)
        assert isinstance(layers, nn.ModuleList)
        for number in range(len(layers)):
            if number != config.number:
                layers[number] = nn.Identity()
        return model

    def is_serializable(self) -> bool:
        """It is not a model of its own."""
        return False

    @property
    def is_trainable(self) -> bool:
        """It does not run."""
        return False


def only_block(config: PretrainedConfig, blocks: str, number: int | None) -> PretrainedConfig:
    """A configuration with which ``from_pretrained`` reads one block, and what is outside of the blocks.

    Args:
        config: Of the model.
        blocks: Name of the list of blocks.
        number: Of the block, or ``None`` for none.
    """
    config = copy.deepcopy(config)
    config.quantization_config = {"quant_method": PART_METHOD, "blocks": blocks, "number": number}
    return config
