"""Bytes that kernels move, counted in the interpreter."""

from __future__ import annotations

import pytest
import torch

from bench.interpreter import interpreted
from bench.traffic import counted
from plquant.kernels import decode
from tests.kernels import toy_kernels as toy
from tests.kernels.quantized import inputs, quantized


def test_counts() -> None:
    x = torch.randn(4, 64)
    out = torch.empty_like(x)
    with interpreted(toy), counted() as traffic:
        toy.copy_rows[(4,)](x, out, 24, 64, BLOCK=32)
    load, store = traffic.bytes["load", "x_ptr"], traffic.bytes["store", "o_ptr"]
    assert load.useful == 2 * 4 * 24 * 4  # the first row four times more
    assert load.l2 == (1 + 3 * 2) * 24 * 4
    assert load.dram == store.useful == store.dram == 4 * 24 * 4


@pytest.mark.parametrize(("bits", "l2"), [(2, 1.11), (3, 1.10), (4, 1.10), (6, 1.10), (8, 1.10)])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_a_weight_moves_once_and_little_else(bits: int, l2: float, axis: str) -> None:
    """In L2 each program reads all of x, 2 bytes to 64 weights: an eighth of a weight of 2 bits."""
    group_size = 128 if axis == "in" else 64
    packed, _ = quantized(bits, (256, 512), group_size, axis)  # type: ignore[arg-type]
    x = inputs(1, 512)
    with interpreted(), counted() as traffic:
        out = decode.linear(x, packed, subnormal=True)
    least = packed.nbytes + x.nbytes + out.nbytes
    assert traffic.total("dram") == least
    assert traffic.total("l2") <= l2 * least
    assert not any(kind == "atomic" for kind, _ in traffic.bytes)


def test_sums_of_splits_move_twice() -> None:
    packed, _ = quantized(4, (64, 512), 128)
    x = inputs(1, 512)
    with interpreted(), counted() as traffic:
        decode.linear(x, packed, config=decode.Config(64, 64, 2, 3), subnormal=True)
    assert traffic.bytes["load", "parts_ptr"].dram == 3 * 64 * 4
