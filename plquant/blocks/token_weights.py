"""How much an error of each token counts in what leaves the block, linear by linear."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from plquant.bfloat16 import quick_products
from plquant.blocks.quant_block import QuantBlock
from plquant.quant.observers import Hessian

SMALLEST = 1e-6  # norm of a token's output that has a relative error

# Letters: B sequences, T tokens, H hidden size, N sequences in all.


def token_weights(
    block: QuantBlock, batches: Iterable[tuple[Tensor, Tensor]], numbers: Sequence[int], seed: int = 0
) -> dict[str, Tensor]:
    """Weight of each token's error at the output of each linear, name -> fp32 [N T], in any unit.

    A block is fitted to sum_t ||error of y_t||^2 / ||y_t||^2, y its output. With z the output of a linear and J_ts the
    derivative of y_t by z_s, an error of z_s that has no preferred direction adds to this in proportion to

        sum_t ||J_ts||_F^2 / ||y_t||^2  =  E ||sum_t J_ts^T e_t / ||y_t|| ||^2,    e of independent random signs,

    so that one backward pass gives an estimate: the squares of a gradient. A Hessian in which tokens have these weights
    counts what matters behind the linear. In a plain one the few tokens with massive activations, which attention reads
    again and again, may count no more than any other (keys) or as much as all others together (what is added to them).

    Linears of experts are left out: which tokens they see is not the same for quantized inputs.

    Args:
        block: The block, none of its linears packed. Derivatives are those of the full-precision block.
        batches: Inputs under quantization, and what leaves the full-precision block, each [B, T, H].
        numbers: Of the sequences in the whole, [N]: their signs depend on it, not on which process draws them.
        seed: Of the run; each draws other signs.
    """
    names = [name for name in block.linears if not block.in_expert(name)]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    seeds = iter([number + 1000 * seed for number in numbers])
    for x, target in batches:
        signs = torch.stack([_signs(sequence.shape, next(seeds)) for sequence in target])
        y, outputs = _run(block, x, names)
        norm = target.to(y.device).float().norm(dim=-1, keepdim=True)
        probe = torch.where(norm > SMALLEST, signs.to(y.device) / norm, 0).to(y.dtype)
        with quick_products(y.device):
            gradients = torch.autograd.grad(y, list(outputs.values()), probe, materialize_grads=True)
        for name, gradient in zip(outputs, gradients, strict=True):
            found[name].append(gradient.float().square().sum(-1).flatten())
    return {name: torch.cat(weights) for name, weights in found.items() if weights}


def weighing(hessian: Hessian, weights: Tensor | None) -> Callable[[Tensor, Tensor], None]:
    """What updates a Hessian, batch after batch, with inputs [..., I] of tokens that have these weights, [tokens]."""
    at = 0

    def update(came: Tensor, multiplied: Tensor) -> None:
        nonlocal at
        tokens = multiplied.shape[:-1].numel()
        hessian.update(multiplied, None if weights is None else weights[at : at + tokens])
        at += tokens

    return update


def _run(block: QuantBlock, x: Tensor, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The block's output in full precision, and those of its linears that ran, with a graph behind them."""
    outputs: dict[str, Tensor] = {}
    linears = block.linears

    def keep(name: str, linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        outputs[name] = output

    hooks = [linears[name].register_forward_hook(partial(keep, name)) for name in names]
    with torch.enable_grad(), block.full_precision():
        y = block(x.to(block.device).detach().requires_grad_())
    for hook in hooks:
        hook.remove()
    return y, outputs


def _signs(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, shape, generator=generator).mul_(2).sub_(1).float()
