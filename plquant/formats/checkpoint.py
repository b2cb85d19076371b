"""The folder of a quantized model: safetensors shards and their index.

A shard is a block, written as soon as the block is finished; the embeddings, final norm and head are one more. What the
tensors mean is said by ``quantization_config``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plquant.quant.grid import IntGrid

REST = "model-rest.safetensors"
INDEX = "model.safetensors.index.json"
PACKED = ".weight_packed"
SHAPE_BYTES = 16  # of weight_shape, two int64


def block_shard(index: int) -> str:
    """File name of a block's shard."""
    return f"model-block-{index:03d}.safetensors"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by their full names, as transformers wants them."""
    from safetensors.torch import save_file

    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, {"format": "pt"})


def index_of(folder: Path, shards: list[str]) -> dict[str, Any]:
    """The index of these shards."""
    weight_map: dict[str, str] = {}
    for shard in shards:
        weight_map |= dict.fromkeys(names_in([folder / shard]), shard)
    total = sum((folder / shard).stat().st_size for shard in shards)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def names_in(files: Iterable[str | Path]) -> list[str]:
    """Names of all tensors in safetensors files."""
    from safetensors import safe_open

    names: list[str] = []
    for path in files:
        with safe_open(path, "pt") as file:
            names += file.keys()
    return names


def tensor_names(folder: Path) -> list[str]:
    """Names of all tensors in a folder.

    Raises:
        ValueError: The folder is not a finished run of ours.
    """
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} has no {INDEX}; give the output folder of a finished `plquant calibrate`")
    return list(json.loads((folder / INDEX).read_text())["weight_map"])


def packed_linears(tensors: Iterable[str]) -> list[str]:
    """Names of the quantized linears among all tensors."""
    return [name.removesuffix(PACKED) for name in tensors if name.endswith(PACKED)]


def predicted_bytes(
    shapes: Mapping[str, tuple[int, int]], grids: Mapping[str, IntGrid], rest: int, dtype: torch.dtype
) -> int:
    """Size of the tensors on disk, to the byte; without those of run-time operations and of input quantizers.

    Args:
        shapes: Of the linears to be quantized, [O, I].
        grids: Their grids.
        rest: Number of all other parameters.
        dtype: Of these parameters and of the scales.
    """
    total = rest * dtype.itemsize
    for name, (out_features, in_features) in shapes.items():
        grid = grids[name]
        per_word, groups = 32 // grid.bits, _groups(shapes[name], grid)
        total += 4 * out_features * -(-in_features // per_word) + groups * dtype.itemsize + SHAPE_BYTES
        if not grid.symmetric and grid.axis == "out":
            total += groups
        elif not grid.symmetric:
            total += 4 * -(-out_features // per_word) * (groups // out_features)
    return total


def effective_bits(
    shapes: Mapping[str, tuple[int, int]], grids: Mapping[str, IntGrid], dtype: torch.dtype, other_bits: float = 0
) -> float:
    """Bits per quantized weight, with everything that comes with them: ``b + (scale + zero-point) / g`` and others.

    Codes and zero-points count with their own width. On disk they take more where it does not divide 32
    (``predicted_bytes``).

    Args:
        shapes: Of the quantized linears, [O, I].
        grids: Their grids.
        dtype: Of the scales.
        other_bits: Bits of what else the quantized model needs: tensors of run-time operations, offsets.
    """
    weights, bits = 0, other_bits
    for name, shape in shapes.items():
        grid, size = grids[name], shape[0] * shape[1]
        per_group = 8 * dtype.itemsize + (0 if grid.symmetric else grid.bits)
        weights += size
        bits += grid.bits * size + per_group * _groups(shape, grid)
    return bits / weights


def _groups(shape: tuple[int, int], grid: IntGrid) -> int:
    """Number of groups of a weight [O, I]."""
    return shape[0] * shape[1] // grid.size(grid.grouped_width(shape))
