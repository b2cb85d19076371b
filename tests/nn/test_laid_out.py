"""A packed linear that is laid out for kernels for a while."""

from __future__ import annotations

import pytest
import torch

from plquant.kernels import native, run_time
from plquant.nn.packed_linear import PackedLinear
from plquant.quant.fake_quantize import quantize_weight
from plquant.quant.grid import IntGrid


def made() -> PackedLinear:
    return PackedLinear(quantize_weight(torch.randn(32, 64).bfloat16(), IntGrid(4, 16)), torch.randn(32).bfloat16())


@pytest.mark.parametrize("wanted", [False, True])
def test_afterwards_everything_is_as_it_was(wanted: bool) -> None:
    if not native.available():
        pytest.skip("needs a CPU with kernels")
    linear = made()
    linear.kernels = wanted
    before = dict(linear._buffers)
    with linear.laid_out():
        assert linear.prepared is not None and "weight_packed" not in linear._buffers
        with linear.laid_out():  # it is already
            assert linear.prepared is not None
        assert linear.prepared is not None
    assert linear.prepared is None and linear.kernels == wanted
    assert linear._buffers.keys() == before.keys() and all(linear._buffers[name] is before[name] for name in before)


def test_an_error_while_it_is_laid_out_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(run_time.Vectors):
        @classmethod
        def lay_out(cls, *_: object) -> None:  # type: ignore[override]
            raise MemoryError

    linear = made()
    before = dict(linear._buffers)
    monkeypatch.setattr(run_time, "kind", lambda *_: Full)
    with pytest.raises(MemoryError), linear.laid_out():
        raise AssertionError("it was laid out")
    assert linear._buffers.keys() == before.keys() and all(linear._buffers[name] is before[name] for name in before)
    assert linear.prepared is None and not linear.kernels
