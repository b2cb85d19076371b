"""Rounding that is learned."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from plquant.block_module import BlockModule
from plquant.blocks.errors import token_error
from plquant.blocks.quant_block import QuantBlock
from plquant.methods import GPTQ, Composed
from plquant.parts.axis import AxisChoice
from plquant.parts.clipping import LWC
from plquant.parts.learned_rounding import LearnedRounding
from plquant.quant.grid import IntGrid
from tests.methods.test_block import fit, make_block


def fitted(make: Callable[[QuantBlock], BlockModule], grid: IntGrid, epochs: int = 15) -> tuple[float, float]:
    """Errors of rounding to nearest and of the fitted, packed block."""
    block, x = make_block("llama", grid=grid)
    with torch.no_grad():
        with block.full_precision():
            target = block(x)
        before = float(token_error(block(x), target))
    module = make(block)
    module.error_before = before
    fit(module, x, target, epochs)
    with torch.no_grad():
        module.fold()
        return before, float(token_error(block(x), target))


@pytest.mark.parametrize("axis", ["in", "out"])
def test_learned_rounding_beats_gptq_on_either_axis(axis: str) -> None:
    grid = IntGrid(2, 16, axis=axis)  # type: ignore[arg-type]
    block, x = make_block("llama", grid=grid)
    with torch.no_grad():
        with block.full_precision():
            target = block(x)
    gptq = GPTQ(block)
    from plquant.blocks.activations import Activations

    gptq.activations = Activations((x, target), 2, 0)
    with torch.no_grad():
        gptq.fold()
        others = float(token_error(block(x), target))
    before, learned = fitted(partial(Composed, parts=[partial(LWC, lr=1e-2), LearnedRounding]), grid)
    assert learned < 0.9 * others < before


def test_it_starts_from_the_codes_of_gptq() -> None:
    """With no step taken, and along the input, where GPTQ's scales are fixed before its first column."""
    grid = IntGrid(3, 16)
    block, x = make_block("llama", grid=grid)
    module = Composed(block, [partial(LearnedRounding, lr=0.0)])
    fit(module, x, x, epochs=1)
    learned = {name: linear.quantize() for name, linear in block.linears.items()}
    moved = [float((linear.nudge.abs() > 0.5).float().mean()) for linear in block.linears.values()]
    nearest = {}
    for name, linear in block.linears.items():
        linear.nudge = None
        nearest[name] = linear.quantize()
    assert all(share < 0.5 for share in moved)
    for name in learned:
        assert torch.equal(learned[name].scale, nearest[name].scale)
        assert not torch.equal(learned[name].codes, nearest[name].codes)


def test_a_choice_of_the_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="give it with --model.weights.axis"):
        Composed(make_block("llama")[0], [AxisChoice, LearnedRounding])
