"""The entry of config.json, against compressed-tensors' reading of it, and sizes."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_targets
from torch import nn

from plquant.formats.checkpoint import effective_bits, predicted_bytes
from plquant.formats.packing import pack
from plquant.formats.quantization_config import (
    activations_of,
    attention_of,
    grids_of,
    online_of,
    quantization_config,
)
from plquant.quant.fake_quantize import quantize_weight
from plquant.quant.grid import ActivationGrid, IntGrid

GRIDS = {
    "layers.0.q": IntGrid(4, 8),
    "layers.0.down": IntGrid(3, 8, axis="out"),
    "layers.1.q": IntGrid(4, 8),
    "layers.1.q2": IntGrid(4, None, symmetric=True),
    "layers.1.down": IntGrid(3, 8, axis="out"),
    "layers.2.q": IntGrid(4, 8),
}
ACTIVATIONS = ActivationGrid(4, kv=8, symmetric=True)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("size", "axis"), [(8, "in"), (None, "in"), (8, "out")])
def test_a_grid_is_read_back(bits: int, symmetric: bool, size: int | None, axis: str) -> None:
    grid = IntGrid(bits, size, symmetric, axis)  # type: ignore[arg-type]
    assert grids_of(quantization_config({"a": grid}, ["lm_head"]), ["a", "b"]) == {"a": grid, "b": grid}


def test_several_grids_are_read_back() -> None:
    config = json.loads(json.dumps(quantization_config(GRIDS, ["lm_head"], ACTIVATIONS, ["layers.0.attn"], {"n": 1})))
    assert grids_of(config, GRIDS) == GRIDS
    assert activations_of(config) == ACTIVATIONS
    assert attention_of(config) == ["layers.0.attn"] and online_of(config) == {"n": 1}


def test_what_is_not_there_is_read_as_nothing() -> None:
    config = quantization_config(GRIDS)
    assert config["plquant"] == {"version": 1} and activations_of(config) is None
    assert attention_of(config) == [] and online_of(config) == {}


def test_compressed_tensors_gives_every_linear_the_same_grid() -> None:
    config = QuantizationConfig(**quantization_config(GRIDS, [], ACTIVATIONS))
    groups = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    for name, grid in GRIDS.items():
        scheme = groups[match_targets(name, nn.Linear(1, 1), groups)[0]]
        assert scheme.weights.num_bits == grid.bits and scheme.weights.symmetric == grid.symmetric
        assert (scheme.weights.strategy == "block") == (grid.axis == "out")
        assert scheme.input_activations.num_bits == 4 and scheme.input_activations.dynamic
        assert scheme.input_activations.strategy == "token" and scheme.input_activations.symmetric
    assert config.kv_cache_scheme is None


def test_the_most_common_grid_is_that_of_all_linears() -> None:
    groups = quantization_config(GRIDS)["config_groups"]
    assert [group["targets"] for group in groups.values()] == [
        ["Linear"],
        ["layers.0.down", "layers.1.down"],
        ["layers.1.q2"],
    ]


def test_inputs_in_floating_point_are_said_to_be() -> None:
    config = quantization_config(GRIDS, [], ActivationGrid(None, kv=4))
    assert all(group["input_activations"] is None for group in config["config_groups"].values())
    assert activations_of(config) == ActivationGrid(None, kv=4)


def test_compressed_tensors_refuses_run_time_operations_and_says_why() -> None:
    with pytest.raises(ValueError, match=r"'needs plquant: open with plquant.load\(folder\)'"):
        QuantizationConfig(**quantization_config(GRIDS, online={"norm": {}}))


def test_foreign_formats_are_refused() -> None:
    config = quantization_config({"a": IntGrid(4, 8)})
    for changed in ({"format": "marlin-24"}, {"quant_method": "gptq"}, {"config_groups": {}}):
        with pytest.raises(ValueError, match="not in the format that plquant reads"):
            grids_of(config | changed, ["a"])
    by_pattern = quantization_config({"a": IntGrid(4, 8)})
    by_pattern["config_groups"]["group_0"]["targets"] = ["re:.*a$"]
    with pytest.raises(ValueError, match="not in the format that plquant reads"):
        grids_of(by_pattern, ["a"])


def test_foreign_activations_are_refused() -> None:
    config = quantization_config({"a": IntGrid(4, 8)}, [], ActivationGrid(8))
    del config["plquant"]
    with pytest.raises(ValueError, match="quantizes activations in a way that plquant does not read"):
        activations_of(config)


def test_sizes_of_mixed_grids_are_predicted_to_the_byte() -> None:
    shapes = {name: (16 + 8 * i, 24) for i, name in enumerate(GRIDS)}
    stored = 0
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        stored += sum(t.nbytes for t in pack(quantize_weight(weight, GRIDS[name])).values())
    assert predicted_bytes(shapes, GRIDS, 10, torch.bfloat16) == stored + 20


def test_effective_bits_count_scales_zero_points_and_the_rest() -> None:
    shapes = {"a": (16, 64)}
    assert effective_bits(shapes, {"a": IntGrid(3, 32)}, torch.bfloat16) == 3 + (16 + 3) / 32
    assert effective_bits(shapes, {"a": IntGrid(3, 32, symmetric=True)}, torch.float32) == 3 + 32 / 32
    assert effective_bits(shapes, {"a": IntGrid(4, None)}, torch.bfloat16) == 4 + 20 / 64
    assert effective_bits(shapes, {"a": IntGrid(4, 8, axis="out")}, torch.bfloat16) == 4 + 20 / 8
    assert effective_bits(shapes, {"a": IntGrid(4, 32)}, torch.bfloat16, 1024) == 4 + 20 / 32 + 1
    mixed = {"a": (16, 64), "b": (16, 192)}
    assert effective_bits(mixed, {"a": IntGrid(8, 64, True), "b": IntGrid(4, 64, True)}, torch.bfloat16) == 5 + 16 / 64
