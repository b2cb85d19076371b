"""How far a block's output lies from its target: what blocks are fitted to, and what is reported of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from plquant.blocks.activations import at_once
from plquant.blocks.quant_block import QuantBlock
from plquant.blocks.stream_files import pieces
from plquant.distributed import of_this_process

# Letters: N sequences, T tokens, H hidden size, W processes.


def token_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ||output - target||^2 / ||target||^2; a scalar in fp32.

    Each token counts alike. In a plain mean squared error the few tokens with massive activations (SmolLM2's first
    token is 25,000 where the others are 10) outweigh all others together.

    Args:
        output: [..., T, H].
        target: [..., T, H].
    """
    target = target.float()
    squares = (output.float() - target).square().mean(-1)
    return (squares / target.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)).mean()


class SquaredError(Metric):
    """Relative squared error, ||output - target||^2 / ||target||^2, over all tokens and without the heaviest one.

    The heaviest is the one with the largest squared error: where the two figures lie apart, one token is the loss.
    """

    full_state_update = False
    heaviest: Tensor
    others: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Squares of error and target, fp64 [2]; after a reduction the heaviest of every process, [W, 2].
        self.add_state("heaviest", torch.zeros(2, dtype=torch.float64), dist_reduce_fx=None)
        self.add_state("others", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take in outputs and targets, both [..., T, H]."""
        target = target.float()
        squares = [(output.float() - target).square().sum(-1), target.square().sum(-1)]
        tokens = torch.stack(squares, -1).flatten(0, -2).double().to(self.heaviest.device)
        tokens = torch.cat([tokens, self.heaviest[None]])
        worst = tokens[:, 0].argmax()
        self.others = self.others + tokens[torch.arange(len(tokens), device=worst.device) != worst].sum(0)
        self.heaviest = tokens[worst]

    def compute(self) -> Tensor:
        """Both, fp64 [2]."""
        heavy = self.heaviest.reshape(-1, 2)
        heavy = heavy[heavy[:, 0].argsort()]
        rest = self.others + heavy[:-1].sum(0)
        error, energy = torch.stack([rest + heavy[-1], rest]).unbind(-1)
        return error / energy


def stream_errors(output: Tensor, target: Tensor, device: torch.device, ranks: int) -> tuple[float, float, float]:
    """``token_error``, and both of ``SquaredError``, of what this process has of two streams and the others have.

    Args:
        output: [N, T, H].
        target: [N, T, H].
        device: Where processes exchange.
        ranks: How many share the samples.
    """
    mean, squares = MeanMetric(nan_strategy="disable").to(device), SquaredError().to(device)
    for x, y in zip(pieces(output, 1), pieces(target, 1), strict=True):  # no second copy of the whole stream
        mean.update(token_error(x, y))
        squares.update(x, y)
    if ranks == 1:
        mean, squares = of_this_process(mean), of_this_process(squares)
    whole, rest = squares.compute().tolist()
    return float(mean.compute()), whole, rest


def block_error(block: QuantBlock, x: Tensor, target: Tensor, device: torch.device, ranks: int) -> float:
    """``token_error`` of a block as it is, on what this process has of the samples and the others have.

    Args:
        block: On its device.
        x: [N, T, H].
        target: [N, T, H].
        device: Where processes exchange.
        ranks: How many share the samples.
    """
    size, mean = at_once(x), MeanMetric(nan_strategy="disable").to(device)
    for output, t in zip(block.batches(x, size), pieces(target, size), strict=True):
        mean.update(token_error(output, t.to(output.device)), len(t))
    return float((mean if ranks > 1 else of_this_process(mean)).compute())
