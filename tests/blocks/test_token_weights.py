"""How much the error of each token counts: an estimate of what derivatives say."""

import pytest
import torch
from torch import Tensor

from plquant.architectures.moe import unfuse_experts_
from plquant.block_module import BlockModule
from plquant.blocks.activations import Activations
from plquant.blocks.capture import capture_inputs
from plquant.blocks.prepare import prepare_blocks
from plquant.blocks.quant_block import QuantBlock
from plquant.blocks.token_weights import token_weights
from plquant.methods import GPTQ
from plquant.quant.grid import IntGrid
from tests.families import FAMILIES, VOCAB, tiny_model


def block_of(family: str, sequences: int = 4, tokens: int = 6) -> tuple[QuantBlock, Tensor, Tensor]:
    """A block, its inputs and outputs, in fp64."""
    lm = tiny_model(family).double()
    unfuse_experts_(lm)
    ids = torch.randint(3, VOCAB, (sequences, tokens), generator=torch.Generator().manual_seed(0))
    block = prepare_blocks(lm, IntGrid(3, 16), ids)[0]
    x = capture_inputs(lm, list(block.layers.values()), ids)
    with block.full_precision(), torch.no_grad():
        return block, x, block(x)


def exact_weights(block: QuantBlock, x: Tensor, name: str) -> Tensor:
    """sum_t ||J_ts||^2 / ||y_t||^2 of each token s of one sequence [1, T, H], from whole Jacobians."""
    linear = block.linears[name]

    def output(error: Tensor) -> Tensor:
        hook = linear.register_forward_hook(lambda _, __, z: z + error.view_as(z))
        with block.full_precision():
            y = block(x)[0]
        hook.remove()
        return y

    none = torch.zeros(x.shape[1], linear.out_features, dtype=x.dtype)
    jacobian = torch.autograd.functional.jacobian(output, none)  # [T, H, T, O]
    return (jacobian.square().sum((1, 3)) / output(none).square().sum(-1)[:, None]).sum(0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_one_draw_of_signs_is_right_on_average(family: str) -> None:
    block, x, y = block_of(family, sequences=1)
    draws = 500
    many = [(x.expand(draws, -1, -1), y.expand(draws, -1, -1))]
    for name, weights in token_weights(block, many, range(draws)).items():
        exact = exact_weights(block, x, name)
        mean, none = weights.view(draws, -1).mean(0).double(), 1e-9 * float(exact.max())  # the first query's is none
        torch.testing.assert_close(mean, exact, rtol=0.15, atol=none)
        assert not torch.allclose(exact, exact.mean().expand_as(exact), rtol=0.15), name  # tokens do differ


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_but_those_of_experts_has_weights(family: str) -> None:
    block, x, y = block_of(family)
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    found = token_weights(block, [(x, y)], range(4))
    assert set(found) == {name for name in block.linears if not block.in_expert(name)}
    for weights in found.values():
        assert weights.shape == (4 * 6,) and weights.isfinite().all() and weights.min() >= 0 and weights.any()
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.named_parameters())
    assert all(parameter.grad is None for parameter in block.parameters())


def test_a_sequence_has_the_same_weights_in_whichever_batch_and_process_it_is() -> None:
    block, x, y = block_of("llama")
    whole = token_weights(block, [(x, y)], range(4))
    mine = token_weights(block, [(x[i::2], y[i::2]) for i in (1,)], range(1, 4, 2))
    for name, weights in whole.items():
        torch.testing.assert_close(mine[name].view(2, -1), weights.view(4, -1)[1::2])
    for others in (token_weights(block, [(x, y)], range(4, 8)), token_weights(block, [(x, y)], range(4), seed=1)):
        assert not torch.allclose(others["0.self_attn.v_proj"], whole["0.self_attn.v_proj"], rtol=1e-2)


def test_a_token_of_zeros_has_no_relative_error() -> None:
    block, x, y = block_of("llama", sequences=1)
    y = y.clone()
    y[0, -1] = 0
    assert token_weights(block, [(x, y)], range(1))["0.mlp.down_proj"][-1] == 0


def test_a_massive_token_counts_no_more_than_the_others_in_what_is_added_to_it() -> None:
    """A token of 1,000 times the size, as the first of many models: its errors are relative to that."""
    block, x, y = block_of("llama", sequences=1)
    x, y = x.clone(), y.clone()
    x[0, 0] *= 1000
    with block.full_precision(), torch.no_grad():
        y = block(x)
    weights = token_weights(block, [(x, y)], range(1))["0.mlp.down_proj"]
    assert weights[0] < 1e-4 * weights[1:].min()


def module_of(method: type[BlockModule] = GPTQ, **options: bool) -> tuple[BlockModule, Tensor]:
    block, x, y = block_of("llama", sequences=8, tokens=24)
    module = method(block, **options)
    module.activations = Activations((x, y), 2, 0)
    return module, x


def test_hessians_are_those_of_the_inputs_times_the_weights() -> None:
    module, x = module_of()
    names, found = next(module.hessians())
    _, plain = next(module.hessians(weighted=False))
    assert plain[0] is plain[1] and not torch.allclose(found[0], found[1], rtol=1e-2)
    block = module.block
    inputs: list[Tensor] = []
    hook = block.linears[names[0]].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    block(x)
    hook.remove()
    read = inputs[0].flatten(0, 1)
    y = module.activations.dataset.tensors[1]
    for name, hessian in zip(names, found, strict=True):
        weights = token_weights(block, [(x, y)], range(8))[name].double()
        mean = (read.t() * weights) @ read / weights.sum()
        expected = mean + torch.eye(len(mean), dtype=torch.float64) * mean.trace() / len(read)  # the ridge
        torch.testing.assert_close(hessian.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(plain[0].double(), read.double().t() @ read.double() / len(read), rtol=1e-4, atol=1e-6)


def test_gptq_follows_the_weights_unless_told_not_to() -> None:
    codes = []
    for weighted in (True, False, False):
        module, _ = module_of(token_weights=weighted)
        module.fold()
        codes.append(module.block.tensors())
    packed = [name for name in codes[0] if name.endswith("weight_packed")]
    assert packed
    assert any(not torch.equal(codes[0][name], codes[1][name]) for name in packed)
    assert all(torch.equal(codes[1][name], codes[2][name]) for name in packed)
