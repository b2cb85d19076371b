"""Plans: every original channel once, one coefficient each, the right width, and codes of copies that add up."""

import pytest
import torch
from torch import Tensor

from plquant.transforms.reassembly_plan import ReassemblyPlan, split_order


def maxima(channels: int = 24, seed: int = 0) -> Tensor:
    return torch.rand(channels, generator=torch.Generator().manual_seed(seed)).mul(4).exp()


def copies_for(abs_max: Tensor, threshold: float) -> Tensor:
    """The paper's rule, T = max(1, ceil(m / theta))."""
    return (abs_max.double() / threshold).ceil().clamp_(min=1).long()


def mixed_plan() -> ReassemblyPlan:
    """Of 10 channels: 3 has three copies, 7 two; 0 is dropped; 1 and 9 are merged into 5, 2 into 8."""
    return ReassemblyPlan.build(
        10, splits=torch.tensor([3, 7, 3]), drops=torch.tensor([0]), merges=torch.tensor([[1, 5], [2, 8], [9, 5]])
    )


@pytest.mark.parametrize("seed", range(3))
def test_copies_are_those_of_the_threshold_that_asks_for_as_many(seed: int) -> None:
    abs_max = maxima(seed=seed)
    order = split_order(abs_max, 40)
    for extra in range(41):
        copies = ReassemblyPlan.build(24, order[:extra]).copies
        greatest = (abs_max.double() / copies).max().item()
        assert copies.sum() == 24 + extra
        assert torch.equal(copies, copies_for(abs_max, greatest * (1 + 1e-12)))
        assert not torch.equal(copies, copies_for(abs_max, greatest * 0.999))


def test_equal_maxima_still_give_the_number_that_was_asked_for() -> None:
    assert split_order(torch.tensor([1.0, 3.0, 3.0, 3.0]), 2).tolist() == [1, 2]
    assert split_order(torch.zeros(3), 2).tolist() == [0, 1]
    assert ReassemblyPlan.build(3, split_order(torch.ones(3), 1)).extra == 1


def test_what_a_plan_says_of_every_channel() -> None:
    plan = mixed_plan()
    assert plan.index.tolist() == [3, 3, 3, 4, 5, 6, 7, 7, 8]
    assert plan.adds.tolist() == [[1, 4], [2, 8], [9, 4]]
    assert (plan.width, plan.extra) == (9, 3) and not plan.is_identity
    third = 1 / 3
    expected = torch.tensor([1, third, 0.5, third, 1, third, 1, 0.5, 0.5, third], dtype=torch.float64)
    assert torch.equal(plan.coefficient, expected)
    assert plan.offset.tolist() == pytest.approx([-1 / 3, 0, 1 / 3, 0, 0, 0, -1 / 4, 1 / 4, 0])


def test_every_channel_is_read_split_merged_or_dropped_and_nothing_twice() -> None:
    plan = mixed_plan()
    read, merged = plan.index.unique().tolist(), plan.adds[:, 0].tolist()
    assert sorted(read + merged + [0]) == list(range(10))
    # What all channels at run time take of a channel adds up to all of it, whether split or merged.
    members = torch.zeros(10).index_add(0, torch.cat([plan.index, plan.adds[:, 0]]), torch.ones(12))
    assert torch.equal(members[[3, 7]] * plan.coefficient[[3, 7]], torch.ones(2).double())


def test_one_removal_for_each_extra_channel_keeps_the_width() -> None:
    splits = split_order(maxima(), 6)
    others = torch.tensor([c for c in range(24) if c not in splits])
    for extra in range(6):
        drops, merges = others[:extra], torch.stack([others[:extra], others[6].expand(extra)], 1)
        assert ReassemblyPlan.build(24, splits[:extra], drops=drops).width == 24
        assert ReassemblyPlan.build(24, splits[:extra], merges=merges).width == 24
        assert ReassemblyPlan.build(24, splits[:extra]).width == 24 + extra


def test_identity() -> None:
    plan = ReassemblyPlan.identity(5)
    assert plan.is_identity and plan.width == 5 and plan.extra == 0
    assert torch.equal(plan.coefficient, torch.ones(5).double()) and torch.equal(plan.offset, torch.zeros(5))
    assert ReassemblyPlan.build(5, torch.empty(0, dtype=torch.int64)).is_identity
    # as many channels at run time, but not the same ones
    assert not ReassemblyPlan.build(5, torch.tensor([0]), drops=torch.tensor([1])).is_identity


@pytest.mark.parametrize(
    "steps",
    [
        {"drops": [3]},  # a split channel dropped
        {"merges": [[3, 1]]},  # merged
        {"merges": [[1, 3]]},  # merged into
        {"merges": [[1, 2]], "drops": [2]},  # merged into one that is gone
        {"merges": [[1, 2], [1, 4]]},  # merged twice
    ],
    ids=str,
)
def test_impossible_steps_are_refused(steps: dict[str, list]) -> None:
    with pytest.raises(AssertionError):
        ReassemblyPlan.build(6, torch.tensor([3]), **{name: torch.tensor(step) for name, step in steps.items()})


@pytest.mark.parametrize("copies", range(2, 17))
@pytest.mark.parametrize("zero_point", [0, 9])
def test_codes_of_copies_add_up_to_the_code_of_the_channel(copies: int, zero_point: int) -> None:
    x = torch.linspace(-3, 3, 1999, dtype=torch.float64)[:, None]  # in full scales times copies: no tie of roundings
    scale, wide = 0.37 / copies, 1 << 20  # a range in which nothing is clipped
    plan = ReassemblyPlan.build(1, torch.zeros(copies - 1, dtype=torch.int64))
    x_copies = (x * plan.coefficient)[:, plan.index]

    def codes(x: Tensor, offset: Tensor | float) -> Tensor:
        return (torch.round(x / scale + offset) + zero_point).clamp(-wide, wide) - zero_point

    whole = codes(x, 0.0)[:, 0]
    assert torch.equal(codes(x_copies, plan.offset.double()).sum(1), whole)
    # Without offsets they share one rounding, T times as coarse.
    assert (codes(x_copies, 0.0).sum(1) - whole).abs().max() >= copies // 2


def test_plans_are_on_the_cpu_whatever_the_default_device_is() -> None:
    abs_max, zero, merges = maxima(), torch.tensor([0]), torch.tensor([[1, 2]])
    with torch.device("meta"):
        splits = split_order(abs_max, 1)
        plan = ReassemblyPlan.build(24, splits, zero, merges)
        plans = [plan, ReassemblyPlan.identity(24), ReassemblyPlan.build(24, splits)]
        tensors = [t for p in plans for t in (p.index, p.adds, p.copies, p.coefficient, p.offset)]
        assert not plan.is_identity and plan.width == 23
    assert {t.device.type for t in [splits, *tensors]} == {"cpu"}
