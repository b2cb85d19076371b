"""What the tests of the text sources share: a text, models, errors, files."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from plquant.data import TextData
from tests.families import BOS, EOS, VOCABULARY, byte_tokenizer


class GivenText(TextData):
    """Both splits are the text given."""

    def __init__(self, text: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.given = text

    def text(self, split: str) -> str:
        """The text given."""
        return self.given

    def text_name(self, split: str) -> str:
        """A fixed name."""
        return "the given text"


MODEL = SimpleNamespace(tokenizer=byte_tokenizer())


def tiny_llama(vocab_size: int = VOCABULARY, **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = LlamaForCausalLM(
            LlamaConfig(vocab_size=vocab_size, bos_token_id=BOS, eos_token_id=EOS, **sizes, **options)
        )
        lm.get_output_embeddings().weight.data.normal_()  # logits with some preference
    return lm


def decode(ids: torch.Tensor) -> str:
    return MODEL.tokenizer.decode(ids.tolist())


def fails(*parts: str, error: type[Exception] = ValueError) -> Any:
    """The error has all of these parts in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)
