"""Calibration text that the model writes itself, for when there is no data like what it was trained on."""

# Letters: N num_samples, S seq_len, B windows sampled at a time.

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from plquant.data.base import Split, TextData, require_at_least
from plquant.data.builtin import builtin_text, builtin_text_name
from plquant.evaluating import evaluating


class SelfGenerated(TextData):
    """Calibration text sampled from the model itself: no data needed (LLM-QAT, arXiv 2305.17888).

    Each window starts with the model's beginning-of-text token, or with a random token where it has none, and is
    sampled from the full distribution, on the trainer's device. Validation text is the held-out fifth of
    ``BuiltinText``.

    Args:
        temperature: Divides the logits before sampling: 1 samples what the model believes, less is more repetitive.
        generation_batch_size: Windows sampled at a time. Memory grows with it (one key-value cache each); the windows
            change with it as with the seed, and from one kind of device to another.
    """

    def __init__(self, temperature: float = 1.0, generation_batch_size: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"--data.temperature={temperature}: a number above 0 is needed; 1 samples as trained.")
        require_at_least(1, generation_batch_size=generation_batch_size)
        require_at_least(2, seq_len=self.seq_len)  # one token to start from and one to sample
        self.temperature, self.generation_batch_size = temperature, generation_batch_size
        self.save_hyperparameters()

    def text(self, split: Split) -> str:
        """The held-out fifth of the built-in text; calibration has ids only."""
        if split == "calibration":
            raise NotImplementedError("SelfGenerated samples token ids from the model; use calibration_ids(model).")
        return builtin_text(split)

    def text_name(self, split: Split) -> str:
        """Where the text comes from."""
        return "sampled from the model" if split == "calibration" else builtin_text_name(split)

    def calibration_ids(self, model: Any) -> Tensor:
        """[N, S] int64 on the CPU, sampled from ``model.lm`` under a forked random state."""
        from tqdm import tqdm

        if getattr(model, "streaming", False):
            raise ValueError(
                "--data=SelfGenerated runs the whole model for every token, and --model.streaming=true holds one block "
                "at a time; give a text, or leave out the streaming"
            )
        sizes = [len(part) for part in torch.arange(self.num_samples).split(self.generation_batch_size)]
        # all CUDA devices are forked: torch.manual_seed seeds every one of them
        fork = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
        device = model.lm.device if self.trainer is None else self.trainer.strategy.root_device
        with _on_device(model.lm, device), evaluating(model.lm), fork:
            torch.manual_seed(self.seed)
            return torch.cat([self._sample(model, size) for size in tqdm(sizes, desc="Sampling windows", leave=False)])

    def _sample(self, model: Any, size: int) -> Tensor:
        start = start_tokens(model, size).to(model.lm.device)
        ids = model.lm.generate(start, attention_mask=torch.ones_like(start), **self._generation_settings(model))
        return ids.to("cpu", torch.int64)

    def _generation_settings(self, model: Any) -> dict[str, Any]:
        """Plain sampling, whatever the checkpoint's generation_config.json prefers, and no end before S tokens."""
        end = end_tokens(model)
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": 0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "num_beams": 1,
            "use_cache": True,
            "max_new_tokens": self.seq_len - 1,
            "suppress_tokens": end or None,
            "pad_token_id": end[0] if end else 0,  # never written: no row ends early
        }


@contextmanager
def _on_device(lm: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Moved there, and back to where it was."""
    home = next(lm.parameters()).device
    lm.to(device)
    try:
        yield
    finally:
        lm.to(home)


def start_tokens(model: Any, size: int) -> Tensor:
    """[B, 1]: the beginning-of-text token, or random tokens of the vocabulary where the tokenizer has none."""
    if model.tokenizer.bos_token_id is not None:
        return torch.full((size, 1), model.tokenizer.bos_token_id)
    return torch.randint(min(len(model.tokenizer), model.lm.config.get_text_config().vocab_size), (size, 1))


def end_tokens(model: Any) -> list[int]:
    """Every token that ends a text, for the tokenizer or for the checkpoint's generation settings."""
    configured = model.lm.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*configured, model.tokenizer.eos_token_id] if token is not None})
