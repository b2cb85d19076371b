"""Groups along either axis are compared on equal terms."""

import torch
from torch import Tensor, nn

from plquant.blocks.quant_block import QuantBlock
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.parts.axis import AxisChoice
from plquant.parts.base import Rounding
from plquant.parts.clipping import LWC
from plquant.parts.rounding import GPTQRounding
from plquant.quant.clip_search import mse_clip
from plquant.quant.fake_quantize import quantize_weight
from plquant.quant.gptq import gptq_round
from plquant.quant.grid import IntGrid

OUT = IntGrid(2, 16, axis="out")


def block_with_outlier_channels() -> tuple[QuantBlock, FakeQuantLinear, Tensor]:
    """One linear for which groups along the output are better, its clipping learned, and a Hessian."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(48, 32)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(32, 48, generator=generator) * torch.randn(48, generator=generator).exp())
    block = QuantBlock({"0": linear}, IntGrid(2, 16))
    LWC(block, init=-2.0)  # far too much, so that the other axis is chosen
    x = torch.randn(200, 48, generator=generator)
    return block, block.linears["0"], x.t() @ x / 200


def test_the_axis_without_learned_clipping_is_clipped_where_its_error_is_least() -> None:
    block, linear, hessian = block_with_outlier_channels()
    learned, grid = linear.clip, linear.grid
    (found,) = AxisChoice(block).round([linear], hessian, Rounding(block).round)
    assert torch.equal(found.codes, quantize_weight(linear.weight, OUT, mse_clip(linear.weight, OUT)).codes)
    assert not torch.equal(found.codes, quantize_weight(linear.weight, OUT).codes)
    assert linear.clip is learned and linear.grid == grid


def test_gptq_clips_it_column_by_column_if_it_clips() -> None:
    block, linear, hessian = block_with_outlier_channels()
    (found,) = AxisChoice(block).round([linear], hessian, GPTQRounding(block).round)
    assert torch.equal(found.codes, gptq_round(linear.weight, hessian, OUT, "mse", act_order=True).codes)
    (found,) = AxisChoice(block).round([linear], hessian, GPTQRounding(block, clip=False).round)
    shares = mse_clip(linear.weight, OUT)
    assert torch.equal(found.codes, gptq_round(linear.weight, hessian, OUT, shares, act_order=True).codes)
