"""AffineQuant's matrices at a site: the function stays, training and fold agree."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plquant.quant.scaled_weight import ScaledWeight
from plquant.transforms.affine_matrix import AffineMatrix
from plquant.transforms.scale_shift import ScaleShift
from tests.transforms.toy import randomized, read, relative, two_linears, write

HEADS, SIZE = 3, 4
WIDTH = HEADS * SIZE
# Six query heads, two to each head of the source, and heads read in another order.
CHANNELS = {
    "own": torch.arange(WIDTH),
    "grouped queries": torch.arange(WIDTH).view(HEADS, 1, SIZE).expand(-1, 2, -1).flatten(),
    "other order": torch.arange(WIDTH).view(HEADS, SIZE)[[2, 0, 1]].flatten(),
}


def opened(transform: AffineMatrix, share: float = 1.0, spread: float = 1.0) -> AffineMatrix:
    transform.progress_(share)
    randomized(transform, spread)
    return transform


def linears(channel: Tensor, bias: bool = True) -> tuple[nn.Linear, nn.Linear, Tensor]:
    first, second = nn.Linear(7, WIDTH, bias=bias), nn.Linear(len(channel), 5, bias=bias)
    return randomized(first), randomized(second), torch.randn(6, 7, dtype=torch.float64)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("heads", "channel"),
    [(1, CHANNELS["own"]), *((HEADS, channel) for channel in CHANNELS.values())],
    ids=["one matrix", *CHANNELS],
)
def test_two_linears_compute_the_same(heads: int, channel: Tensor, share: float) -> None:
    torch.manual_seed(0)
    transform = opened(AffineMatrix(WIDTH, heads, channel, shift=True), share)
    before, after = two_linears(transform, *linears(channel), channel)
    assert relative(after, before) < 1e-12
    without = opened(AffineMatrix(WIDTH, heads, channel), share)
    before, after = two_linears(without, *linears(channel, bias=False), channel)
    assert relative(after, before) < 1e-12


def test_a_transposed_inverse_is_another_function() -> None:
    torch.manual_seed(0)
    transform = opened(AffineMatrix(WIDTH, HEADS))
    first, second, x = linears(CHANNELS["own"])
    before = second(first(x))
    weight, bias = write(first, transform)
    assert relative(read(second, F.linear(x, weight, bias), [transform]), before) < 1e-12
    inverse = transform.matrix.inverse()
    wrong = torch.block_diag(*inverse) @ first.weight, first.bias @ torch.block_diag(*inverse).mT
    assert relative(read(second, F.linear(x, *wrong), [transform]), before) > 0.1


def test_heads_of_a_query_group_share_the_matrix_of_their_head() -> None:
    torch.manual_seed(0)
    channel = CHANNELS["grouped queries"]
    transform = opened(AffineMatrix(WIDTH, HEADS, channel))
    weight = torch.randn(5, len(channel), dtype=torch.float64)
    expected = weight @ torch.block_diag(*transform.matrix.matrix().repeat_interleave(2, 0)).mT
    torch.testing.assert_close(transform.read_weight(ScaledWeight(weight)).dense(), expected, rtol=1e-13, atol=1e-13)


def test_some_rows_of_a_fused_source_are_left_alone() -> None:
    torch.manual_seed(0)
    transform = opened(AffineMatrix(WIDTH, HEADS))
    fused = randomized(nn.Linear(7, WIDTH + 5, bias=False))
    rows = slice(2, 2 + WIDTH)
    found = transform.write_weight(ScaledWeight(fused.weight), rows).dense()
    expected = fused.weight.detach().clone()
    expected[rows] = torch.block_diag(*transform.matrix.inverse()).mT @ expected[rows]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS)
def test_with_a_closed_mask_it_is_scale_and_shift(channel: Tensor) -> None:
    torch.manual_seed(0)
    matrix, scale = opened(AffineMatrix(WIDTH, HEADS, channel, shift=True), 0), ScaleShift(WIDTH, channel, shift=True)
    scale.double()
    with torch.no_grad():
        scale.log_scale.copy_(matrix.log_scale)
        scale.shift.copy_(matrix.shift)
    first, second, _ = linears(channel)
    weight = ScaledWeight(second.weight)
    for found, expected in [
        *zip(write(first, matrix), write(first, scale), strict=True),
        (matrix.read_weight(weight).dense(), scale.read_weight(weight).dense()),
        (matrix.read_bias(second.weight, second.bias), scale.read_bias(second.weight, second.bias)),
    ]:
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("shift", [False, True])
def test_after_a_norm_it_is_applied_at_run_time(heads: int, shift: bool) -> None:
    torch.manual_seed(0)
    norm, consumers = randomized(nn.LayerNorm(WIDTH)), [randomized(nn.Linear(WIDTH, 5)) for _ in range(2)]
    transform = opened(AffineMatrix(WIDTH, heads, shift=shift, online=True))
    x = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    assert transform.write_norm(norm.weight, norm.bias, 0.0) == (norm.weight, norm.bias)
    weight = ScaledWeight(norm.weight)
    assert transform.write_weight(weight) is weight and transform.write_bias(norm.bias) is norm.bias
    for y in (transform.online(norm(x)), transform.online_op()(norm(x))):
        for consumer in consumers:
            assert relative(read(consumer, y, [transform]), consumer(norm(x))) < 1e-12
    wrong = norm(x) @ torch.block_diag(*transform.matrix.inverse()).mT
    assert relative(read(consumers[0], wrong, [transform]), consumers[0](norm(x))) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_runs_later_is_what_ran_in_training_to_the_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    transform = opened(AffineMatrix(WIDTH, shift=True, online=True)).float()
    op, x = transform.online_op(), torch.randn(7, WIDTH).to(dtype)
    assert torch.equal(op(x), transform.online(x)) and op.matrix.dtype == torch.float32
    with torch.no_grad():
        transform.shift.add_(1)
    assert not torch.equal(op(x), transform.online(x))  # the operation is a copy


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_training_and_fold_give_the_same_fp32_weights(weight_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    transform = opened(AffineMatrix(WIDTH, HEADS, CHANNELS["grouped queries"])).float()
    source, consumer = torch.randn(WIDTH, 64).to(weight_dtype), torch.randn(9, 2 * WIDTH).to(weight_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        trained = transform.matrix.unit_inverse()  # nothing of it may run in bf16
    sides = [lambda t: t.write_weight(ScaledWeight(source)), lambda t: t.read_weight(ScaledWeight(consumer))]
    for side in sides:
        training = side(transform).dense()
        with torch.no_grad():
            fold = side(copy.deepcopy(transform)).dense()
        assert training.requires_grad and training.dtype == torch.float32 and torch.equal(training, fold)
    assert trained.dtype == torch.float64 and torch.equal(trained, transform.matrix.unit_inverse())


def test_gradients_reach_everything_that_is_open_and_nothing_else() -> None:
    torch.manual_seed(0)
    channel = CHANNELS["grouped queries"]
    transform = opened(AffineMatrix(WIDTH, HEADS, channel, shift=True), 0.4)
    first, second, _ = linears(channel)
    weight = ScaledWeight(second.weight)
    written, read_ = (
        write(first, transform),
        (transform.read_weight(weight).dense(), transform.read_bias(second.weight, second.bias)),
    )
    for side in (written, read_):
        transform.zero_grad()
        torch.stack([tensor.square().sum() for tensor in side]).sum().backward()
        assert all((p.grad != 0).all() for p in (transform.log_scale, transform.shift))
        off = transform.matrix.off_diagonal.grad
        assert (off[:, transform.matrix.opened] != 0).all() and (off[:, ~transform.matrix.opened] == 0).all()


def test_condition_number_is_the_worst_of_all_heads() -> None:
    transform = opened(AffineMatrix(WIDTH, HEADS))
    singular = torch.linalg.svdvals(transform.matrix.matrix().detach())
    assert float(transform.condition_number()) == pytest.approx(float((singular[:, 0] / singular[:, -1]).max()))


def test_what_cannot_work_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="not 5 heads"):
        AffineMatrix(12, 5)
    with pytest.raises(ValueError, match="whole heads of 4"):
        AffineMatrix(12, 3, torch.arange(12).flip(0))
    with pytest.raises(ValueError, match="whole heads of 4"):
        AffineMatrix(12, 3, torch.arange(2, 10))
    with pytest.raises(ValueError, match="whole heads of 4"):
        AffineMatrix(12, 3, torch.arange(6))
    with pytest.raises(ValueError, match="leave channel out"):
        AffineMatrix(12, 3, CHANNELS["grouped queries"], online=True)
    with pytest.raises(ValueError, match="does not fold into a norm"):
        AffineMatrix(12).write_norm(torch.ones(12), None, 0.0)
    with pytest.raises(ValueError, match="source has no bias"):
        AffineMatrix(12, shift=True).write_bias(None)
    with pytest.raises(ValueError, match="consumer has no bias"):
        AffineMatrix(12, shift=True).read_bias(torch.ones(2, 12), None)
