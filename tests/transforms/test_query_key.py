"""Transforms between queries and keys: attention's output stays, under every kind of rotary embedding."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plquant.quant.scaled_weight import ScaledWeight
from plquant.transforms.query_key import QueryKey
from plquant.transforms.query_key_matrix import QueryKeyMatrix
from plquant.transforms.rotary_pairs import RotaryPairs
from tests.transforms.toy import randomized, relative

HEAD_DIM, WIDTH, TOKENS = 8, 10, 7


@dataclass(frozen=True)
class Rope:
    """Which channels of a head turn together."""

    pairs: Tensor
    free: Tensor

    def __call__(self, y: Tensor) -> Tensor:
        """[heads, T, d], each pair turned by position times its frequency; the textbook's complex product."""
        first, second = self.pairs.unbind(-1)
        angle = torch.arange(TOKENS).double()[:, None] / 100 ** (torch.arange(len(first)).double() / max(len(first), 1))
        turned = torch.complex(y[..., first], y[..., second]) * torch.polar(torch.ones_like(angle), angle)
        y = y.clone()
        y[..., first], y[..., second] = turned.real, turned.imag
        return y


def rope(pairs: list[tuple[int, int]]) -> Rope:
    named = {channel for pair in pairs for channel in pair}
    free = [channel for channel in range(HEAD_DIM) if channel not in named]
    return Rope(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2), torch.tensor(free, dtype=torch.int64))


ROPES = {
    "half split": rope([(i, i + 4) for i in range(4)]),
    "interleaved": rope([(2 * i, 2 * i + 1) for i in range(4)]),
    "partial half split": rope([(i, i + 2) for i in range(2)]),
    "partial interleaved": rope([(2, 3), (4, 5)]),
    "none": rope([]),
}
GROUPS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (3, 1)}


class Attention(nn.Module):
    """Causal, by the formula; q and k have a norm per head if asked for."""

    def __init__(self, heads: int, kv_heads: int, rope: Rope, norm: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.rope = heads, kv_heads, rope
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * HEAD_DIM) for n in (heads, kv_heads, kv_heads))
        self.q_norm, self.k_norm = (nn.LayerNorm(HEAD_DIM) if norm else nn.Identity() for _ in range(2))
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, HEAD_DIM)).transpose(-2, -3) for p in (self.q, self.k, self.v))
        q, k = self.rope(self.q_norm(q)), self.rope(self.k_norm(k))
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 0) for t in (k, v))
        scores = q @ k.mT / HEAD_DIM**0.5
        causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        return scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v


def rewritten(attention: Attention, shared: QueryKey) -> Attention:
    """With both sides of the transform folded in."""
    folded = copy.deepcopy(attention)
    for linear, side in zip((folded.q, folded.k), shared.sides(), strict=True):
        weight, bias = side.write_weight(ScaledWeight(linear.weight)).dense(), side.write_bias(linear.bias)
        linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
    return folded


def moved(attention: Attention, changed: Attention) -> float:
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    return relative(changed(x), attention(x))


def pairs(heads: int, kv_heads: int, rope: Rope, rotate: bool = True) -> RotaryPairs:
    shared = RotaryPairs(heads, kv_heads, HEAD_DIM, rope.pairs, rope.free, rotate=rotate)
    randomized(shared)
    return shared


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_one_complex_number_per_pair_leaves_attention_alone(groups: tuple[int, int], rope: Rope, rotate: bool) -> None:
    torch.manual_seed(0)
    attention, shared = Attention(*groups, rope), pairs(*groups, rope, rotate)
    changed = rewritten(attention, shared)
    assert moved(attention, changed) < 1e-12
    assert relative(changed.q.weight, attention.q.weight) > 0.1 < relative(changed.k.weight, attention.k.weight)


@pytest.mark.parametrize("name", ["half split", "interleaved", "partial half split", "partial interleaved"])
def test_pairs_of_another_layout_move_it(name: str) -> None:
    torch.manual_seed(0)
    attention = Attention(4, 2, ROPES[name])
    other = {"half split": "interleaved", "interleaved": "half split"}.get(name, "half split")
    for rotate in (False, True):
        assert moved(attention, rewritten(attention, pairs(4, 2, ROPES[other], rotate))) > 1e-3
    assert moved(attention, rewritten(attention, pairs(4, 2, ROPES["none"]))) > 1e-3  # OmniQuant's: unpaired channels


def test_sides_turned_against_each_other_move_it() -> None:
    torch.manual_seed(0)
    attention, shared = Attention(4, 2, ROPES["half split"]), pairs(4, 2, ROPES["half split"])
    changed = rewritten(attention, shared)
    with torch.no_grad():
        shared.angle.neg_()
    wrong = rewritten(attention, shared)
    changed.k = wrong.k
    assert moved(attention, changed) > 1e-3


def test_a_group_that_does_not_share_its_numbers_moves_it() -> None:
    torch.manual_seed(0)
    attention, shared = Attention(4, 2, ROPES["half split"]), pairs(4, 2, ROPES["half split"])
    query, key = shared.sides()
    query.head = torch.tensor([0, 1, 0, 1])  # query heads 0, 1 read key head 0
    changed = copy.deepcopy(attention)
    for linear, side in ((changed.q, query), (changed.k, key)):
        linear.weight = nn.Parameter(side.write_weight(ScaledWeight(linear.weight)).dense())
        linear.bias = nn.Parameter(side.write_bias(linear.bias))
    assert moved(attention, changed) > 1e-3


@pytest.mark.parametrize("gain_offset", [0.0, 1.0])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_norms_behind_the_projections_take_a_scale_per_pair(rope: Rope, gain_offset: float) -> None:
    torch.manual_seed(0)
    attention = Attention(4, 2, rope, norm=True)
    shared = RotaryPairs(4, 2, HEAD_DIM, rope.pairs, rope.free, kind="norm", rotate=False)
    assert shared.log_scale.shape == (1, len(rope.pairs) + len(rope.free))
    randomized(shared)
    changed = copy.deepcopy(attention)
    for norm, side in zip((changed.q_norm, changed.k_norm), shared.sides(), strict=True):
        weight, bias = side.write_norm(norm.weight - gain_offset, norm.bias, gain_offset)
        norm.weight, norm.bias = nn.Parameter(weight + gain_offset), nn.Parameter(bias)
    assert moved(attention, changed) < 1e-12
    changed.k_norm = attention.k_norm
    assert moved(attention, changed) > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_without_rotary_positions_a_matrix_per_head_will_do(groups: tuple[int, int], share: float) -> None:
    torch.manual_seed(0)
    shared = QueryKeyMatrix(*groups, HEAD_DIM)
    shared.progress_(share)
    randomized(shared)
    plain, rotary = Attention(*groups, ROPES["none"]), Attention(*groups, ROPES["half split"])
    assert moved(plain, rewritten(plain, shared)) < 1e-12
    assert moved(rotary, rewritten(rotary, shared)) > 1e-3  # AffineQuant's on a Llama


def test_closed_matrices_are_scales_per_channel() -> None:
    torch.manual_seed(0)
    matrix, scales = QueryKeyMatrix(4, 2, HEAD_DIM), pairs(4, 2, ROPES["none"])
    matrix.double()
    with torch.no_grad():
        matrix.log_scale.copy_(scales.log_scale.flatten())
    attention = Attention(4, 2, ROPES["none"])
    found, expected = rewritten(attention, matrix), rewritten(attention, scales)
    for name in ("q", "k"):
        torch.testing.assert_close(getattr(found, name).weight, getattr(expected, name).weight, rtol=1e-13, atol=1e-13)


def test_scales_alone_stay_apart_from_the_weight() -> None:
    weight = torch.randn(4 * HEAD_DIM, 3).double()
    query, _ = pairs(4, 2, ROPES["half split"], rotate=False).sides()
    scaled = query.write_weight(ScaledWeight(weight))
    assert scaled.weight is weight and scaled.out_scale is not None
    rotated, _ = pairs(4, 2, ROPES["half split"]).sides()
    assert rotated.write_weight(ScaledWeight(weight)).weight is not weight


@pytest.mark.parametrize("kind", ["pairs", "matrix"])
def test_rows_of_a_fused_projection(kind: str) -> None:
    torch.manual_seed(0)
    shared = pairs(4, 2, ROPES["half split"]) if kind == "pairs" else randomized(QueryKeyMatrix(4, 2, HEAD_DIM))
    q, k = torch.randn(4 * HEAD_DIM, 3).double(), torch.randn(2 * HEAD_DIM, 3).double()
    weight = ScaledWeight(torch.cat([q, k, q]))
    query, key = shared.sides()
    weight = key.write_weight(query.write_weight(weight, slice(0, len(q))), slice(len(q), len(q) + len(k)))
    alone = [side.write_weight(ScaledWeight(w)).dense() for side, w in ((query, q), (key, k))]
    torch.testing.assert_close(weight.dense(), torch.cat([*alone, q]), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["pairs", "matrix"])
def test_training_and_fold_give_the_same_fp32_weights(kind: str) -> None:
    torch.manual_seed(0)
    shared = pairs(4, 2, ROPES["half split"]) if kind == "pairs" else QueryKeyMatrix(4, 2, HEAD_DIM)
    if isinstance(shared, QueryKeyMatrix):
        shared.progress_(1)
        randomized(shared)
    shared.float()
    for heads, side in zip((4, 2), shared.sides(), strict=True):
        weight = ScaledWeight(torch.randn(heads * HEAD_DIM, 33).bfloat16())
        training = side.write_weight(weight).dense()
        with torch.no_grad():
            fold = copy.deepcopy(side).write_weight(weight).dense()
        assert training.requires_grad and training.dtype == torch.float32 and torch.equal(training, fold)


def test_starts_as_the_identity_and_learns_on_both_sides() -> None:
    half = ROPES["half split"]
    for shared in (RotaryPairs(4, 2, HEAD_DIM, half.pairs, half.free), QueryKeyMatrix(4, 2, HEAD_DIM)):
        if isinstance(shared, QueryKeyMatrix):
            shared.progress_(1)
        for heads, side in zip((4, 2), shared.sides(), strict=True):
            weight = torch.randn(heads * HEAD_DIM, 3)
            found = side.write_weight(ScaledWeight(weight)).dense()
            assert torch.equal(found, weight) and side.write_bias(None) is None
            shared.zero_grad()
            F.mse_loss(found, torch.randn_like(found)).backward()
            for name, parameter in shared.named_parameters():
                closed = torch.eye(HEAD_DIM, dtype=torch.bool) if name.endswith("off_diagonal") else torch.tensor(False)
                assert ((parameter.grad != 0) | closed).all(), name


def test_what_cannot_work_is_refused_with_the_reason() -> None:
    half = ROPES["half split"]
    with pytest.raises(ValueError, match="each of a head's 8 channels once"):
        RotaryPairs(4, 2, HEAD_DIM, half.pairs[:3], half.free)
    with pytest.raises(ValueError, match="each of a head's 8 channels once"):
        RotaryPairs(4, 2, HEAD_DIM, half.pairs, torch.tensor([0]))
    with pytest.raises(ValueError, match="evenly"):
        RotaryPairs(4, 3, HEAD_DIM, half.pairs, half.free)
    with pytest.raises(ValueError, match="rotate=False"):
        RotaryPairs(4, 2, HEAD_DIM, half.pairs, half.free, kind="norm")
    query, _ = pairs(4, 2, half).sides()
    with pytest.raises(ValueError, match="does not fold into a norm"):
        query.write_norm(torch.ones(HEAD_DIM), None, 0.0)
