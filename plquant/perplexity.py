"""Perplexity: the metric, a result with the protocol it was measured under, and the comparison of two results."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

ROWS = 256  # logits turned to fp32 at once: [256, vocabulary]


class TokenNLL(Metric):
    """Mean negative log-likelihood of a window's tokens 2 to T, in nats, over all windows.

    torchmetrics' own ``Perplexity`` takes the logarithm of a softmax, which is infinite for a model damaged enough.
    """

    full_state_update = False
    sums: list[Tensor]
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", [], dist_reduce_fx="cat")  # of every window
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, ids: Tensor) -> None:
        """Take in logits [B, T, V], any floating dtype, of the ids [B, T]."""
        for window, following in zip(logits[:, :-1], ids[:, 1:], strict=True):
            pairs = zip(window.split(ROWS), following.split(ROWS), strict=True)
            sums = [F.cross_entropy(rows.float(), targets, reduction="sum").double() for rows, targets in pairs]
            self.sums.append(torch.stack(sums).sum(0, keepdim=True))
            self.tokens += following.numel()

    def compute(self) -> Tensor:
        """The mean, fp64."""
        return dim_zero_cat(self.sums).sum() / self.tokens

    def windows(self) -> list[float]:
        """The mean of every window of all processes, in the order they came; their tokens are as many in each."""
        with self.sync_context():
            sums = dim_zero_cat(self.sums)
            return [float(nll) for nll in sums * len(sums) / self.tokens]

    def seen(self) -> int:
        """Number of tokens, over all processes."""
        with self.sync_context():
            return int(self.tokens)


@dataclass(frozen=True)
class Comparison:
    """Of two models on the same windows.

    Attributes:
        difference: Of their mean negative log-likelihoods, nats per token; negative if the first is better.
        standard_error: Of that difference, from those of the windows: the windows' own difficulty, which both meet, is
            not in it. ``None`` with a single window.
    """

    difference: float
    standard_error: float | None

    @property
    def ratio(self) -> float:
        """The first perplexity over the second."""
        return math.exp(self.difference)

    def line(self, other: PerplexityResult) -> str:
        """For the terminal; ``other`` is the second."""
        error = "" if self.standard_error is None else f" with a standard error of {self.standard_error:.4f}"
        return (
            f"{self.ratio:.4f} times that of {other.model} ({other.perplexity:.3f}): a difference of "
            f"{self.difference:+.4f} nats a token, window by window{error}"
        )


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it was measured on.

    Attributes:
        model: What was measured.
        nll: Mean negative log-likelihood per predicted token, nats.
        dtype: Of the model's activations.
        protocol: Text, its hash, tokens, window length, windows, words.
        windows: The same mean of every window, for comparisons.
    """

    model: str
    nll: float
    dtype: str
    protocol: dict[str, Any]
    windows: list[float] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """Per token: exp(nll)."""
        return math.exp(min(self.nll, 700.0))

    @property
    def word_perplexity(self) -> float:
        """Per word of the text: exp(nll * tokens / words), comparable between tokenizers."""
        return math.exp(min(self.nll * self.protocol["tokens"] / max(self.protocol["words"], 1), 700.0))

    def line(self) -> str:
        """For the terminal."""
        return (
            f"{self.model}: perplexity {self.perplexity:.3f} per token, {self.word_perplexity:.2f} per word on "
            f"{self.protocol['text']} ({self.protocol['windows']} windows of {self.protocol['window_length']} "
            f"tokens, {self.dtype})"
        )

    def check_compares(self, other: PerplexityResult) -> None:
        """Refuse what does not compare.

        Raises:
            ValueError: They were measured on different text, windows or in another dtype.
        """
        # The name of the text is for people; its hash decides.
        ours, theirs = (
            {k: v for k, v in r.protocol.items() if k != "text"} | {"dtype": r.dtype} for r in (self, other)
        )
        differing = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
        if differing:
            rows = "\n".join(f"  {key}: {ours.get(key)} against {theirs.get(key)}" for key in differing)
            raise ValueError(
                f"perplexities of {self.model} and {other.model} were measured under different protocols and "
                f"do not compare:\n{rows}\nRun `plquant validate` on both with the same --data options."
            )

    def compare(self, other: PerplexityResult) -> Comparison:
        """This result against another that compares, window by window."""
        self.check_compares(other)
        ours, theirs = (torch.tensor(r.windows, dtype=torch.float64) for r in (self, other))
        difference = ours - theirs
        error = float(difference.std() / len(difference) ** 0.5) if len(difference) > 1 else None
        return Comparison(self.nll - other.nll, error)

    def as_dict(self) -> dict[str, Any]:
        """Fields and both perplexities, for JSON."""
        return {**asdict(self), "perplexity": self.perplexity, "word_perplexity": self.word_perplexity}

    @classmethod
    def read(cls, path: str | Path) -> PerplexityResult:
        """A result from its JSON file.

        Raises:
            ValueError: The file is not one.
        """
        try:
            content = json.loads(Path(path).read_text())
            return cls(**{f.name: content[f.name] for f in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result written by `plquant validate`: {error!r}") from error
