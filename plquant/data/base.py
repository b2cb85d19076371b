"""What every source of text shares: how calibration windows are drawn and how the evaluation text is cut."""

# Letters: N num_samples, S seq_len, n evaluation windows, T eval_seq_len; all counts are tokens unless said otherwise.

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

Split = Literal["calibration", "validation"]


@dataclass(frozen=True)
class EvaluationText:
    """What perplexity is measured on, and how it is cut.

    Args:
        windows: [n, T] int64, token ids.
        protocol: What another run must match to be comparable: ``text`` (name for people), ``text_sha256`` (of the ids
            in ``windows`` as int64 little endian), ``tokens`` = n T, ``window_length`` = T, ``windows`` = n and
            ``words`` (whitespace-separated words of the decoded windows, special tokens left out).
    """

    windows: Tensor
    protocol: dict[str, Any]


class TextData(L.LightningDataModule, ABC):
    """Base of the text sources: a subclass says which text, this class draws and cuts the windows.

    Args:
        num_samples: Calibration windows to draw.
        seq_len: Length of each calibration window, in tokens.
        batch_size: Calibration windows per forward pass. Changes memory and speed, not which windows are drawn.
        seed: Seed of the random starts of the calibration windows. The same seed gives the same windows.
        eval_seq_len: Length of each evaluation window, in tokens. Perplexity depends on it: compare only equal lengths.
        eval_windows: Evaluate on this many windows from the start of the validation text; null takes all of it.
    """

    def __init__(
        self,
        num_samples: int = 128,
        seq_len: int = 512,
        batch_size: int = 1,
        seed: int = 0,
        eval_seq_len: int = 1024,
        eval_windows: int | None = None,
    ) -> None:
        super().__init__()
        require_at_least(1, num_samples=num_samples, seq_len=seq_len, batch_size=batch_size)
        require_at_least(0, seed=seed)
        require_at_least(2, eval_seq_len=eval_seq_len)  # the first token of a window predicts, it is not predicted
        if eval_windows is not None:
            require_at_least(1, eval_windows=eval_windows)
        self.num_samples, self.seq_len, self.batch_size, self.seed = num_samples, seq_len, batch_size, seed
        self.eval_seq_len, self.eval_windows = eval_seq_len, eval_windows
        self._evaluation: tuple[Any, EvaluationText] | None = None
        self.save_hyperparameters()

    @abstractmethod
    def text(self, split: Split) -> str:
        """The whole text of a split, before tokenization."""

    @abstractmethod
    def text_name(self, split: Split) -> str:
        """The text of a split as people call it; appears in errors and in the protocol."""

    def calibration_ids(self, model: Any) -> Tensor:
        """Windows at random places of the tokenized calibration text, as GPTQ draws them (arXiv 2210.17323, its code).

        Args:
            model: Anything with a Hugging Face ``tokenizer``.

        Returns:
            [N, S] int64.

        Raises:
            ValueError: The text has fewer than N S tokens.
        """
        ids = self._tokenize(model, "calibration")
        self._require_enough(len(ids))
        generator = torch.Generator().manual_seed(self.seed)
        starts = torch.randint(len(ids) - self.seq_len + 1, (self.num_samples,), generator=generator)
        return torch.stack([ids[start : start + self.seq_len] for start in starts.tolist()])

    def evaluation_text(self, model: Any) -> EvaluationText:
        """The validation text in consecutive windows, with the protocol; kept for the next call with this tokenizer."""
        if self._evaluation is None or self._evaluation[0] is not model.tokenizer:
            windows = self._first(self.evaluation_windows(model))
            self._evaluation = (model.tokenizer, EvaluationText(windows, self._protocol(windows, model.tokenizer)))
        return self._evaluation[1]

    def evaluation_windows(self, model: Any) -> Tensor:
        """[n, T] int64: the validation text tokenized once and cut without overlap, the incomplete tail dropped."""
        ids, length = self._tokenize(model, "validation"), self.eval_seq_len
        if len(ids) < length:
            shorter = f"use --data.eval_seq_len={len(ids)} or less, or " if len(ids) >= 2 else "use "
            raise ValueError(
                f"--data.eval_seq_len={length} needs a validation text of at least {length} tokens, but "
                f"{self.text_name('validation')} has {len(ids)}; {shorter}a longer text."
            )
        return ids[: len(ids) // length * length].view(-1, length)

    def val_dataloader(self) -> DataLoader:
        """The evaluation windows one by one, each [1, T] int64; of several processes each has its share."""
        assert self.trainer is not None, "the trainer attaches itself before it asks for a dataloader"
        windows: Any = self.evaluation_text(self.trainer.lightning_module).windows
        windows = share_of(windows, self.trainer.global_rank, self.trainer.world_size)
        # its own generator: an iterating DataLoader draws from the global one even when it does not shuffle
        return DataLoader(windows, batch_size=1, generator=torch.Generator().manual_seed(self.seed))

    def _tokenize(self, model: Any, split: Split) -> Tensor:
        text = self.text(split)
        if not text.strip():
            raise ValueError(f"The {split} text is empty: {self.text_name(split)}; give a text with words in it.")
        # verbose=False: a text longer than the model's context is meant here, it is cut into windows afterwards
        return torch.tensor(model.tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)

    def _require_enough(self, tokens: int) -> None:
        if tokens >= self.num_samples * self.seq_len:
            return
        remedies = [
            f"--data.num_samples={tokens // self.seq_len}" if tokens >= self.seq_len else "",
            f"--data.seq_len={tokens // self.num_samples}" if tokens >= self.num_samples else "",
            "a longer text",
        ]
        raise ValueError(
            f"--data.num_samples={self.num_samples} windows of --data.seq_len={self.seq_len} need "
            f"{self.num_samples * self.seq_len} tokens, but the calibration text {self.text_name('calibration')} has "
            f"{tokens}; use {' or '.join(filter(None, remedies))}."
        )

    def _first(self, windows: Tensor) -> Tensor:
        if self.eval_windows is not None and self.eval_windows > len(windows):
            raise ValueError(
                f"--data.eval_windows={self.eval_windows} windows of {windows.shape[1]} tokens were asked for, but "
                f"{self.text_name('validation')} gives {len(windows)}; use --data.eval_windows={len(windows)} or less, "
                "or leave it out to take all of them."
            )
        return windows[: self.eval_windows]

    def _protocol(self, windows: Tensor, tokenizer: Any) -> dict[str, Any]:
        decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return {
            "text": self.text_name("validation"),
            "text_sha256": ids_sha256(windows),
            "tokens": windows.numel(),
            "window_length": windows.shape[1],
            "windows": len(windows),
            "words": sum(len(decode(window).split()) for window in windows.tolist()),
        }


def share_of(windows: Tensor, rank: int, ranks: int) -> Tensor:
    """A stretch of the evaluation windows for each process.

    Raises:
        ValueError: There are fewer windows than processes.
    """
    if len(windows) < ranks:
        raise ValueError(
            f"{ranks} processes (--trainer.devices) cannot share {len(windows)} evaluation windows; use as many "
            "--data.eval_windows, or fewer processes"
        )
    return windows.tensor_split(ranks)[rank]


def ids_sha256(ids: Tensor) -> str:
    """Of token ids as int64 little endian."""
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()


def require_at_least(minimum: int, **values: int) -> None:
    """Refuse values below ``minimum`` with an error that names their flags."""
    wrong = {name: value for name, value in values.items() if not isinstance(value, int) or value < minimum}
    if wrong:
        given = ", ".join(f"--data.{name}={value}" for name, value in wrong.items())
        raise ValueError(f"{given}: a whole number of at least {minimum} is needed; leave it out for the default.")
