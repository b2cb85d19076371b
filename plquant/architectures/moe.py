"""Mixtures of experts: transformers 5 stores those of a layer fused in two 3-D tensors; here they become linears."""

# Letters: E experts, H hidden size, I intermediate size, N tokens, K experts per token.

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# How transformers says that experts are of another kind (``use_experts_implementation``), and what is handled here.
_PLAIN = {
    "is_transposed": False,  # weights [E, 2 I, H] and [E, H, I], as those of linears
    "is_concatenated": True,  # all rows of the gate before those of up, not in turns
    "has_bias": False,
    "has_gate": True,
    "has_post_expert_norm": False,
}


class Expert(nn.Module):
    """One gated expert, ``down(act(gate(x)) * up(x))``, named as in the checkpoints of Qwen3-MoE.

    Args:
        gate_up: [2 I, H]: the gate's rows, then those of up; the linears are views of it.
        down: [H, I]; likewise.
        act_fn: Activation of the gate.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, act_fn: nn.Module) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        """[N, H] -> [N, H]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """The experts of a layer; takes the place of transformers' fused module and is called as it is."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Each expert's output for the tokens that chose it, weighted and summed.

        Args:
            hidden_states: [N, H].
            top_k_index: int64 [N, K], the experts of each token.
            top_k_weights: [N, K], their weights.
        """
        output = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            place, token = torch.where(top_k_index.T == number)  # in this order the fused module takes them too
            y = self[number](hidden_states[token]) * top_k_weights[token, place, None]
            output.index_add_(0, token, y.to(output.dtype))
        return output


@torch.no_grad()
def unfuse_experts_(model: nn.Module) -> list[str]:
    """Replace every module of fused experts by ``Experts``, in place; returns their names.

    Nothing is copied: the linears are views of the fused tensors, whose memory is free once all of them are replaced.

    Raises:
        NotImplementedError: Fused experts that compute something else than gated experts do.
    """
    fused = {name: module for name, module in model.named_modules() if _is_fused(module)}
    others = [f"{name} ({type(module).__name__})" for name, module in fused.items() if not _is_plain(module)]
    if others:
        raise NotImplementedError(
            "these experts are stored fused and have biases, transposed weights or a gate of their own, for which no "
            f"rewriting to torch.nn.Linear is known: {', '.join(others)}. Add it to plquant/architectures/moe.py."
        )
    for name, module in fused.items():
        gate_up, down = module.get_parameter("gate_up_proj"), module.get_parameter("down_proj")
        experts = Experts(Expert(*weights, module.act_fn) for weights in zip(gate_up, down, strict=True))
        model.set_submodule(name, experts.train(module.training).requires_grad_(gate_up.requires_grad))
    return list(fused)


def routers(block: nn.Module) -> list[str]:
    """Names of the linears that choose or weigh experts and stay as they are.

    They stand beside the experts, and have at most one output for each of these (the shared expert's own linears have
    more).
    """
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    found: list[str] = []
    for path, experts in block.named_modules():
        if isinstance(experts, Experts):
            beside = path[: path.rfind(".") + 1]
            outside = [name for name in linears if name.startswith(beside) and not name.startswith(f"{path}.")]
            found += [name for name in outside if linears[name].out_features <= len(experts)]
    return found


def alike(block: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """The names in groups: modules that differ only in the number of their expert together, all others alone.

    Experts of a layer compute on their own and their outputs are summed, so what is asked of one can be asked of all
    at once.
    """
    experts = tuple(f"{name}." for name, module in block.named_modules() if isinstance(module, Experts))
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        inside = next((prefix for prefix in experts if name.startswith(prefix)), "")
        role = name.removeprefix(inside).partition(".")[2] if inside else name
        groups.setdefault((inside, role), []).append(name)
    return list(groups.values())


def _is_fused(module: nn.Module) -> bool:
    dimensions = {name: p.ndim for name, p in module.named_parameters(recurse=False)}
    return dimensions.get("gate_up_proj") == dimensions.get("down_proj") == 3


def _is_plain(module: nn.Module) -> bool:
    """Whether it computes what ``Expert`` does."""
    experts, width, hidden = module.get_parameter("gate_up_proj").shape
    if module.get_parameter("down_proj").shape != (experts, hidden, width // 2):
        return False
    if any(getattr(module, key, value) != value for key, value in _PLAIN.items()):
        return False
    act_fn, apply_gate = getattr(module, "act_fn", None), getattr(module, "_apply_gate", None)
    if act_fn is None or apply_gate is None:
        return False
    values = torch.linspace(-100, 100, 64, dtype=torch.float64, device="cpu").view(4, 16)  # some gates clamp large ones
    gate, up = values.chunk(2, -1)
    return torch.equal(apply_gate(values), act_fn(gate) * up)


def _linear(weight: Tensor) -> nn.Linear:
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear
