"""After ``import plquant``, transformers' ``from_pretrained`` opens folders of ours with our kernels.

Neither torch nor transformers is imported here: what transformers does changes when it is imported, or at once if it
was. A folder is ours if its ``quantization_config`` has an entry ``plquant``; with any other nothing changes. Who wants
transformers' own way for one of ours passes ``quantization_config=CompressedTensorsConfig()``.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO = "transformers.quantizers.auto"
ENTRY = "plquant"


def install() -> None:
    """Teach transformers; once is enough."""
    if AUTO in sys.modules:
        _teach(sys.modules[AUTO])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds one module, as others do, and has it changed as soon as it is there."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _teach(module)


def _teach(auto: Any) -> None:
    quantizer = auto.AutoHfQuantizer
    theirs = quantizer.merge_quantization_configs
    if getattr(theirs, "__module__", None) == __name__:
        return

    def merge_quantization_configs(cls: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        if (
            quantization_config_from_args is None
            and isinstance(quantization_config, dict)
            and ENTRY in quantization_config
        ):
            from plquant.packed_model import PackedConfig

            return PackedConfig(quantization_config)
        return theirs(quantization_config, quantization_config_from_args)

    quantizer.merge_quantization_configs = classmethod(merge_quantization_configs)
