"""Fused experts become linears: the same function, without a copy, only for the tokens that choose them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plquant.architectures.moe import Experts, alike, routers, unfuse_experts_
from tests.families import VOCAB, tiny_model

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe"]
IDS = torch.randint(3, VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_function_to_the_last_bit(family: str, dtype: torch.dtype) -> None:
    lm = tiny_model(family, fused=True, experts_implementation="eager").to(dtype)
    with torch.no_grad():
        before = lm(IDS).logits
        assert unfuse_experts_(lm) == [f"model.layers.{i}.mlp.experts" for i in range(2)]
        assert torch.equal(lm(IDS).logits, before)
        assert all(p.dtype == dtype for p in lm.parameters())
        experts = lm.model.layers[1].mlp.experts
        assert isinstance(experts, Experts)
        experts[0].up_proj.weight.mul_(1.01)  # negative control
        assert not torch.equal(lm(IDS).logits, before)
    assert unfuse_experts_(lm) == []


def test_names_are_those_of_the_hub() -> None:
    lm = tiny_model("qwen3_moe")
    names = [name for name in lm.state_dict() if name.startswith("model.layers.0.mlp.")]
    experts = [f"experts.{i}.{part}_proj.weight" for i in range(8) for part in ("gate", "up", "down")]
    assert set(names) == {f"model.layers.0.mlp.{name}" for name in [*experts, "gate.weight"]}
    expert = lm.model.layers[0].mlp.experts[3]
    assert [(m.in_features, m.out_features) for m in expert.modules() if isinstance(m, nn.Linear)] == [
        (64, 32),
        (64, 32),
        (32, 64),
    ]


def test_nothing_is_copied_and_the_fused_tensor_goes_with_its_last_expert() -> None:
    lm = tiny_model("mixtral", fused=True)
    storages = [p.untyped_storage().data_ptr() for p in lm.model.layers[0].mlp.experts.parameters()]
    fused = weakref.ref(lm.model.layers[0].mlp.experts)
    unfuse_experts_(lm)
    gc.collect()
    assert fused() is None
    experts = lm.model.layers[0].mlp.experts
    assert {p.untyped_storage().data_ptr() for p in experts.parameters()} == set(storages)
    assert all(p.is_contiguous() for p in experts.parameters())


@pytest.mark.parametrize("trainable", [True, False])
def test_flags_are_kept(trainable: bool) -> None:
    lm = tiny_model("mixtral", fused=True).requires_grad_(trainable).train(trainable)
    unfuse_experts_(lm)
    assert all(p.requires_grad == trainable for p in lm.parameters())
    assert all(m.training == trainable for m in lm.modules())


def test_gradients_are_those_of_the_fused_experts() -> None:
    fused, unfused = tiny_model("mixtral", fused=True, experts_implementation="eager"), tiny_model("mixtral")
    for lm in (fused, unfused):
        lm.double()(IDS).logits.square().mean().backward()
    expected = fused.model.layers[0].mlp.experts.gate_up_proj.grad
    found = [
        torch.cat([expert.gate_proj.weight.grad, expert.up_proj.weight.grad])
        for expert in unfused.model.layers[0].mlp.experts
    ]
    torch.testing.assert_close(torch.stack(found), expected)


def test_an_expert_sees_only_the_tokens_that_chose_it() -> None:
    experts = tiny_model("mixtral").model.layers[0].mlp.experts
    seen: dict[int, Tensor] = {}
    for number, expert in enumerate(experts):
        expert.gate_proj.register_forward_pre_hook(lambda _, args, number=number: seen.update({number: args[0]}))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    choice = torch.tensor([[0, 2], [2, 0], [2, 3], [0, 3], [3, 2]])
    out = experts(x, choice, torch.full((5, 2), 0.5))
    assert sorted(seen) == [0, 2, 3]  # nobody chose 1: it did not run
    for number, tokens in seen.items():
        assert sorted(tokens.tolist()) == sorted(x[(choice == number).any(1)].tolist())
    alone = experts(x[3:4], choice[3:4], torch.full((1, 2), 0.5))
    torch.testing.assert_close(out[3:4], alone)


def fused_experts(**changes: Any) -> nn.Module:
    """A model with a layer of fused experts like transformers', but for some attributes."""
    lm = tiny_model("mixtral", fused=True, num_hidden_layers=1)
    experts = lm.model.layers[0].mlp.experts
    for key, value in changes.items():
        setattr(experts, key, value)
    return lm


@pytest.mark.parametrize(
    "changes",
    [
        {"is_transposed": True},
        {"is_concatenated": False},
        {"has_bias": True},
        {"has_gate": False},
        {"has_post_expert_norm": True},
        {"_apply_gate": lambda x: x.clamp(-7, 7)},
        {"_apply_gate": None},
        {"act_fn": nn.ReLU(), "_apply_gate": lambda x: nn.functional.silu(x[:, :8]) * x[:, 8:]},
        {"down_proj": nn.Parameter(torch.ones(4, 96, 64))},
    ],
)
def test_experts_of_another_kind_are_refused(changes: dict[str, Any]) -> None:
    lm = fused_experts(**changes)
    with pytest.raises(NotImplementedError, match=r"model.layers.0.mlp.experts \(MixtralExperts\)"):
        unfuse_experts_(lm)
    assert not any(isinstance(module, Experts) for module in lm.modules())
    assert unfuse_experts_(fused_experts())


def test_a_skeleton_without_memory_is_unfused_too() -> None:
    with torch.device("meta"):
        lm = fused_experts()
    unfuse_experts_(lm)
    assert all(p.is_meta for p in lm.model.layers[0].mlp.experts.parameters())


def test_routers_are_the_linears_beside_experts_with_an_output_for_each_at_most() -> None:
    block = tiny_model("qwen2_moe").model.layers[0]
    assert routers(block) == ["mlp.shared_expert_gate"]  # its mlp.gate is no nn.Linear
    assert routers(block.mlp) == ["shared_expert_gate"]
    block.mlp.add_module("router", nn.Sequential(nn.Linear(64, 4)))
    assert set(routers(block)) == {"mlp.shared_expert_gate", "mlp.router.0"}
    assert routers(tiny_model("llama").model.layers[0]) == []


def test_modules_that_differ_in_the_expert_only_are_alike() -> None:
    block = tiny_model("qwen2_moe").model.layers[0]
    names = [
        "self_attn.q_proj",
        "mlp.experts.0.up_proj",
        "mlp.experts.0.gate_proj",
        "mlp.experts.2.up_proj",
        "mlp.gate",
    ]
    assert alike(block, names) == [
        ["self_attn.q_proj"],
        ["mlp.experts.0.up_proj", "mlp.experts.2.up_proj"],
        ["mlp.experts.0.gate_proj"],
        ["mlp.gate"],
    ]
    assert alike(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), ["0", "1"]) == [["0"], ["1"]]
