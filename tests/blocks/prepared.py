"""Blocks of the tiny models with what they are called with, and a toy block."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from plquant.blocks.capture import capture_calls
from plquant.blocks.discovery import Places, find_blocks, find_places
from plquant.blocks.proof import Proof
from tests.families import VOCAB, tiny_model

NUM_TOKENS = 12


def prepare(lm: PreTrainedModel) -> tuple[nn.ModuleList, Tensor, list[dict[str, Any]]]:
    """Blocks, an input and the arguments of each block."""
    _, blocks = find_blocks(lm)
    ids = torch.randint(3, VOCAB, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    dtype = next(lm.parameters()).dtype
    return blocks, torch.zeros(1, NUM_TOKENS, lm.config.hidden_size, dtype=dtype), capture_calls(lm, blocks, ids)


@cache
def prepared(family: str) -> tuple[nn.ModuleList, Tensor, list[dict[str, Any]]]:
    """The same for a tiny model which nobody changes."""
    return prepare(tiny_model(family))


@cache
def places_of(family: str) -> list[Places]:
    """What there is in every block of a tiny model."""
    blocks, x, calls = prepared(family)
    return [find_places(block, x, call) for block, call in zip(blocks, calls, strict=True)]


@cache
def proof_of(family: str) -> Proof:
    """Of the first block."""
    blocks, x, calls = prepared(family)
    return Proof(blocks[0], x, calls[0])


X = torch.zeros(1, NUM_TOKENS, 8)
READINGS: dict[str, Any] = {  # of a norm's output, which is that of a site each time, but is not only for linears
    "copied": lambda linear, normed, x: linear(normed.clone()),
    "cast": lambda linear, normed, x: linear(normed.to(x.dtype)),
    "its dtype": lambda linear, normed, x: linear(normed).to(normed.dtype),
    "its width": lambda linear, normed, x: linear(normed) / normed.shape[-1],
    "its kind": lambda linear, normed, x: linear(normed) + 0 * torch.finfo(normed.dtype).eps,
    "in place": lambda linear, normed, x: linear(normed.mul_(2)),
}


class Toy(nn.Module):
    """x + down(activation(up(norm(x)))), with what else a test wants to read the norm's output."""

    def __init__(self, activation: Any = F.silu, extra: str = "") -> None:
        super().__init__()
        self.activation, self.extra = activation, extra
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.other = nn.Linear(16 if extra == "wider reader" else 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H] to [B, T, H]."""
        normed = self.norm(x)
        y = self.down(self.activation(self.up(normed)))
        if self.extra == "parallel":
            return x + y + self.other(normed)
        if self.extra in READINGS:
            return x + y + READINGS[self.extra](self.other, normed, x)
        if self.extra == "residual":  # BLOOM, optionally: the residual is taken after the norm
            return normed + y + self.other(x)
        if self.extra == "nonlinear reader":
            return x + y + self.other(torch.tanh(normed))
        if self.extra == "reordered reader":
            return x + y + self.other(normed.flip(-1))
        if self.extra == "wider reader":
            return x + y + self.other(torch.cat([normed, normed], -1))
        if self.extra == "unused":
            return x + y
        return x + y + self.other(x)
