"""Packing against compressed-tensors' own compressor."""

from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given
from hypothesis import strategies as st

from plquant.formats.packing import pack, unpack
from plquant.formats.quantization_config import quantization_config
from plquant.quant.affine import QTensor
from plquant.quant.fake_quantize import quantize_weight
from plquant.quant.grid import IntGrid

GRIDS = [
    IntGrid(bits, size, symmetric, axis)  # type: ignore[arg-type]
    for bits in range(2, 9)
    for size, axis in ((8, "in"), (None, "in"), (8, "out"))
    for symmetric in (False, True)
]


def random_weight(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)).to(dtype)


def equal(a: QTensor, b: QTensor) -> bool:
    if (a.zero_point is None) != (b.zero_point is None):
        return False
    pairs: list[Any] = [(a.codes, b.codes), (a.scale, b.scale), (a.zero_point, b.zero_point)]
    return all(x is None or torch.equal(x, y) for x, y in pairs)


@given(st.sampled_from(GRIDS), st.integers(1, 5), st.integers(1, 5))
def test_unpacking_gives_back_what_was_packed(grid: IntGrid, rows: int, columns: int) -> None:
    weight = random_weight(8 * rows, 8 * columns) if grid.group_size else random_weight(rows * 3, columns * 7)
    q = quantize_weight(weight, grid)
    assert equal(unpack(pack(q), weight.shape, grid), q)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_compressed_tensors_reads_the_same_weight(grid: IntGrid) -> None:
    q = quantize_weight(random_weight(16, 24), grid)
    scheme = QuantizationConfig(**quantization_config({"linear": grid})).config_groups["group_0"]
    theirs = PackedQuantizationCompressor.decompress(pack(q), scheme)["weight"]
    assert torch.equal(theirs, q.dequantize())
