"""The folder of a quantized model: safetensors shards, their index, and the entry in config.json that names the format.

The format is compressed-tensors' ``pack-quantized``, which stock transformers reads. A shard is a block, written as
soon as the block is finished; the embeddings, final norm and head are one more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plquant.files import replacing, write_json
from plquant.quant.grid import IntGrid

REST = "model-rest.safetensors"
INDEX = "model.safetensors.index.json"
PACKED = ".weight_packed"
SHAPE_BYTES = 16  # of weight_shape, two int64


def block_shard(index: int) -> str:
    """File name of a block's shard."""
    return f"model-block-{index:03d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by their full names; the file is whole or not there."""
    from safetensors.torch import save_file

    with replacing(path) as partial:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, {"format": "pt"})


def write_index(folder: Path, shards: list[str]) -> None:
    """Write the index of these shards."""
    from safetensors import safe_open

    weight_map: dict[str, str] = {}
    for shard in shards:
        with safe_open(folder / shard, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), shard)
    total = sum((folder / shard).stat().st_size for shard in shards)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def packed_linears(folder: Path) -> list[str]:
    """Names of the quantized linears in a folder.

    Raises:
        ValueError: The folder is not a finished run of ours.
    """
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} has no {INDEX}; give the output folder of a finished `plquant calibrate`")
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    return [name.removesuffix(PACKED) for name in names if name.endswith(PACKED)]


def quantization_config(grid: IntGrid, unquantized: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` entry of config.json.

    Args:
        grid: Grid of every quantized linear.
        unquantized: Names of the linears that keep their floating-point weight.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    if grid.group_size is None:
        strategy: dict[str, Any] = {"strategy": "channel"}
    elif grid.axis == "in":
        strategy = {"strategy": "group", "group_size": grid.group_size}
    else:
        strategy = {"strategy": "block", "block_structure": [grid.group_size, 1]}
    weights = QuantizationArgs(num_bits=grid.bits, type="int", symmetric=grid.symmetric, **strategy)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=unquantized,
    )
    return config.model_dump(mode="json")


def grid_of(config: Mapping[str, Any]) -> IntGrid:
    """The grid that a ``quantization_config`` entry names.

    Raises:
        ValueError: It is not one that plquant writes.
    """
    try:
        (group,) = config["config_groups"].values()
        weights = group["weights"]
        if config["quant_method"] != "compressed-tensors" or config["format"] != "pack-quantized":
            raise ValueError(f"quant_method={config['quant_method']}, format={config['format']}")
        block = weights.get("block_structure")
        size = {"channel": None, "group": weights.get("group_size"), "block": block and block[0]}[weights["strategy"]]
        return IntGrid(weights["num_bits"], size, weights["symmetric"], "in" if block is None else "out")
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            "the checkpoint is quantized, but not in the format that plquant reads (compressed-tensors pack-quantized "
            f"with one group of linears): {error!r}. Open it with transformers, or give the original model."
        ) from error


def predicted_bytes(shapes: Mapping[str, tuple[int, int]], grid: IntGrid, rest: int, dtype: torch.dtype) -> int:
    """Size of the tensors on disk, to the byte.

    Args:
        shapes: Of the linears to be quantized, [O, I].
        grid: Their grid.
        rest: Number of all other parameters.
        dtype: Of these parameters and of the scales.
    """
    per_word = 32 // grid.bits
    total = rest * dtype.itemsize
    for out_features, in_features in shapes.values():
        size = grid.size(grid.grouped_width((out_features, in_features)))
        groups = out_features * in_features // size
        total += 4 * out_features * -(-in_features // per_word) + groups * dtype.itemsize + SHAPE_BYTES
        if not grid.symmetric and grid.axis == "out":
            total += groups
        elif not grid.symmetric:
            total += 4 * -(-out_features // per_word) * (in_features // size)
    return total
