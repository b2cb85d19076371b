"""Hessians are those of the inputs that a finished block has, of all samples, and experts are observed together."""

from functools import partial

import pytest
import torch
from torch import Tensor

import plquant.block_module as block_module
from plquant.blocks.activations import Activations
from plquant.blocks.capture import capture_inputs
from plquant.blocks.prepare import prepare_blocks
from plquant.blocks.quant_block import QuantBlock
from plquant.methods import GPTQ, Composed
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.nn.packed_linear import PackedLinear
from plquant.parts.axis import AxisChoice
from plquant.parts.rounding import GPTQRounding
from plquant.quant.affine import QTensor
from plquant.quant.grid import IntGrid
from tests.families import VOCAB, tiny_model

QKV = [f"self_attn.{name}_proj" for name in "qkv"]


def make_block(family: str, samples: int, tokens: int, layers: int = 1) -> tuple[QuantBlock, Activations]:
    lm = tiny_model(family)
    ids = torch.randint(3, VOCAB, (samples, tokens), generator=torch.Generator().manual_seed(0))
    block = prepare_blocks(lm, IntGrid(3, 16), ids, blocks_per_fit=layers)[0]
    x = capture_inputs(lm, list(block.layers.values()), ids)
    return block, Activations((x, x), 1, 0)


@pytest.fixture
def sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plquant.blocks.activations.TOKENS_AT_ONCE", 1)


@pytest.mark.usefixtures("sample_by_sample")
@pytest.mark.parametrize(("family", "layers"), [("llama", 1), ("opt", 2), ("qwen3_moe", 2)])
def test_they_are_of_all_samples_in_what_is_packed_so_far(family: str, layers: int) -> None:
    """So what is chosen by them, the axis too, rests on all samples, in o and down as well.

    Of the 8 experts no sample of 3 tokens reaches all.
    """
    block, activations = make_block(family, 8, 3, layers)
    seen: dict[str, Tensor] = {}
    names = {id(linear): name for name, linear in block.linears.items()}

    class Watched(GPTQRounding):
        def round(self, linear: FakeQuantLinear, hessian: Tensor | None) -> QTensor:
            assert hessian is not None
            seen[names[id(linear)]] = hessian
            return super().round(linear, hessian)

    module = Composed(block, [AxisChoice, partial(Watched, token_weights=False)])
    module.activations = activations
    module.fold()
    came: dict[str, list[Tensor]] = {}
    for name in seen:
        block.layers.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: came.setdefault(name, []).append(args[0].flatten(0, -2))
        )
    with torch.no_grad():
        for x in activations.inputs():
            block(x)
    assert {*seen} == {*names.values()} and len(came) > len(seen) / 2
    for name, hessian in seen.items():
        inputs = torch.cat(came.get(name, [torch.zeros(1, len(hessian))]))
        torch.testing.assert_close(hessian, inputs.t() @ inputs / len(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("sample_by_sample")
def test_experts_of_a_layer_are_one_stage_whichever_run() -> None:
    block, activations = make_block("qwen3_moe", 1, 3, layers=2)
    stages = []
    for layer in ("0", "1"):
        experts = [f"{layer}.mlp.experts.{number}" for number in range(8)]
        stages += [[[f"{layer}.{name}" for name in QKV]], [[f"{layer}.self_attn.o_proj"]]]
        stages += [[[f"{e}.gate_proj", f"{e}.up_proj"] for e in experts], [[f"{e}.down_proj"] for e in experts]]
    assert block.stages(activations.inputs()) == stages
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plquant.blocks.quant_block.alike", lambda _, names: [[name] for name in names])
        alone = block.stages(activations.inputs())
    assert len(alone) > 2 * (2 + 8) and sorted(sum(sum(alone, []), [])) == sorted(block.linears)


def test_together_gives_the_codes_of_one_by_one_in_less_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, passes = [], []
    for at_once in (block_module.HESSIANS_AT_ONCE, 3 * 4 * 64**2, 1):
        monkeypatch.setattr(block_module, "HESSIANS_AT_ONCE", at_once)
        block, activations = make_block("qwen3_moe", 4, 24)
        count = [0]
        block.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        module = GPTQ(block, token_weights=False)
        module.activations = activations
        module.fold()
        packed = {name: m for name, m in block.layers.named_modules() if isinstance(m, PackedLinear)}
        codes.append({name: linear.quantized().codes for name, linear in packed.items()})
        passes.append(count[0] - 1)  # one is for the order
    assert all(torch.equal(codes[0][name], other[name]) for other in codes[1:] for name in codes[0])
    assert passes == [4, 2 + 3 + 1, 2 + 8 + 8]  # 8 experts read 64 channels, then 32
