"""Low-rank correction: nothing at the start, rounded with the weight, of the rank it says."""

import torch
from torch import Tensor

from plquant.nn.fixed_delta import FixedDelta
from plquant.nn.lora import LoRA
from plquant.quant.fake_quantize import fake_quantize, quantize_weight
from plquant.quant.grid import IntGrid


def test_it_starts_as_nothing_to_the_bit() -> None:
    weight = torch.randn(6, 8)
    assert torch.equal(fake_quantize(weight + LoRA(6, 8).delta(), IntGrid(3, 4)), fake_quantize(weight, IntGrid(3, 4)))


def test_the_start_is_its_own_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = LoRA(6, 8, seed=3), LoRA(6, 8, seed=3), LoRA(6, 8, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.a, again.a) and not torch.equal(first.a, other.a)
    bound = 8**-0.5  # kaiming uniform, a = sqrt(5)
    assert 0.5 * bound < first.a.abs().max() <= bound and first.a.std() > 0.4 * bound


def test_delta_is_the_scaled_product() -> None:
    lora = LoRA(6, 8, rank=2, alpha=3.0)
    torch.nn.init.normal_(lora.b)
    torch.testing.assert_close(lora.delta(), 1.5 * lora.b @ lora.a)
    assert torch.linalg.matrix_rank(lora.delta()) == 2 and lora.delta().dtype == torch.float32


def test_what_is_trained_is_what_is_rounded_and_outside_the_quantizer_it_is_lost() -> None:
    torch.manual_seed(0)
    weight, grid = torch.randn(16, 32), IntGrid(3, 32)
    x = torch.randn(200, 32) * torch.rand(32).mul(6).exp()

    def loss(quantized: Tensor) -> Tensor:
        return (x @ (quantized - weight).t()).square().mean()

    def train(inside: bool) -> tuple[float, float]:
        """The best loss of training, and what it is with that change merged into the weight and rounded."""
        lora, best = LoRA(16, 32), (float("inf"), torch.empty(0))
        optimizer = torch.optim.Adam(lora.parameters(), 3e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
        for _ in range(300):
            delta = lora.delta()
            now = loss(fake_quantize(weight + delta, grid) if inside else fake_quantize(weight, grid) + delta)
            best = min(best, (now.item(), delta.detach()), key=lambda pair: pair[0])
            optimizer.zero_grad()
            now.backward()
            assert all(p.grad is not None for p in lora.parameters())
            optimizer.step()
            schedule.step()
        return best[0], loss(quantize_weight(weight + best[1], grid).dequantize()).item()

    before = loss(fake_quantize(weight, grid)).item()  # 7,509
    trained, merged = train(inside=True)
    assert merged == trained < 0.8 * before  # 4,630
    trained, merged = train(inside=False)
    assert trained < 0.2 * before  # 699
    assert merged > before  # 19,367


def test_a_fixed_delta_is_what_it_was_given_and_nothing_to_learn() -> None:
    value = torch.randn(6, 8)
    fixed = FixedDelta(value)
    assert torch.equal(fixed.delta(), value) and not list(fixed.parameters())
    assert torch.equal(fixed.state_dict()["value"], value)
