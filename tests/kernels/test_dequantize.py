"""The plain matrix has the bits of the reference: (code - zero_point) * scale in the dtype of the scale."""

from typing import Literal

import pytest
import torch

pytest.importorskip("triton")
from bench.traffic import counted
from plquant.kernels.dequantize import dequantize
from plquant.kernels.layout import unpack
from tests.kernels.quantized import quantized

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_width(bits: int, axis: Literal["in", "out"], dtype: torch.dtype) -> None:
    for shape, group, symmetric in (((32, 512), 32, False), ((40, 136), None, True), ((32, 160), 32, False)):
        group_size = group or (shape[1] if axis == "in" else shape[0])
        packed, weight = quantized(bits, shape, group_size, axis, dtype, symmetric)
        assert torch.equal(dequantize(packed), weight.to(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_every_byte_moves_once(bits: int) -> None:
    packed, _ = quantized(bits, (32, 512), 128)
    with counted() as traffic:
        out = dequantize(packed)
    assert traffic.total("dram") == packed.nbytes + out.nbytes
    assert traffic.total("l2") <= 1.01 * (packed.nbytes + out.nbytes)


def test_codes_and_zero_points_at_their_ends() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        packed, weight = quantized(8, (64, 128), 32, "in", dtype)
        codes, scale, zeros = unpack(packed)
        assert zeros is not None
        assert {0, 255} <= set(codes.unique().tolist())
        assert torch.equal(dequantize(packed), weight.to(dtype))


def test_scales_of_another_dtype_are_refused() -> None:
    packed, _ = quantized(4, (32, 64), 32, dtype=torch.float32)
    with pytest.raises(ValueError, match="float32"):
        dequantize(packed)
