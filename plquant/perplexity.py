"""Perplexity: the metric, a result with the protocol it was measured under, and the comparison of two results."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

ROWS = 256  # logits turned to fp32 at once: [256, vocabulary]


class TokenNLL(Metric):
    """Mean negative log-likelihood of a window's tokens 2 to T, in nats, over all windows.

    torchmetrics' own ``Perplexity`` takes the logarithm of a softmax, which is infinite for a model damaged enough.
    """

    full_state_update = False
    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, ids: Tensor) -> None:
        """Take in logits [B, T, V], any floating dtype, of the ids [B, T]."""
        predicted, following = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        for rows, targets in zip(predicted.split(ROWS), following.split(ROWS), strict=True):
            self.total += F.cross_entropy(rows.float(), targets, reduction="sum")
        self.tokens += following.numel()

    def compute(self) -> Tensor:
        """The mean, fp64."""
        return self.total / self.tokens


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it was measured on.

    Attributes:
        model: What was measured.
        nll: Mean negative log-likelihood per predicted token, nats.
        dtype: Of the model's activations.
        protocol: Text, its hash, tokens, window length, windows, words.
    """

    model: str
    nll: float
    dtype: str
    protocol: dict[str, Any]

    @property
    def perplexity(self) -> float:
        """Per token: exp(nll)."""
        return math.exp(min(self.nll, 700.0))

    @property
    def word_perplexity(self) -> float:
        """Per word of the text: exp(nll * tokens / words), comparable between tokenizers."""
        return math.exp(min(self.nll * self.protocol["tokens"] / max(self.protocol["words"], 1), 700.0))

    def compare(self, other: PerplexityResult) -> float:
        """This perplexity over the other's.

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
        return math.exp(self.nll - other.nll)

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
            return cls(**{field.name: content[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result written by `plquant validate`: {error!r}") from error
