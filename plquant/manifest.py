"""The certificate of a finished run: what it was made with, and checksums of all that its folder holds.

A file has its sha256; a tensor, besides, the CRC-32 of its bytes in memory when its block ran, so that one wrong bit is
found wherever it came about, and is named.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from plquant.files import json_text, sha256, write_json

MANIFEST = "manifest.json"


class Digest(Protocol):
    """What ``hashlib`` gives."""

    def update(self, data: Any, /) -> None:
        """Take bytes in."""


def tensor_checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> CRC-32 of the tensor's bytes, in hexadecimal."""
    return {name: f"{zlib.crc32(_bytes(tensor)):08x}" for name, tensor in tensors.items()}


def add_to_hash(into: Digest, name: str, tensor: Tensor) -> None:
    """Take a tensor and its name into a hash."""
    into.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
    into.update(_bytes(tensor))


def write_manifest(
    folder: Path, made: Mapping[str, Any], files: Mapping[str, str], tensors: Mapping[str, Mapping[str, str]]
) -> None:
    """Write the certificate.

    Args:
        folder: The run's folder.
        made: What it was made with.
        files: Name of every file -> its sha256.
        tensors: Name of every shard -> name of the tensor -> its checksum.
    """
    content = {"made": dict(made), "files": dict(files), "tensors": dict(tensors)}
    write_json(folder / MANIFEST, content | {"sha256": _own_sha256(content)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The certificate.

    Raises:
        ValueError: It is not what was written.
    """
    text = (folder / MANIFEST).read_bytes()
    try:
        content = json.loads(text)
        own = content.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{MANIFEST} is damaged: {error!r}") from error
    if own != _own_sha256(content) or text != json_text(content | {"sha256": own}).encode():
        raise ValueError(f"{MANIFEST} is damaged: it is not what the run wrote")
    return content


def damaged_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """A sentence for each file that is not what the run wrote, or not what it ran; of a shard it names the tensors."""
    found = []
    for name, expected in manifest["files"].items():
        if not (folder / name).is_file():
            found.append(f"{name} is missing")
            continue
        is_other, tensors = sha256(folder / name) != expected, manifest["tensors"].get(name)
        wrong = "" if tensors is None else _which(folder / name, tensors)
        if is_other or wrong:
            found.append(f"{name} is damaged" + ("" if tensors is None else f": {wrong or 'its header'}"))
    known = {*manifest["files"], MANIFEST}
    return found + [f"{p.name} is not the run's" for p in folder.glob("*.safetensors") if p.name not in known]


def machine() -> dict[str, Any]:
    """Where the run took place."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _which(shard: Path, expected: Mapping[str, str]) -> str:
    """The tensors that differ; empty if none does."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, "pt") as file:
            names: Collection[str] = set(file.keys())
            found = {name: tensor_checksums({name: file.get_tensor(name)})[name] for name in names}
    except (SafetensorError, OSError) as error:
        return f"its header or length ({error})"
    wrong = sorted(name for name in {*expected, *found} if found.get(name) != expected.get(name))
    return ", ".join(wrong)


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _own_sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_text(content).encode()).hexdigest()
