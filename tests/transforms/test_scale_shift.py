"""The algebra of scale and shift, on a norm and on linears, in float64."""

import pytest
import torch
from torch import nn

from plquant.transforms.scale_shift import ScaleShift
from tests.transforms.toy import randomized, read, relative, two_linears


def test_scale_is_positive_whatever_is_learned() -> None:
    transform = ScaleShift(4)
    with torch.no_grad():
        transform.log_scale.copy_(torch.tensor([-50.0, -1.0, 0.0, 50.0]))
    assert (transform.scale > 0).all() and transform.shift is None


@pytest.mark.parametrize("shift", [False, True])
def test_as_a_transform_two_linears_are_the_same_function(shift: bool) -> None:
    torch.manual_seed(0)
    channel = torch.arange(6).view(3, 1, 2).expand(-1, 2, -1).flatten()  # grouped queries
    transform = randomized(ScaleShift(6, channel, shift))
    first, second = randomized(nn.Linear(4, 6, bias=shift)), randomized(nn.Linear(12, 5, bias=shift))
    before, after = two_linears(transform, first, second, torch.randn(7, 4).double(), channel)
    assert relative(after, before) < 1e-12


@pytest.mark.parametrize("gain_offset", [0.0, 1.0])
def test_as_a_transform_a_norm_and_linears_are_the_same_function(gain_offset: float) -> None:
    torch.manual_seed(0)
    transform, norm = randomized(ScaleShift(6, shift=True)), randomized(nn.LayerNorm(6))
    consumer, x = randomized(nn.Linear(6, 5)), torch.randn(7, 6).double()
    weight, bias = transform.write_norm(norm.weight - gain_offset, norm.bias, gain_offset)
    y = nn.functional.layer_norm(x, (6,), weight + gain_offset, bias, norm.eps)
    assert relative(read(consumer, y, [transform]), consumer(norm(x))) < 1e-12
    wrong, _ = transform.write_norm(norm.weight - gain_offset, norm.bias, 1 - gain_offset)  # negative control
    y = nn.functional.layer_norm(x, (6,), wrong + gain_offset, bias, norm.eps)
    assert relative(read(consumer, y, [transform]), consumer(norm(x))) > 1e-2
    with pytest.raises(ValueError, match="source has no bias"):
        transform.write_norm(norm.weight, None, gain_offset)
    with pytest.raises(ValueError, match="consumer has no bias"):
        transform.read_bias(consumer.weight, None)
