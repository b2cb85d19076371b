"""Channel reassembly in blocks: equivalent where it only splits, judged as deployed, never at a router."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from plquant.block_module import BlockModule
from plquant.blocks.activations import Activations
from plquant.blocks.capture import capture_inputs
from plquant.blocks.prepare import prepare_blocks
from plquant.blocks.proof import _AllDouble
from plquant.blocks.quant_block import QuantBlock
from plquant.nn.attention import AttentionQuantizer
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.nn.fixed_delta import FixedDelta
from plquant.nn.transformed_reader import TransformedReader
from plquant.parts import reassembly
from plquant.parts.reassembly import SEARCH_TOKENS, Reassembly
from plquant.quant.grid import ActivationGrid, IntGrid
from plquant.transforms.reassembly_plan import ReassemblyPlan
from tests.families import FAMILIES, VOCAB, tiny_model

MOE = ["mixtral", "qwen2_moe", "qwen3_moe"]
ENOUGH, TOO_FEW = 24, 6  # samples of 24 tokens, for the 96 channels before down_proj


def make_block(family: str, samples: int = TOO_FEW, dtype: torch.dtype = torch.float32) -> tuple[QuantBlock, Tensor]:
    lm = tiny_model(family).to(dtype)
    ids = torch.randint(3, VOCAB, (samples, 24), generator=torch.Generator().manual_seed(0))
    block = prepare_blocks(lm, IntGrid(4, 16), ids, ActivationGrid(4))[0]
    return block, capture_inputs(lm, list(block.layers.values()), ids)


def started(family: str, samples: int, **options: Any) -> tuple[BlockModule, Reassembly]:
    """The part after its search, in a block of which every fifth channel of the norms is an outlier."""
    block, x = make_block(family, samples)
    for name, p in block.named_parameters():
        if "norm" in name:
            p[::5] *= 8
    with torch.no_grad(), block.full_precision():
        target = block(x)
    part = Reassembly(block, **options)
    module = BlockModule(block, [part])
    module.activations = Activations((x, target), 2, 0)
    module.configure_model()
    return module, part


def deltas(linear: FakeQuantLinear) -> list[FixedDelta]:
    return [c for c in linear.corrections if isinstance(c, FixedDelta)]


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_at_any_site_leave_the_block_as_it_was(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(weight: Tensor, grid: IntGrid, clip: Any, in_scale: Any, out_scale: Any, **dtypes: Any) -> Tensor:
        weight = weight if in_scale is None else weight * in_scale
        return weight if out_scale is None else weight * out_scale[:, None]

    monkeypatch.setattr("plquant.nn.fake_quant_linear.fake_quantize", scaled)
    block, x = make_block(family, dtype=torch.float64)
    part = Reassembly(block.double())
    for m in block.modules():
        if isinstance(m, FakeQuantLinear):
            m.inputs = None
    with torch.no_grad(), _AllDouble():
        with block.full_precision():
            reference = block(x)
        for m in block.modules():
            if isinstance(m, AttentionQuantizer):
                m.enabled = False
        added = (reference - x).norm()
        no_linear = family == "starcoder2"  # GELU lets no scale pass from its first linear to its second
        assert {site.kind for site in part.sites} == {"norm"} | (set() if no_linear else {"linear"})
        for site, transform in zip(part.sites, part.transforms, strict=True):
            plan = ReassemblyPlan.build(block.num_channels(site), torch.tensor([0, 0, 3, 5, 5, 5]))
            transform.set_plan_(plan)
            assert (block(x) - reference).norm() / added < 1e-12, site
            transform.coefficient.fill_(1)  # negative control: the source does not multiply
            assert (block(x) - reference).norm() / added > 1e-4, site
            transform.set_plan_(ReassemblyPlan.identity(plan.channels))


def test_heads_are_no_site() -> None:
    block, _ = make_block("llama_mha")
    assert any(site.head_dim and "o_proj" in site.consumers[0] for site in block.sites)
    assert not any("o_proj" in name for site in Reassembly(block).sites for name in site.consumers)


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("reason", ["a router", "experts", "both"])
def test_what_chooses_experts_and_what_only_some_tokens_reach_is_left_out(
    family: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, _ = make_block(family)
    assert any(site.kept for site in block.sites)
    if reason == "a router":
        monkeypatch.setattr(QuantBlock, "in_expert", lambda *_: False)
    elif reason == "experts":
        block.sites = tuple(replace(site, kept=()) for site in block.sites)
    part = Reassembly(block)
    assert not any(isinstance(m, TransformedReader) for m in block.modules())
    norms = [site for site in part.sites if site.kind == "norm"]
    assert [name.rpartition(".")[2] for site in norms for name in site.consumers] == ["q_proj", "k_proj", "v_proj"]
    assert sum("experts" in site.consumers[0] for site in part.sites) >= 4  # down, each with tokens of its own


@pytest.mark.parametrize("removal", ["drop", "merge"])
def test_weights_are_fitted_where_the_text_is_long_enough(removal: str) -> None:
    module, part = started("llama", ENOUGH, removal=removal)
    linears = [module.block.linears[name] for site in part.sites for name in site.consumers]
    assert len(linears) == 6 and not part.notes
    assert any(not transform.plan.is_identity for transform in part.transforms)
    for linear in linears:
        (delta,) = deltas(linear)
        assert 0.01 < delta.delta().norm() / linear.weight.norm() < 1
    fitted = module.error()
    for linear in linears:
        (delta,) = deltas(linear)
        delta.value.zero_()
    assert fitted < 0.9 * module.error()


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["self_attn.q_proj, self_attn.k_proj, self_attn.v_proj", "mlp.gate_proj, mlp.up_proj"]),
        ("mixtral", ["self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"]),
    ],
)
def test_a_text_too_short_for_a_fit_is_noted(family: str, names: list[str]) -> None:
    module, part = started(family, TOO_FEW)
    assert not any(deltas(linear) for linear in module.block.linears.values())
    names = [f"{name}: read fewer than 384 tokens, 6 for each of 64 channels" for name in names]
    down = "mlp.down_proj" if family == "llama" else "mlp.experts.*.down_proj"
    names.append(f"{down}: read fewer than 576 tokens, 6 for each of 96 channels")
    assert part.notes == [f"compensation left out at {name}" for name in names]
    assert not started(family, TOO_FEW, compensate=False)[1].notes


@pytest.mark.parametrize("samples", [ENOUGH, TOO_FEW])
def test_candidates_are_judged_as_they_are_deployed(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[float] = []
    search = reassembly.search_extra

    def watched(
        channels: int, make_plan: Callable[[int], ReassemblyPlan], error: Callable[[ReassemblyPlan], float]
    ) -> ReassemblyPlan:
        seen: list[tuple[ReassemblyPlan, float]] = []

        def remember(plan: ReassemblyPlan) -> float:
            seen.append((plan, error(plan)))
            return seen[-1][1]

        best = search(channels, make_plan, remember)
        judged.append(next(found for plan, found in seen if plan is best))
        return best

    monkeypatch.setattr(reassembly, "search_extra", watched)
    module, _ = started("llama", samples)
    assert len(judged) == 3 and judged[-1] == module.error(SEARCH_TOKENS)


@pytest.mark.parametrize(("samples", "compensate"), [(ENOUGH, True), (ENOUGH, False), (TOO_FEW, True)])
def test_drops_count_on_a_fit_only_where_there_is_one(
    samples: int, compensate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: set[str] = set()
    for name in ("drop_order", "drop_order_without_fit"):
        order = getattr(reassembly, name)
        monkeypatch.setattr(reassembly, name, lambda *args, n=name, order=order: (called.add(n), order(*args))[1])
    started("llama", samples, compensate=compensate)
    assert called == {"drop_order" if samples == ENOUGH and compensate else "drop_order_without_fit"}
