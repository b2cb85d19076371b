"""Run-time operations as parts of modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from plquant.nn.activation_quantizer import ActivationQuantizer
from plquant.nn.online import attach_online_, make_ops, online_entries
from plquant.nn.packed_linear import PackedLinear
from plquant.nn.packed_structure import PackedStructure
from plquant.quant.fake_quantize import quantize_weight
from plquant.quant.grid import ActivationGrid, IntGrid
from plquant.quant.token_quantize import quantize_tokens
from tests.online_op import Mix


def x() -> Tensor:
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def packed_linear() -> PackedLinear:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    return PackedLinear(quantize_weight(weight, IntGrid(4, 8)))


def test_a_linear_does_them_to_its_input_before_that_is_quantized() -> None:
    linear, first, second = packed_linear(), Mix.random(16, 2), Mix.random(16, 3)
    weight = linear.quantized().dequantize()
    linear.inputs = ActivationQuantizer(3)
    attach_online_(linear, [first, second])
    assert torch.equal(linear(x()), quantize_tokens(second(first(x())), 3) @ weight.t())
    assert not torch.allclose(linear(x()), second(first(quantize_tokens(x(), 3))) @ weight.t(), atol=1e-2)
    assert not torch.allclose(linear(x()), quantize_tokens(first(second(x())), 3) @ weight.t(), atol=1e-2)


def test_a_norm_does_them_to_its_output_and_so_does_its_copy() -> None:
    norm, op = nn.RMSNorm(16), Mix.random(16, 2)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    expected = op(norm(x()))
    attach_online_(norm, [op])
    assert torch.equal(norm(x()), expected)
    assert torch.equal(copy.deepcopy(norm)(x()), expected)
    assert set(norm.state_dict()) == {"weight", "online.0.index", "online.0.factor"}
    with pytest.raises(AssertionError, match="twice"):
        attach_online_(norm, [op])


def test_they_are_written_as_json_and_made_again() -> None:
    block = nn.ModuleDict({"norm": nn.RMSNorm(16), "down": packed_linear(), "plain": packed_linear()})
    attach_online_(block["norm"], [Mix.random(16, 2)])
    attach_online_(block["down"], [Mix.random(16, 3), Mix.random(16, 4)])
    mix = {"kind": "test-mix", "config": {"width": 16}}
    entries = online_entries(block)
    assert entries == {"norm": {"at": "output", "ops": [mix]}, "down": {"at": "input", "ops": [mix, mix]}}
    again = make_ops(entries["down"])
    for new, op in zip(again, block["down"].online, strict=True):
        new.load_state_dict(op.state_dict())
        assert torch.equal(new(x()), op(x()))


def test_they_are_built_where_the_module_is() -> None:
    grids = {name: IntGrid(4, 8) for name in ("down", "plain")}
    online = {
        "norm": {"at": "output", "ops": [{"kind": "test-mix", "config": {"width": 16}}]},
        "down": {"at": "input", "ops": [{"kind": "kronecker", "config": {"left": 4, "right": 4, "dtype": "bfloat16"}}]},
    }
    modules = {"norm": nn.RMSNorm(16), "down": nn.Linear(16, 8), "plain": nn.Linear(16, 8)}
    block = nn.ModuleDict(modules).to("meta")
    PackedStructure(grids, ActivationGrid(4), (), online).build_(block, {"down.inputs.offset"})
    tensors = {name: t for name, t in block.state_dict().items() if not name.endswith("weight_shape")}
    assert {name.split(".")[0] for name in tensors if ".online." in name} == {"norm", "down"}
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    assert tensors["down.online.0.left"].dtype == torch.bfloat16
