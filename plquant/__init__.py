"""plquant: post-training quantization of large language models on PyTorch Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from plquant import transformers_hook

__version__ = "0.1.0"

if TYPE_CHECKING:
    from plquant import data, methods
    from plquant.kv_cache import integer_cache
    from plquant.model import QuantizedLM
    from plquant.packed_model import load
    from plquant.quant.grid import ActivationGrid, IntGrid
    from plquant.trainer import BlockwiseTrainer

_PUBLIC = {
    "ActivationGrid": "plquant.quant.grid",
    "IntGrid": "plquant.quant.grid",
    "QuantizedLM": "plquant.model",
    "BlockwiseTrainer": "plquant.trainer",
    "load": "plquant.packed_model",
    "integer_cache": "plquant.kv_cache",
}
_MODULES = ("data", "methods")

transformers_hook.install()

__all__ = [
    "ActivationGrid",
    "BlockwiseTrainer",
    "IntGrid",
    "QuantizedLM",
    "__version__",
    "data",
    "integer_cache",
    "load",
    "methods",
]


def __getattr__(name: str) -> Any:
    """Import on first use: ``import plquant`` itself takes no time."""
    if name in _MODULES:
        return importlib.import_module(f"plquant.{name}")
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'plquant' has no attribute {name!r}")
