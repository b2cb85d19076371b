"""The output folder of a run: what may be in it at the start, and what is finished in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from plquant.files import PARTIAL, replacing, write_json
from plquant.formats.checkpoint import INDEX, REST, block_shard, write_index, write_shard

RECIPE = "recipe.json"


class RunFolder:
    """Where a run puts its output.

    Args:
        path: The folder.
        recipe: Everything that decides the result; what a second run must have in common to go on with a first.
    """

    def __init__(self, path: str | Path, recipe: Mapping[str, Any]) -> None:
        self.path = Path(path)
        # Objects (callbacks, plugins) by their class: an address would differ from run to run.
        self.recipe = json.loads(json.dumps(recipe, default=lambda value: type(value).__qualname__))

    def check(self, needed_bytes: int) -> int:
        """Whether the run may start here, or go on with an interrupted run of the same recipe; changes nothing.

        Args:
            needed_bytes: Size of the quantized model.

        Returns:
            Number of blocks that are finished already.

        Raises:
            ValueError: The folder holds something else, a finished run, or a run of another recipe.
            OSError: No room for the output.
        """
        flag = f"--output_dir={self.path}"
        if self.path.is_file():
            raise ValueError(f"{flag} is a file; give a new folder")
        there = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
        if there and RECIPE not in there:
            raise ValueError(f"{flag} holds other files ({', '.join(there[:5])}); give a new or empty folder")
        done = 0
        while block_shard(done) in there:
            done += 1
        if done:
            self._require_same_recipe(flag)
        if INDEX in there:
            raise ValueError(
                f"{flag} holds the finished run of this very recipe; give a new folder, or remove this one"
            )
        there_already = sum((self.path / block_shard(index)).stat().st_size for index in range(done))
        self._require_room(flag, needed_bytes - there_already)
        return done

    def create(self, config: str | None = None) -> None:
        """Make the folder, note the recipe and the YAML that repeats the run, clear what was left half written."""
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob(f"*{PARTIAL}"):
            leftover.unlink()
        write_json(self.path / RECIPE, self.recipe)
        if config is not None:
            with replacing(self.path / "config.yaml") as partial:
                partial.write_text(config)

    def write_block(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Keep a finished block: its tensors by full name, and its numbers."""
        write_json(self.path / f"{block_shard(index)}.json", record)
        write_shard(self.path / block_shard(index), tensors)  # last: its presence says that the block is finished

    def write_rest(self, tensors: Mapping[str, Tensor]) -> int:
        """Keep all tensors outside the blocks; returns the bytes of all files of tensors."""
        write_shard(self.path / REST, tensors)
        return sum(path.stat().st_size for path in self.path.glob("*.safetensors"))

    def read_block(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What ``write_block`` kept."""
        from safetensors.torch import load_file

        record = json.loads((self.path / f"{block_shard(index)}.json").read_text())
        return load_file(self.path / block_shard(index)), record

    def finish(self, num_blocks: int) -> None:
        """Write the index, which makes the folder a model: the last thing of a run, all else is in place."""
        write_index(self.path, [block_shard(index) for index in range(num_blocks)] + [REST])
        for index in range(num_blocks):
            (self.path / f"{block_shard(index)}.json").unlink(missing_ok=True)

    def _require_same_recipe(self, flag: str) -> None:
        theirs, ours = _flat(json.loads((self.path / RECIPE).read_text())), _flat(self.recipe)
        differing = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
        if differing:
            rows = "\n".join(f"  {key}: {theirs.get(key)} there, {ours.get(key)} asked for" for key in differing)
            raise ValueError(
                f"{flag} holds another run; give a new folder, or the same recipe to go on. Different:\n{rows}"
            )

    def _require_room(self, flag: str, needed: int) -> None:
        parent = next(p for p in (self.path, *self.path.absolute().parents) if p.is_dir())
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise OSError(f"{flag} needs {needed / 2**30:.2f} GiB, but {parent} has {free / 2**30:.2f} GiB free")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
