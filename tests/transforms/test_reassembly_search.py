"""The search over extra channels: nothing is a candidate, and what is returned was evaluated."""

import math

import torch

from plquant.transforms.reassembly_plan import ReassemblyPlan
from plquant.transforms.reassembly_search import extra_candidates, search_extra


def splits(extra: int) -> ReassemblyPlan:
    return ReassemblyPlan.build(400, torch.zeros(extra, dtype=torch.int64))


def test_candidates() -> None:
    assert extra_candidates(400) == [1, 2, 4, 8, 16, 32]
    assert extra_candidates(576) == [2, 3, 6, 12, 24, 47]
    assert extra_candidates(32) == [1, 2, 3]


def test_the_plan_returned_is_the_one_evaluated() -> None:
    seen = []

    def error(plan: ReassemblyPlan) -> float:
        seen.append(plan)
        return abs(plan.extra - 9.0)

    best = search_extra(400, splits, error)
    assert [plan.extra for plan in seen] == [0, 1, 2, 4, 8, 16, 32]
    assert best is seen[4] and best.extra == 8


def test_nothing_is_done_where_nothing_helps_and_less_where_more_is_no_better() -> None:
    assert search_extra(400, splits, lambda plan: float(plan.extra)).is_identity
    assert search_extra(400, splits, lambda plan: 1.0).is_identity
    assert search_extra(400, splits, lambda plan: min(plan.extra, 3) * -1.0).extra == 4
    assert search_extra(400, splits, lambda plan: math.nan if plan.extra else 1.0).is_identity


def test_never_worse_than_no_reassembly() -> None:
    for seed in range(20):
        errors = torch.rand(401, generator=torch.Generator().manual_seed(seed)).tolist()
        assert errors[search_extra(400, splits, lambda plan, errors=errors: errors[plan.extra]).extra] <= errors[0]
