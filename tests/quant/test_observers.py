"""Statistics of activations."""

import pytest
import torch
from torch import Tensor

from plquant.quant.axis import output_error
from plquant.quant.gptq import gptq_round
from plquant.quant.grid import IntGrid
from plquant.quant.observers import ChannelRange, Hessian


def activations(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(*batches: Tensor) -> Hessian:
    metric = Hessian(batches[0].shape[-1])
    for batch in batches:
        metric.update(batch)
    return metric


def test_hessian_is_the_mean_product_over_all_tokens() -> None:
    x = activations(3, 5, 8)
    metric = seen(x)
    expected = sum(torch.outer(token, token) for token in x.flatten(0, 1).double()) / 15
    torch.testing.assert_close(metric.compute().double(), expected, rtol=1e-6, atol=1e-6)
    assert metric.weight == 15 and metric.compute().dtype == torch.float32


def test_batches_of_any_size_sum_to_the_whole() -> None:
    x = activations(40, 8)
    whole = seen(x).compute()
    torch.testing.assert_close(seen(x[:7], x[7:8], x[8:]).compute(), whole)
    mean_of_means = (seen(x[:7]).compute() + seen(x[7:]).compute()) / 2
    assert not torch.allclose(mean_of_means, whole, rtol=1e-2)


def test_two_metrics_merge_to_the_whole() -> None:
    x = activations(40, 8)
    metric, other = seen(x[:7]), seen(x[7:])
    metric.merge_state(other)
    torch.testing.assert_close(metric.compute(), seen(x).compute())
    assert metric.weight == 40


def test_two_processes_sum_to_the_whole_and_keep_their_own() -> None:
    x = activations(40, 8)
    mine, theirs = seen(x[:7]), seen(x[7:])

    def gather(state: Tensor, group: object) -> list[Tensor]:
        own = [name for name in mine._defaults if getattr(mine, name) is state]
        return [state, getattr(theirs, own[0])]

    mine.sync(dist_sync_fn=gather, distributed_available=lambda: True)
    torch.testing.assert_close(mine.products / mine.weight, seen(x).compute())
    mine.unsync()
    torch.testing.assert_close(mine.compute(), seen(x[:7]).compute())


def test_a_forward_does_not_write_into_what_was_summed_before() -> None:
    x = activations(40, 8)
    metric = Hessian(8)
    torch.testing.assert_close(metric(x[:7]), seen(x[:7]).compute())
    torch.testing.assert_close(metric(x[7:]), seen(x[7:]).compute())
    torch.testing.assert_close(metric.compute(), seen(x).compute())
    metric.reset()
    assert not metric.products.any() and metric.weight == 0


@pytest.mark.parametrize("width", [256, 257, 600])
def test_what_is_not_added_up_is_copied(width: int) -> None:
    x, weights = activations(40, width), activations(40).square()
    for given in (None, weights):
        metric, other = Hessian(width), Hessian(width)
        metric.update(x[:7], None if given is None else given[:7])
        other.update(x[7:], None if given is None else given[7:])
        metric.merge_state(other)
        count = torch.ones(40) if given is None else given
        expected = (x.t() * count.double()) @ x.double() / count.double().sum()
        torch.testing.assert_close(metric.compute().double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(metric.compute(), metric.compute().t())


def test_bf16_activations_are_summed_in_full_precision_under_autocast() -> None:
    # One massive channel: as of SmolLM2's first token.
    x = activations(512, 16)
    x[:, 3] *= 300
    x = (x @ activations(16, 16, seed=1)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric = seen(x[:256], x[256:])
        ours = metric.compute()
        rounded = (x.t() @ x).float() / 512
    exact = x.double().t() @ x.double() / 512
    assert (ours - exact).norm() / exact.norm() < 1e-6  # 1.8e-7
    assert (rounded - exact).norm() / exact.norm() > 1e-4  # 1.4e-3


def test_tokens_with_weights_give_the_weighted_mean_in_any_unit() -> None:
    x, weights = activations(40, 8), activations(40).square()
    expected = (x.t() * weights.double()) @ x.double() / weights.sum(dtype=torch.float64)
    for unit in (1.0, 1e-9):
        metric = Hessian(8)
        metric.update(x[:7].view(1, 7, 8), weights[:7] * unit)
        metric.update(x[7:], weights[7:] * unit)
        torch.testing.assert_close(metric.compute().double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(seen(x).compute().double(), expected, rtol=1e-2)
    assert torch.equal(metric.compute(), metric.compute().t())


def test_the_ridge_is_the_trace_over_the_tokens_whatever_their_weights_and_processes() -> None:
    x, weights = activations(40, 8), activations(40).square()
    for given in (None, weights):
        plain, metric, other = Hessian(8), Hessian(8, ridge=True), Hessian(8, ridge=True)
        plain.update(x, given)
        metric.update(x[:7].view(1, 7, 8), None if given is None else given[:7])
        other.update(x[7:], None if given is None else given[7:])
        metric.merge_state(other)
        mean = plain.compute()
        torch.testing.assert_close(metric.compute(), mean + torch.eye(8) * mean.trace() / 40)


def test_codes_fitted_to_few_tokens_are_better_on_others_with_a_ridge() -> None:
    mixing, weight = activations(96, 96, seed=1) + 3 * torch.eye(96), activations(64, 96, seed=2)
    few, others = activations(128, 96, seed=3) @ mixing, seen(activations(20_000, 96, seed=4) @ mixing).compute()
    error = {}
    for ridge in (False, True):
        metric = Hessian(96, ridge)
        metric.update(few)
        codes = gptq_round(weight, metric.compute(), IntGrid(3, 32), damp=1e-4)
        error[ridge] = float(output_error(weight, codes, others))
    assert error[True] < 0.85 * error[False]


def test_no_tokens_give_zeros() -> None:
    for ridge in (False, True):
        metric = Hessian(8, ridge)
        metric.update(activations(0, 8))
        assert torch.equal(metric.compute(), torch.zeros(8, 8))


def test_the_range_of_each_channel_over_all_batches() -> None:
    x, metric, other = activations(40, 8) + 3, ChannelRange(8), ChannelRange(8)
    metric.update(x[:7].view(1, 7, 8))
    other.update(x[7:].bfloat16())
    metric.merge_state(other)
    seen_x = torch.cat([x[:7], x[7:].bfloat16().float()])
    assert torch.equal(metric.compute(), torch.stack([seen_x.amin(0), seen_x.amax(0)]))
