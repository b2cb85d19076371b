"""Products of bfloat16 on a CPU without an instruction for them: the same numbers, quickly, wherever a run computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import plquant as pq
from plquant import bfloat16
from plquant.bfloat16 import ThroughFloat32, quick_products
from tests.test_tune import tuned

CPU = torch.device("cpu")


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().requires_grad_()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


PRODUCTS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "mm": (torch.matmul, (bf16(9, 33), bf16(33, 7))),
    "linear": (F.linear, (bf16(2, 9, 33), bf16(7, 33), bf16(7))),
    "bmm": (torch.matmul, (bf16(3, 9, 33), bf16(3, 33, 7))),
    "baddbmm": (torch.baddbmm, (bf16(3, 9, 7), bf16(3, 9, 33), bf16(3, 33, 7))),
    "attention": (attention, (bf16(1, 2, 5, 8), bf16(1, 2, 5, 8), bf16(1, 2, 5, 8))),
}


def results(name: str, dtype: torch.dtype) -> list[Tensor]:
    """The product and its gradients."""
    function, operands = PRODUCTS[name]
    operands = tuple(x.detach().to(dtype).requires_grad_() for x in operands)
    y = function(*operands)
    return [y, *torch.autograd.grad(y, operands, (torch.arange(y.numel()) % 5 - 2).view_as(y).to(y.dtype))]


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_gradients_are_those_of_float32_rounded_once(name: str) -> None:
    exact = results(name, torch.float64)
    with ThroughFloat32():
        found = results(name, torch.bfloat16)
    for value, wanted in zip(found, exact, strict=True):
        assert value.dtype == torch.bfloat16
        # A gradient of attention depends on its output, which was rounded before.
        tolerance = 2e-2 if name == "attention" else 2**-8
        assert (value - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_other_dtypes_and_devices_are_left_alone() -> None:
    x, w = torch.randn(4, 8), torch.randn(5, 8)
    with ThroughFloat32():
        assert torch.equal(F.linear(x, w), F.linear(x, w))
        assert F.linear(x.double(), w.double()).dtype == torch.float64
        y = F.linear(x.to("meta", torch.bfloat16), w.to("meta", torch.bfloat16))
    assert y.dtype == torch.bfloat16 and y.device.type == "meta"


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> Counter[torch.dtype]:
    """Dtypes of what a product gets, on a CPU that has none of bfloat16."""
    found: Counter[torch.dtype] = Counter()

    def widen(tensor: Tensor) -> Tensor:
        found[tensor.dtype] += 1
        return tensor.float()

    monkeypatch.setattr(bfloat16, "_widened", widen)
    monkeypatch.setattr(bfloat16, "is_native", lambda: False)
    return found


def test_a_cpu_that_has_them_is_left_alone(widened: Counter[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with quick_products(CPU):
        results("linear", torch.bfloat16)
    assert widened.pop(torch.bfloat16) > 0
    with quick_products(torch.device("meta")):  # nor is what computes elsewhere
        results("linear", torch.bfloat16)
    monkeypatch.setattr(bfloat16, "is_native", lambda: True)
    with quick_products(CPU):
        results("linear", torch.bfloat16)
    assert not widened


def test_whatever_computes_much_computes_so(widened: Counter[Any], checkpoint: Path, tmp_path: Path) -> None:
    model = pq.QuantizedLM(str(checkpoint), pq.methods.Light, pq.IntGrid(4, 16))
    data = pq.data.BuiltinText(num_samples=4, seq_len=32, eval_seq_len=64, eval_windows=2)
    trainer = pq.BlockwiseTrainer(accelerator="cpu", enable_progress_bar=False)
    work: dict[str, Callable[[], Any]] = {
        "plan": lambda: trainer.plan(model, data),
        "validate": lambda: trainer.validate(model, data, result_file=str(tmp_path / "found.json")),
        "calibrate": lambda: trainer.calibrate(model, data, str(tmp_path / "out"), evaluate=False),
        "tune": lambda: tuned(tmp_path / "out", tmp_path / "tuned", epochs=1),
    }
    for name, run in work.items():
        run()
        assert widened.pop(torch.bfloat16, 0) > 20, name
