"""Which channels go: exact costs, checked by doing it, and what the released rules pick instead."""

import itertools

import pytest
import torch
from torch import Tensor

from plquant.transforms.channel_removal import drop_order, drop_order_without_fit, merge_order

NOBODY = torch.empty(0, dtype=torch.int64)


def site(channels: int = 12, seed: int = 0, kinds: int = 4, spread: float = 0.3) -> tuple[Tensor, Tensor]:
    """Activations [40, K] and weights [9, K] of channels that come in a few kinds."""
    torch.manual_seed(seed)
    kind = torch.randint(kinds, (channels,))
    x = torch.randn(40, kinds).double()[:, kind] + spread * torch.randn(40, channels).double()
    w = torch.randn(9, kinds).double()[:, kind] + spread * torch.randn(9, channels).double()
    return x, w


def orders(x: Tensor, w: Tensor, count: int, protected: Tensor = NOBODY) -> tuple[Tensor, Tensor]:
    grams = x.t() @ x, w.t() @ w
    return merge_order(*grams, count, protected), drop_order(*grams, count, protected)


def merge_error(x: Tensor, w: Tensor, cluster: list[int]) -> float:
    """|X_G W_G^T - (mean x)(sum w)^T|^2, by doing it."""
    x, w = x[:, cluster], w[:, cluster]
    return float((x @ w.t() - x.mean(1, True) @ w.sum(1, True).t()).square().sum())


def greedy_by_doing_it(x: Tensor, w: Tensor, count: int) -> list[set[int]]:
    """Clusters after so many merges of a single channel with another or with a cluster, each the cheapest."""
    clusters = [{c} for c in range(x.shape[1])]
    for _ in range(count):
        pairs = [(a, b) for a, b in itertools.permutations(clusters, 2) if len(b) == 1]
        a, b = min(pairs, key=lambda ab: merge_error(x, w, [*ab[0], *ab[1]]) - merge_error(x, w, [*ab[0]]))
        clusters = [c for c in clusters if c not in (a, b)] + [a | b]
    return [c for c in clusters if len(c) > 1]


def clusters_of(merges: Tensor) -> list[set[int]]:
    stays = merges[:, 1].unique().tolist()
    return [{s, *merges[merges[:, 1] == s, 0].tolist()} for s in stays]


@pytest.mark.parametrize("seed", range(5))
def test_merges_are_the_cheapest_by_the_true_error(seed: int) -> None:
    x, w = site(seed=seed)
    merges, _ = orders(x, w, 7)
    largest = 0
    for count in range(1, 8):
        expected = greedy_by_doing_it(x, w, count)
        assert sorted(map(sorted, clusters_of(merges[:count]))) == sorted(map(sorted, expected))
        largest = max(largest, *map(len, expected))
    assert largest > 2, "no cluster of three: this test shows nothing of the cluster formula"


def test_the_first_merge_is_the_pair_of_least_distance() -> None:
    x, w = site(spread=1.0)
    merges, _ = orders(x, w, 1)
    distance = {
        (i, j): float((x[:, i] - x[:, j]).square().sum() * (w[:, i] - w[:, j]).square().sum() / 4)
        for i, j in itertools.combinations(range(12), 2)
    }
    best = min(distance, key=distance.__getitem__)
    assert set(best) == set(merges[0].tolist())
    assert distance[best] == pytest.approx(merge_error(x, w, [*best]), rel=1e-12)


@pytest.mark.parametrize("equal", ["activations", "weights"])
def test_equal_columns_merge_at_no_cost_and_the_released_distance_misses_them(equal: str) -> None:
    x, w = site(channels=16, spread=1.0)
    (x if equal == "activations" else w)[:, 11] = (x if equal == "activations" else w)[:, 2]
    merges, _ = orders(x, w, 1)
    assert set(merges[0].tolist()) == {2, 11}
    assert merge_error(x, w, [2, 11]) < 1e-20
    if equal == "weights":  # the released code: ((s_i + s_j) |x_i - x_j|)^2, s the signed sums of the weights
        sums = w.sum(0)
        released = ((sums[:, None] + sums) * torch.cdist(x.t(), x.t())).square()
        pairs = sorted(itertools.combinations(range(16), 2), key=lambda ij: released[ij].item())
        assert pairs.index((2, 11)) > 10
        assert merge_error(x, w, [*pairs[0]]) > 10  # and its first choice is not free


def test_dead_channels_go_first_and_once_each() -> None:
    x, w = site(channels=16, spread=1.0)
    x[:, 4:12] = 0  # dead ones: every pair of them costs nothing
    merges, drops = orders(x, w, 10)
    assert set(drops[:8].tolist()) == set(range(4, 12))
    assert set(merges[:7].flatten().tolist()) == set(range(4, 12))
    assert len(merges[:, 0].unique()) == 10 and not set(merges[:, 0].tolist()) & set(merges[:, 1].tolist())
    assert len(drop_order(torch.zeros(16, 16), w.t() @ w, 10, NOBODY).unique()) == 10  # not a token seen


def test_protected_channels_take_no_part() -> None:
    x, w = site(channels=16, spread=1.0)
    merges, drops = orders(x, w, 10)
    protected = torch.cat([merges[0], drops[:2]]).unique()
    merges, drops = orders(x, w, 10, protected)
    assert not set(protected.tolist()) & {*merges.flatten().tolist(), *drops.tolist()}
    with pytest.raises(AssertionError, match="not protected"):
        orders(x, w, 10, torch.arange(6))


def fit_error(x: Tensor, w: Tensor, kept: list[int]) -> float:
    """Error of the best weights on the kept channels."""
    y = x @ w.t()
    return float((y - x[:, kept] @ torch.linalg.lstsq(x[:, kept], y).solution).square().sum())


@pytest.mark.parametrize("seed", range(5))
def test_each_drop_is_the_cheapest_after_a_new_fit(seed: int) -> None:
    x, w = site(seed=seed)
    drops = drop_order(x.t() @ x, w.t() @ w, 10, NOBODY, damp=1e-12)
    kept = list(range(12))
    for found in drops.tolist():
        best = min(kept, key=lambda c: fit_error(x, w, [k for k in kept if k != c]))
        assert found == best
        kept.remove(best)


def test_of_two_equal_channels_one_goes_and_the_one_shot_rule_loses_both() -> None:
    x, w = site(channels=16, spread=1.0)
    x[:, 11] = x[:, 2]
    hessian, gram = x.t() @ x, w.t() @ w
    drops = set(drop_order(hessian, gram, 2, NOBODY).tolist())
    assert len(drops & {2, 11}) == 1
    damped = hessian + 0.01 * hessian.diagonal().median() * torch.eye(16)
    scores = gram.diagonal() / damped.inverse().diagonal()
    assert set(scores.argsort()[:2].tolist()) == {2, 11}
    assert fit_error(x, w, [c for c in range(16) if c not in drops]) < 0.5 * fit_error(
        x, w, [c for c in range(16) if c not in (2, 11)]
    )


def test_statistics_in_fp32_are_worked_on_in_fp64() -> None:
    torch.manual_seed(0)
    # Whole numbers with a large mean: Gram matrices are exact in fp32, differences of their products are not.
    x, w = 1000.0 + torch.randint(-3, 4, (14, 12)).double(), 90.0 + torch.randint(-3, 4, (9, 12)).double()
    hessian, gram = (x.t() @ x).float(), (w.t() @ w).float()
    assert torch.equal(hessian.double(), x.t() @ x) and torch.equal(gram.double(), w.t() @ w)
    before = gram.clone()
    merges = merge_order(hessian, gram, 7, NOBODY)
    assert sorted(map(sorted, clusters_of(merges))) == sorted(map(sorted, greedy_by_doing_it(x, w, 7)))
    drops = drop_order(hessian, gram, 6, NOBODY, damp=1e-12)
    assert torch.equal(drops, drop_order(x.t() @ x, w.t() @ w, 6, NOBODY, damp=1e-12))
    assert torch.equal(gram, before)


def left_out_error(x: Tensor, w: Tensor, dropped: list[int]) -> float:
    """|X_D W_D^T|^2, by doing it."""
    return float((x[:, dropped] @ w[:, dropped].t()).square().sum())


@pytest.mark.parametrize("seed", range(5))
def test_without_a_fit_each_drop_is_the_cheapest_by_the_true_error(seed: int) -> None:
    x, w = site(seed=seed)
    grams = x.t() @ x, w.t() @ w
    before = [gram.clone() for gram in grams]
    drops = drop_order_without_fit(*grams, 8, torch.tensor([4])).tolist()
    for step, found in enumerate(drops):
        rest = [c for c in range(12) if c not in (4, *drops[:step])]
        assert found == min(rest, key=lambda c: left_out_error(x, w, [*drops[:step], c]))
    assert all(torch.equal(gram, b) for gram, b in zip(grams, before, strict=True))


def test_a_large_channel_that_another_can_stand_in_for_goes_only_with_a_fit() -> None:
    x, w = site(channels=16, spread=1.0)
    x[:, 2] *= 10
    x[:, 11] = x[:, 2]
    grams = x.t() @ x, w.t() @ w
    assert drop_order(*grams, 1, NOBODY).item() in (2, 11)
    assert not set(drop_order_without_fit(*grams, 8, NOBODY).tolist()) & {2, 11}


def test_orders_are_on_the_cpu_whatever_the_default_device_is() -> None:
    x, w = site()
    hessian, gram = x.t() @ x, w.t() @ w
    with torch.device("meta"):
        orders = [order(hessian, gram, 3, NOBODY) for order in (merge_order, drop_order, drop_order_without_fit)]
    assert {order.device.type for order in orders} == {"cpu"}
