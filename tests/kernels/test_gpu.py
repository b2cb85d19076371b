"""The same kernels on a GPU: pytest -m gpu tests/kernels."""

from __future__ import annotations

from itertools import product
from typing import Literal

import pytest
import torch

from plquant.kernels import decode
from tests.kernels.quantized import error_ratio, inputs, quantized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_as_exact_as_dequantizing_first(bits: int, axis: Literal["in", "out"], dtype: torch.dtype) -> None:
    limits = {2: 1.5, 3: 1.25} if axis == "out" else {}
    modes = {False, dtype == torch.float16 and decode.subnormals_survive(torch.device(DEVICE))}
    for shape, rows, subnormal in product([(4096, 4096), (576, 1536), (1000, 1056)], (1, 5, 16), modes):
        packed, weight = quantized(bits, shape, 32 if axis == "in" else shape[0], axis, dtype, device=DEVICE)
        x = inputs(rows, shape[1], dtype, DEVICE)
        assert error_ratio(decode.linear(x, packed, subnormal=subnormal), x, weight) <= limits.get(bits, 1.15)


def test_the_same_bits_again() -> None:
    packed, _ = quantized(4, (1024, 4096), 128, device=DEVICE)
    x = inputs(3, 4096, device=DEVICE)
    outs = [decode.linear(x, packed) for _ in range(20)]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_both_modes_agree_where_subnormals_survive() -> None:
    assert decode.subnormals_survive(torch.device(DEVICE)), "this device flushes subnormals: the safe mode is used"
    packed, _ = quantized(4, (512, 1024), 64, device=DEVICE)
    x = inputs(4, 1024, device=DEVICE)
    fast, safe = (decode.linear(x, packed, subnormal=mode).double() for mode in (True, False))
    assert (fast - safe).norm() <= 5e-4 * fast.norm()  # the rounding of fp16 is 2e-4


def test_in_a_cuda_graph() -> None:
    packed, _ = quantized(3, (1024, 1024), 128, device=DEVICE)
    x = inputs(2, 1024, device=DEVICE)
    expected = decode.linear(x, packed)  # compiles, and asks the device about subnormals
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode.linear(x, packed)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_under_torch_compile_as_an_op() -> None:
    packed, _ = quantized(4, (512, 1024), 64, device=DEVICE)
    x = inputs(2, 1024, device=DEVICE)

    @torch.library.custom_op("plquant_test::decode", mutates_args=())
    def op(x: torch.Tensor) -> torch.Tensor:
        return decode.linear(x, packed)

    @op.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(x.shape[0], 512)

    compiled = torch.compile(lambda x: torch.relu(op(x)), fullgraph=True)
    assert torch.equal(compiled(x), torch.relu(decode.linear(x, packed)))
