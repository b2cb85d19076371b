"""What the weight files of a checkpoint folder must be before they are read: safetensors, whole, in the folder."""

from __future__ import annotations

import json
from pathlib import Path

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_weight_files(folder: Path) -> list[Path]:
    """The folder's shards, each of which has a sound header; reads no tensor.

    Raises:
        ValueError: There are none, only pickles, or one is damaged, missing, or said to lie elsewhere.
    """
    flag = f"--model.checkpoint={folder}"
    if (folder / INDEX).is_file():
        shards = _indexed(folder / INDEX, flag)
    elif (folder / SINGLE).is_file():
        shards = [folder / SINGLE]
    else:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        told = f", only {', '.join(pickles[:3])}, which can run code when read and are not" if pickles else ""
        raise ValueError(
            f"{flag} has no {SINGLE} and no {INDEX}{told}; save the model again with transformers' save_pretrained"
        )
    for path in shards:
        _check_header(path, flag)
    return shards


def _indexed(index: Path, flag: str) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
        elsewhere = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{flag}: {index.name} is no index of safetensors files: {error!r}") from error
    if elsewhere:
        raise ValueError(f"{flag}: {index.name} names {elsewhere[0]!r}; the shards must lie in the folder itself")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise ValueError(f"{flag}: {index.name} names {', '.join(missing[:3]) or 'no files'}, not found in the folder")
    return [index.parent / name for name in names]


def _check_header(path: Path, flag: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{flag}: {path.name} is damaged or no safetensors file: {error}") from error
