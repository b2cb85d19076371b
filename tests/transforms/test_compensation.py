"""The closed-form weights: the optimum they claim to be, and what they are worth."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from plquant.quant.scaled_weight import ScaledWeight
from plquant.transforms.channel_removal import drop_order
from plquant.transforms.compensation import compensate
from plquant.transforms.reassembly import ChannelReassembly
from plquant.transforms.reassembly_plan import ReassemblyPlan, split_order


def rounded(x: Tensor, offset: Tensor | float = 0.0, bits: int = 4) -> Tensor:
    """Per-token asymmetric fake quantization."""
    low, high = x.amin(-1, True).clamp(max=0), x.amax(-1, True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero_point = (-low / scale).round()
    return ((x / scale + offset).round() + zero_point).clamp(0, 2**bits - 1).sub(zero_point) * scale


def activations(tokens: int, channels: int = 24, sources: int = 12) -> Tensor:
    """Correlated channels, two of them outliers."""
    torch.manual_seed(0)
    mixing = torch.randn(sources, channels).double()
    mixing[:, [4, 17]] *= 10
    return torch.randn(tokens, sources).double() @ mixing + 0.1 * torch.randn(tokens, channels).double()


def test_it_is_the_least_squares_optimum_around_the_reassembled_weight() -> None:
    torch.manual_seed(0)
    x, weight, start = activations(50), torch.randn(5, 24).double(), torch.randn(5, 24).double()
    x_hat = rounded(x)
    delta = compensate(weight, start, x.t() @ x_hat, x_hat.t() @ x_hat, damp=0.3)
    assert delta.dtype == torch.float32
    damping = 0.3 * (x_hat.t() @ x_hat).diagonal().median()
    # the same problem as rows of one least-squares fit: the tokens, and sqrt(lambda) D = 0
    rows = torch.cat([x_hat, damping.sqrt() * torch.eye(24)])
    target = torch.cat([x @ weight.t() - x_hat @ start.t(), torch.zeros(24, 5)])
    expected = torch.linalg.lstsq(rows, target).solution.t().float()
    torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)


def test_nothing_to_make_good_changes_nothing_and_strong_damping_keeps_the_weight() -> None:
    x, weight = activations(50), torch.randn(5, 24).double()
    moment = x.t() @ x
    assert compensate(weight, weight, moment, moment).abs().max() < 1e-12  # shrinking towards 0 would fail here
    start = torch.randn(5, 24).double()
    assert compensate(weight, start, moment, moment, damp=1e9).abs().max() < 1e-6


def test_where_no_token_was_seen_nothing_changes() -> None:
    zero, weight = torch.zeros(24, 24), torch.randn(5, 24)
    assert torch.equal(compensate(weight, weight + 1, zero, zero), torch.zeros(5, 24))


def test_a_channel_that_the_others_determine_is_dropped_without_loss() -> None:
    x, weight = activations(200), torch.randn(5, 24).double()
    x[:, 3] = x[:, 8] - 2 * x[:, 20]
    plan = ReassemblyPlan.build(24, torch.empty(0, dtype=torch.int64), drops=torch.tensor([3]))
    transform = ChannelReassembly(plan)
    x_hat, start = transform.online(x), transform.read_weight(ScaledWeight(weight)).dense()
    delta = compensate(weight, start, x.t() @ x_hat, x_hat.t() @ x_hat, damp=1e-9)
    expected = linear(x, weight)
    assert (linear(x_hat, start + delta) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (linear(x_hat, start) - expected).abs().max() > 1e-2 * expected.abs().max()


def test_each_step_lowers_the_error_of_a_site_on_other_tokens() -> None:
    x, weight = activations(4000), torch.randn(8, 24).double()
    x, held_out = x[:3000], x[3000:]
    moment = x.t() @ x
    splits = split_order(x.abs().amax(0), 4)
    drops = drop_order(moment, weight.t() @ weight, 4, splits)
    expected = linear(held_out, weight)

    def errors(plan: ReassemblyPlan, offset: Tensor | float) -> list[float]:
        """Without and with compensated weights."""
        transform = ChannelReassembly(plan)

        def read(x: Tensor) -> Tensor:
            return rounded(transform.online(x * transform.coefficient), offset)

        x_hat, start = read(x), transform.read_weight(ScaledWeight(weight)).dense()
        delta = compensate(weight, start, x.t() @ x_hat, x_hat.t() @ x_hat)
        outputs = [linear(read(held_out), w) for w in (start, start + delta)]
        return [float((y - expected).square().sum() / expected.square().sum()) for y in outputs]

    plain, plain_fit = errors(ReassemblyPlan.identity(24), 0.0)
    split, split_fit = errors(ReassemblyPlan.build(24, splits), 0.0)
    _, drop_fit = errors(ReassemblyPlan.build(24, splits, drops), 0.0)
    plan = ReassemblyPlan.build(24, splits, drops)
    _, offset_fit = errors(plan, plan.offset.double())
    assert plan.width == 24
    assert split < plain and plain_fit < plain and split_fit < split
    assert offset_fit < drop_fit < plain_fit
