"""The ``quantization_config`` entry of config.json: what the tensors of a quantized model mean.

The format is compressed-tensors' ``pack-quantized``, which stock transformers reads; one of its groups for every grid
in the model. Activations:

    inputs of linears       ``input_activations`` of the groups: dynamic, per token. Stock transformers executes them,
                            in fp32 to our bits; in bf16 its scales are bf16, ours fp32; its symmetric scale, 2 max / Q,
                            clips the greatest element
    queries, keys, values,  our own entry ``plquant``, which others ignore: in compressed-tensors' ``kv_cache_scheme``
    softmax probabilities   a dynamic range is that of a head over all tokens, not of each token
    norms                   which of them may quantize for all who read them: our own entry; others quantize one by one
    run-time operations     our own entry as well. Without them the weights are wrong, so the format is no longer
                            called ``pack-quantized`` and other loaders refuse it. (Of another ``quant_method``
                            transformers only warns, and goes on with random weights.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from plquant.quant.grid import ActivationGrid, IntGrid

FORMAT = "pack-quantized"
# Loaders check the format's name and show this one in their message, which has room for 50 letters.
FORMAT_WITH_OPERATIONS = "needs plquant: open with plquant.load(folder)"
ENTRY = "plquant"  # says that a folder is ours, see transformers_hook
VERSION = 1  # of what it holds
ALL = "Linear"  # target of the most common grid: every linear that no other group and not ``ignore`` names


def quantization_config(
    grids: Mapping[str, IntGrid],
    unquantized: Iterable[str] = (),
    activations: ActivationGrid | None = None,
    attention: Collection[str] = (),
    online: Mapping[str, Any] | None = None,
    norms: Mapping[str, Any] | None = None,
    rewritten: bool = False,
) -> dict[str, Any]:
    """The entry for a quantized model.

    Args:
        grids: Name of every quantized linear -> its grid.
        unquantized: Names of the linears that keep their floating-point weight.
        activations: Grid of the activations.
        attention: Names of the attention modules that are quantized inside.
        online: Name of every module with run-time operations -> what they are, as JSON.
        norms: Name of every norm that quantizes for its readers -> what it is, as JSON.
        rewritten: The model's modules are not those of transformers (experts, which it stores fused; clipped ranges of
            activations, which it has none of). It would look for other tensors than there are, and go on without.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    inputs = None
    if activations is not None and activations.bits is not None:
        inputs = QuantizationArgs(
            num_bits=activations.bits, type="int", symmetric=activations.symmetric, strategy="token", dynamic=True
        )
    groups = {}
    for index, (grid, _) in enumerate(Counter(grids.values()).most_common()):
        targets = [ALL] if index == 0 else [name for name, own in grids.items() if own == grid]
        groups[f"group_{index}"] = QuantizationScheme(
            targets=targets, weights=_weights(grid), input_activations=inputs, format=FORMAT
        )
    config = QuantizationConfig(
        config_groups=groups, format=FORMAT, quantization_status="compressed", ignore=list(unquantized)
    ).model_dump(mode="json")
    entry: dict[str, Any] = {"version": VERSION}
    if activations is not None:
        entry |= {"activations": asdict(activations), "attention": list(attention)}
    if online:
        entry["online"] = dict(online)
    if norms:
        entry["norms"] = dict(norms)
    if online or rewritten:
        for part in (config, *config["config_groups"].values()):
            part["format"] = FORMAT_WITH_OPERATIONS
    return config | {ENTRY: entry}


def grids_of(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, IntGrid]:
    """The grid that an entry gives to each of these linears.

    Raises:
        ValueError: It is not an entry that plquant writes.
    """
    try:
        if config["quant_method"] != "compressed-tensors":
            raise ValueError(f"quant_method={config['quant_method']}")
        by_target: dict[str, IntGrid] = {}
        for group in config["config_groups"].values():
            if not {config["format"], group.get("format") or FORMAT} <= {FORMAT, FORMAT_WITH_OPERATIONS}:
                raise ValueError(f"format={config['format']}, {group.get('format')}")
            by_target |= dict.fromkeys(group["targets"], _grid(group["weights"]))
        return {name: by_target[name] if name in by_target else by_target[ALL] for name in names}
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            "the checkpoint is quantized, but not in the format that plquant reads (compressed-tensors pack-quantized, "
            f"linears named in full or all of them): {error!r}. Open it with transformers, or give the original model."
        ) from error


def activations_of(config: Mapping[str, Any]) -> ActivationGrid | None:
    """The grid of the activations, or ``None`` if they are not quantized.

    Raises:
        ValueError: They are, but not as plquant does it.
    """
    entry = config.get(ENTRY, {}).get("activations")
    if entry is not None:
        return ActivationGrid(**entry)
    groups = config["config_groups"].values()
    if config.get("kv_cache_scheme") or any(g.get("input_activations") or g.get("output_activations") for g in groups):
        raise ValueError(
            "the checkpoint quantizes activations in a way that plquant does not read; open it with transformers, or "
            "give the original model"
        )
    return None


def attention_of(config: Mapping[str, Any]) -> list[str]:
    """Names of the attention modules that are quantized inside."""
    return list(config.get(ENTRY, {}).get("attention", []))


def online_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Name of every module with run-time operations -> what they are."""
    return dict(config.get(ENTRY, {}).get("online", {}))


def norms_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Name of every norm that quantizes for its readers -> what it is."""
    return dict(config.get(ENTRY, {}).get("norms", {}))


def _weights(grid: IntGrid) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    if grid.group_size is None:
        strategy: dict[str, Any] = {"strategy": "channel"}
    elif grid.axis == "in":
        strategy = {"strategy": "group", "group_size": grid.group_size}
    else:
        strategy = {"strategy": "block", "block_structure": [grid.group_size, 1]}
    return QuantizationArgs(num_bits=grid.bits, type="int", symmetric=grid.symmetric, **strategy)


def _grid(weights: Mapping[str, Any]) -> IntGrid:
    block = weights.get("block_structure")
    size = {"channel": None, "group": weights.get("group_size"), "block": block and block[0]}[weights["strategy"]]
    return IntGrid(weights["num_bits"], size, weights["symmetric"], "in" if block is None else "out")
