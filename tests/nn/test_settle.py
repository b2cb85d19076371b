"""A transformed weight of which nothing is learned is computed once."""

import torch
from torch import nn

from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.quant.grid import IntGrid
from plquant.quant.scaled_weight import ScaledWeight
from plquant.transforms.kronecker import KroneckerAffine


class Counting(KroneckerAffine):
    """Counts how often a weight is rewritten."""

    times = 0

    def read_weight(self, weight: ScaledWeight) -> ScaledWeight:
        self.times += 1
        return super().read_weight(weight)


def rotated(learned: bool) -> tuple[FakeQuantLinear, Counting]:
    torch.manual_seed(0)
    linear = FakeQuantLinear(nn.Linear(12, 8), IntGrid(3, 4))
    rotation = Counting(12, rotate=torch.Generator().manual_seed(1))
    linear.add_read(rotation.requires_grad_(learned), online=True)
    return linear, rotation


def test_fixed_rotations_are_applied_once_and_give_the_same_codes() -> None:
    linear, rotation = rotated(learned=False)
    x = torch.randn(5, 12)
    before, codes = linear(x), linear.quantize().codes
    linear.settle()
    rotation.times = 0
    assert torch.equal(linear(x), before) and torch.equal(linear.quantize().codes, codes)
    assert rotation.times == 0


def test_what_is_learned_does_not_settle() -> None:
    linear, rotation = rotated(learned=True)
    linear.settle()
    x, rotation.times = torch.randn(5, 12), 0
    before = linear(x)
    with torch.no_grad():
        rotation.right.log_scale += torch.randn_like(rotation.right.log_scale)
    assert rotation.times == 1 and not torch.allclose(linear(x), before)
