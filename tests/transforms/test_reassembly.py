"""A reassembled site before rounding, in float64: splits change nothing, merges and drops just what they lose."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from plquant.quant.fake_quantize import quantize_weight
from plquant.quant.grid import IntGrid
from plquant.quant.scaled_weight import ScaledWeight
from plquant.transforms.gather_op import GatherOp
from plquant.transforms.online import make_op
from plquant.transforms.reassembly import ChannelReassembly
from plquant.transforms.reassembly_plan import ReassemblyPlan

SPLIT = ReassemblyPlan.build(10, torch.tensor([3, 7, 3, 3]))
MIXED = ReassemblyPlan.build(
    10, torch.tensor([3, 7, 3]), drops=torch.tensor([0]), merges=torch.tensor([[1, 5], [2, 8], [9, 5]])
)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def norm_site(plan: ReassemblyPlan, gain_offset: float, told: float) -> tuple[Tensor, Tensor]:
    """Outputs of a norm and a linear before and after."""
    transform = ChannelReassembly(plan)
    x, gain, bias, weight, b = draw(6, 10), draw(10), draw(1, 10)[0], draw(5, 10), draw(5)
    before = linear(x * (gain + gain_offset) + bias, weight, b)
    new_gain, new_bias = transform.write_norm(gain, bias, told)
    assert new_bias is not None
    read = transform.read_weight(ScaledWeight(weight)).dense()
    after = linear(transform.online(x * (new_gain + gain_offset) + new_bias), read, transform.read_bias(weight, b))
    return before, after


@pytest.mark.parametrize("gain_offset", [0.0, 1.0])
def test_split_between_norm_and_linear_is_the_same_function(gain_offset: float) -> None:
    before, after = norm_site(SPLIT, gain_offset, told=gain_offset)
    assert (after - before).abs().max() < 1e-12 * before.abs().max()  # 1e-16 here
    before, wrong = norm_site(SPLIT, gain_offset, told=1 - gain_offset)
    assert (wrong - before).abs().max() > 1e-2


@pytest.mark.parametrize("rows", [slice(None), slice(10, 20)], ids=["up", "half of gate_up"])
def test_split_between_up_and_down_is_the_same_function(rows: slice) -> None:
    transform = ChannelReassembly(SPLIT)
    x, gate, down = draw(6, 4), draw(10, 4), draw(5, 10)
    up = draw(20, 4) if rows.start else draw(11, 4)[1:]
    bias = draw(10)
    before = linear(silu(linear(x, gate)) * linear(x, up[rows], bias), down)
    new_up = transform.write_weight(ScaledWeight(up), rows).dense()
    assert torch.equal(new_up[:10], up[:10]) == bool(rows.start)
    inner = silu(linear(x, gate)) * linear(x, new_up[rows], transform.write_bias(bias))
    after = linear(transform.online(inner), transform.read_weight(ScaledWeight(down)).dense())
    assert (after - before).abs().max() < 1e-12 * before.abs().max()


@pytest.mark.parametrize("plan", [SPLIT, MIXED], ids=["split", "mixed"])
@pytest.mark.parametrize("gain_offset", [0.0, 1.0])
def test_coefficients_in_norm_or_rows_give_the_same_channels(plan: ReassemblyPlan, gain_offset: float) -> None:
    transform = ChannelReassembly(plan)
    x, gain, weight = draw(6, 10), draw(10), draw(10, 4)
    expected = transform.online(x * (gain + gain_offset) * plan.coefficient)
    new_gain, none = transform.write_norm(gain, None, gain_offset)
    assert none is None
    torch.testing.assert_close(transform.online(x * (new_gain + gain_offset)), expected, rtol=1e-14, atol=1e-14)
    h = draw(6, 4)
    expected = transform.online(linear(h, weight) * plan.coefficient)
    new_weight = transform.write_weight(ScaledWeight(weight)).dense()
    torch.testing.assert_close(transform.online(linear(h, new_weight)), expected, rtol=1e-14, atol=1e-14)


def as_matrix(transform: ChannelReassembly) -> Tensor:
    """R, [K', K]: x' = R x."""
    return transform.online(torch.diag(transform.coefficient)).t()


def test_the_map_loses_a_rank_for_every_merged_or_dropped_channel() -> None:
    assert torch.linalg.matrix_rank(as_matrix(ChannelReassembly(MIXED))) == 10 - 4
    assert torch.linalg.matrix_rank(as_matrix(ChannelReassembly(SPLIT))) == 10
    repeat = ChannelReassembly(SPLIT).read_weight(ScaledWeight(torch.eye(10).double())).dense()
    torch.testing.assert_close(repeat @ as_matrix(ChannelReassembly(SPLIT)), torch.eye(10).double())


def test_error_of_a_merge_is_that_of_its_cluster() -> None:
    transform = ChannelReassembly(MIXED)
    x, weight = draw(6, 10), draw(5, 10)
    found = linear(transform.online(x * transform.coefficient), transform.read_weight(ScaledWeight(weight)).dense())
    lost = x[:, [0]] @ weight[:, [0]].t()
    for cluster in ([1, 5, 9], [2, 8]):
        xs, ws = x[:, cluster], weight[:, cluster]
        lost = lost + (xs - xs.mean(1, True)) @ (ws - ws.mean(1, True)).t()
    torch.testing.assert_close(linear(x, weight) - found, lost, rtol=1e-12, atol=1e-12)


def test_equal_channels_and_unused_ones_cost_nothing() -> None:
    transform = ChannelReassembly(MIXED)
    x, weight = draw(6, 10), draw(5, 10)
    x[:, [1, 9]] = x[:, [5]]
    weight[:, 2], weight[:, 0] = weight[:, 8], 0
    found = linear(transform.online(x * transform.coefficient), transform.read_weight(ScaledWeight(weight)).dense())
    torch.testing.assert_close(found, linear(x, weight), rtol=1e-12, atol=1e-12)


def test_scales_of_earlier_transforms_come_along() -> None:
    transform = ChannelReassembly(MIXED)
    weight, scale, out = draw(5, 10), draw(10).exp(), draw(5).exp()
    scaled = ScaledWeight(weight).scale_in(scale).scale_out(out)
    expected = transform.read_weight(ScaledWeight(scaled.dense())).dense()
    torch.testing.assert_close(transform.read_weight(scaled).dense(), expected, rtol=1e-14, atol=0)
    assert transform.read_weight(ScaledWeight(weight.bfloat16())).dense().dtype == torch.float32
    assert transform.write_weight(ScaledWeight(draw(10, 4).bfloat16())).dense().dtype == torch.float32


@pytest.mark.parametrize("plan", [SPLIT, MIXED], ids=["split", "mixed"])
def test_gradients(plan: ReassemblyPlan) -> None:
    transform = ChannelReassembly(plan)
    assert torch.autograd.gradcheck(transform.online, draw(3, 10).requires_grad_())


def test_the_identity_leaves_nothing_to_do() -> None:
    transform = ChannelReassembly(ReassemblyPlan.identity(10))
    weight = draw(5, 10)
    assert transform.online_op() is None and not transform.is_online
    assert torch.equal(transform.read_weight(ScaledWeight(weight)).dense(), weight)
    assert torch.equal(transform.online(weight), weight)


def test_merges_in_bf16_are_rounded_once() -> None:
    x = torch.tensor([1.0, 1 / 256, 1 / 256, 0]).bfloat16()  # 1 + 1/256 is 1 in bf16, 1 + 2/256 is not
    plan = ReassemblyPlan.build(4, torch.empty(0, dtype=torch.int64), merges=torch.tensor([[1, 0], [2, 0]]))
    assert ChannelReassembly(plan).online(x).tolist() == [1 + 1 / 128, 0]


def test_another_plan_takes_the_place_of_the_first() -> None:
    transform, fresh = ChannelReassembly(ReassemblyPlan.identity(10)), ChannelReassembly(MIXED)
    transform.set_plan_(MIXED)
    assert transform.plan is MIXED and transform.is_online
    x = draw(3, 10)
    assert torch.equal(transform.online(x), fresh.online(x))
    assert torch.equal(transform.coefficient, fresh.coefficient)
    assert transform.state_dict().keys() == fresh.state_dict().keys()
    transform.set_plan_(ReassemblyPlan.identity(10))
    assert not transform.is_online and transform.online_op() is None
    with pytest.raises(AssertionError):
        transform.set_plan_(ReassemblyPlan.identity(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_run_time_op_is_the_transform_and_survives_a_checkpoint(dtype: torch.dtype) -> None:
    transform = ChannelReassembly(MIXED)
    op = transform.online_op()
    assert isinstance(op, GatherOp) and transform.is_online
    assert op.config() == {"width": 9, "adds": 3}
    loaded = make_op("gather", op.config())
    loaded.load_state_dict(op.state_dict())
    x = draw(2, 6, 10).to(dtype)
    assert torch.equal(loaded(x), transform.online(x)) and loaded(x).dtype == dtype
    assert {name: (t.dtype, tuple(t.shape)) for name, t in op.state_dict().items()} == {
        "index": (torch.int32, (9,)),
        "adds": (torch.int32, (3, 2)),
    }
    assert (op.macs_per_token, op.stored_bits) == (3, 32 * (9 + 6)) and not list(op.parameters())


def test_rounding_with_a_scale_per_row_does_not_see_the_coefficients() -> None:
    weight, grid = nn.Linear(4, 10, bias=False).weight.detach(), IntGrid(4, None)
    scaled = ChannelReassembly(ReassemblyPlan.build(10, torch.tensor([3, 7]))).write_weight(ScaledWeight(weight))
    assert torch.equal(quantize_weight(scaled.dense(), grid).codes, quantize_weight(weight, grid).codes)
