"""Groups along either axis are compared on equal terms."""

from functools import partial
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from plquant.blocks.activations import Activations
from plquant.blocks.capture import capture_inputs
from plquant.blocks.prepare import prepare_blocks
from plquant.blocks.quant_block import QuantBlock
from plquant.methods import Composed
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.nn.packed_linear import PackedLinear
from plquant.parts.axis import AxisChoice
from plquant.parts.base import Rounding
from plquant.parts.clipping import LWC
from plquant.parts.rounding import GPTQRounding
from plquant.quant.axis import output_error
from plquant.quant.clip_search import mse_clip
from plquant.quant.fake_quantize import Clip, quantize_weight
from plquant.quant.gptq import gptq_round
from plquant.quant.grid import IntGrid
from tests.families import VOCAB, tiny_model

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
    (found,) = AxisChoice(block).round([linear], [hessian], Rounding(block))
    assert torch.equal(found.codes, quantize_weight(linear.weight, OUT, mse_clip(linear.weight, OUT)).codes)
    assert not torch.equal(found.codes, quantize_weight(linear.weight, OUT).codes)
    assert linear.clip is learned and linear.grid == grid


def test_gptq_clips_it_column_by_column_if_it_clips() -> None:
    block, linear, hessian = block_with_outlier_channels()
    columns = gptq_round(linear.weight, hessian, OUT, "mse", act_order=True)
    assert AxisChoice(block)._candidates(linear, hessian, GPTQRounding(block).round)["out"].codes.equal(columns.codes)
    (found,) = AxisChoice(block).round([linear], [hessian], GPTQRounding(block, clip=False))
    shares = mse_clip(linear.weight, OUT)
    assert torch.equal(found.codes, gptq_round(linear.weight, hessian, OUT, shares, act_order=True).codes)


@pytest.mark.parametrize(
    ("share", "rounding", "axis"),
    [(0.95, Rounding, "out"), (0.95, GPTQRounding, "in"), (0.85, GPTQRounding, "out"), (1.0, Rounding, "in")],
)
def test_codes_fitted_to_the_inputs_have_to_be_better_by_a_tenth_along_the_output(
    share: float, rounding: type[Rounding], axis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, linear, hessian = block_with_outlier_channels()
    error = {"in": 1.0, "out": share}
    monkeypatch.setattr("plquant.parts.axis.output_error", lambda weight, q, hessian: error[q.grid.axis])
    (found,) = AxisChoice(block).round([linear], [hessian], rounding(block))
    assert found.grid.axis == axis


def test_gptq_takes_the_better_of_learned_and_searched_clipping() -> None:
    block, linear, hessian = block_with_outlier_channels()
    (clip,) = LWC(block).clips

    def error(clip: Clip | Literal["mse"]) -> float:
        codes = gptq_round(linear.weight, hessian, linear.grid, clip, act_order=True)
        return float(output_error(linear.weight, codes, hessian))

    shares, generator = mse_clip(linear.weight, linear.grid), torch.Generator().manual_seed(0)
    for _ in range(300):  # what a fit does: keep what helps
        noise = [torch.empty_like(share).normal_(0, 0.02, generator=generator) for share in shares]
        tried = tuple((share + n).clamp(0.01, 0.999) for share, n in zip(shares, noise, strict=True))
        shares = min(shares, tried, key=error)  # type: ignore[type-var]
    for learned, is_better in ((shares, True), ((shares[0] / 4, shares[1] / 4), False)):
        clip.set_(*learned)
        assert (error(clip()) < error("mse")) == is_better
        expected = gptq_round(linear.weight, hessian, linear.grid, clip() if is_better else "mse", act_order=True)
        assert torch.equal(GPTQRounding(block).round(linear, hessian).codes, expected.codes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_chooses_as_the_cpu_does() -> None:
    assert chosen("cuda") == chosen("cpu")


def test_the_choice_does_not_hang_on_how_sums_are_rounded() -> None:
    """As on another device: samples in another order give the Hessian other last bits."""
    first = chosen("cpu")
    assert chosen("cpu", order=torch.arange(7, -1, -1)) == first and {*first.values()} == {"in", "out"}


def chosen(device: str, order: Tensor | None = None) -> dict[str, str]:
    """Axis of every linear of a block; some have large weights for every fourth input, some for every fourth output."""
    block, x = make_block("llama", 8)
    with torch.no_grad():
        for name, linear in block.linears.items():
            linear.weight[:, ::4] *= 4 if "q_proj" in name or "down_proj" in name else 1
            linear.weight[::4] *= 4 if "v_proj" in name or "o_proj" in name else 1
    x = x if order is None else x[order]
    block.to(device)
    module = Composed(block, [AxisChoice, partial(GPTQRounding, token_weights=False)])  # their signs are a sample's own
    module.activations = Activations((x, x), 1, 0)
    module.fold()
    packed = {name: m for name, m in block.layers.named_modules() if isinstance(m, PackedLinear)}
    return {name: linear.grid.axis for name, linear in packed.items()}


def make_block(family: str, samples: int) -> tuple[QuantBlock, Tensor]:
    lm = tiny_model(family)
    ids = torch.randint(3, VOCAB, (samples, 24), generator=torch.Generator().manual_seed(0))
    block = prepare_blocks(lm, IntGrid(3, 16), ids)[0]
    return block, capture_inputs(lm, list(block.layers.values()), ids)
