"""The lean loop gives the tokens of transformers' ``generate``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from plquant.cli import main
from plquant.generation import generate
from tests.families import VOCAB, byte_tokenizer, prepare_linears_, tiny_model
from tests.test_packed_model import packed, save


def test_tokens_are_those_of_transformers() -> None:
    lm = packed(dtype=torch.float32)
    prepare_linears_(lm)
    lm.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    ids = torch.arange(3, 12)[None] % VOCAB
    theirs = lm.generate(ids, max_new_tokens=12, do_sample=False)[0, 9:]
    assert torch.equal(torch.stack([*generate(lm, ids, torch.ones_like(ids), 12)], 1)[0], theirs)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "mistral", "starcoder2"])
def test_a_batch_padded_on_the_left_gives_what_each_prompt_gives_alone(family: str) -> None:
    """With RoPE, and with learned positions, which no shift of all of them leaves alone; and with windows."""
    lm = tiny_model(family)
    lm.generation_config = GenerationConfig(eos_token_id=None)
    short, long = torch.arange(3, 8) % VOCAB, torch.arange(20, 29) % VOCAB
    padding = torch.zeros(4, dtype=torch.long)
    ids = torch.stack([torch.cat([padding, short]), long])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    logits: list[Tensor] = []  # of every step, last token: tokens of a random model say little
    lm.get_output_embeddings().register_forward_hook(lambda module, args, output: logits.append(output[:, -1]))

    def run(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        logits.clear()
        tokens = torch.stack([*generate(lm, ids, mask, 10)], 1)
        return tokens, torch.stack(logits, 1)

    tokens, both = run(ids, mask)
    for row, prompt in enumerate((short, long)):
        alone = run(prompt[None], torch.ones_like(prompt)[None])
        assert torch.equal(tokens[row], alone[0][0])
        torch.testing.assert_close(both[row], alone[1][0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_tokens() -> None:
    lm = packed(dtype=torch.float32)
    prepare_linears_(lm)
    lm.generation_config = GenerationConfig(eos_token_id=None)
    for ids in (torch.arange(3, 12)[None] % VOCAB, torch.arange(40, 52).view(2, 6)):
        mask = torch.ones_like(ids)
        eager = torch.stack([*generate(lm, ids, mask, 8)], 1)
        assert torch.equal(torch.stack([*generate(lm, ids, mask, 8, compiled=True)], 1), eager)


def test_an_end_stops_it() -> None:
    lm = tiny_model("llama")
    ids = torch.arange(3, 12)[None] % VOCAB
    lm.generation_config = GenerationConfig(eos_token_id=None)
    free = torch.cat([*generate(lm, ids, torch.ones_like(ids), 8)]).tolist()
    lm.generation_config = GenerationConfig(eos_token_id=[free[3]])
    stopped = torch.cat([*generate(lm, ids, torch.ones_like(ids), 8)]).tolist()
    assert stopped == free[: free.index(free[3]) + 1]


def test_the_command_prints_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = packed(dtype=torch.float32)
    folder = save(lm, tmp_path / "out")
    byte_tokenizer().save_pretrained(folder)
    main(["generate", str(folder), "--prompt", "!", "#", "--max_new_tokens", "3"])
    printed = capsys.readouterr()
    assert printed.out.startswith("!") and "tokens/s" in printed.err
    with pytest.raises(SystemExit, match="--max_new_tokens=0 generates nothing"):
        main(["generate", str(folder), "--prompt", "!", "--max_new_tokens", "0"])
    with pytest.raises(SystemExit, match="--device=cuda:99 is not here; choose among cpu"):
        main(["generate", str(folder), "--prompt", "!", "--device", "cuda:99"])
    with pytest.raises(SystemExit, match="--device=abacus is not here; choose among cpu"):
        main(["generate", str(folder), "--prompt", "!", "--device", "abacus"])
