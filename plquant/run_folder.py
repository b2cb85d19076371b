"""The output folder of a run: what may be in it at the start, and what is finished in it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from plquant.files import PARTIAL, clear_partial, is_left_over, json_text, replacing, sha256, write_json, write_together
from plquant.formats.checkpoint import INDEX, REST, block_shard, index_of, save_tensors
from plquant.manifest import tensor_checksums, write_manifest

RECIPE = "recipe.json"
RUNNING = "model-block-running.ckpt"  # of the block being fitted
DATA_SHA256, WEIGHTS_SHA256 = "tokens_sha256", "weights_sha256"


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
        self._rest: dict[str, Any] = {}  # checksums of what is outside the blocks
        self._others: list[str] = []  # names of files that are no shards

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
        names = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
        there = [name for name in names if not is_left_over(name)]
        if there and RECIPE not in there:
            raise ValueError(f"{flag} holds other files ({', '.join(there[:5])}); give a new or empty folder")
        foreign = [name for name in there if name.endswith(".safetensors") and not _of_a_block(name) and name != REST]
        if foreign:
            raise ValueError(f"{flag} holds {', '.join(foreign)}, that no run wrote; take it out, or give a new folder")
        if any(_of_a_block(name) for name in there):
            self._require_same_recipe(flag)
        if INDEX in there:
            raise ValueError(
                f"{flag} holds the finished run of this very recipe; give a new folder, or remove this one"
            )
        done = 0
        while block_shard(done) in there and not (damage := self._damaged(done)):
            done += 1
        if block_shard(done) in there:
            print(f"note: {flag}: {damage}; block {done + 1} and those after it are calibrated again")
        there_already = sum((self.path / block_shard(index)).stat().st_size for index in range(done))
        self._require_room(flag, needed_bytes - there_already)
        return done

    def note_inputs(self, tokens_sha256: str, weights_sha256: str) -> None:
        """The sha256 of the calibration tokens and of the original's weights, from here on part of the recipe."""
        self.recipe.setdefault("data", {})[DATA_SHA256] = tokens_sha256
        self.recipe.setdefault("model", {})[WEIGHTS_SHA256] = weights_sha256

    def create(self, config: str | None = None) -> None:
        """Make the folder, note the recipe and the YAML that repeats the run, clear what was left half written.

        Args:
            config: The YAML.

        Raises:
            ValueError: The blocks finished there were calibrated on other tokens, or are of other weights.
        """
        if any(_of_a_block(path.name) for path in self.path.glob("*")):
            self._require_same_recipe(f"--output_dir={self.path}")
        self.path.mkdir(parents=True, exist_ok=True)
        clear_partial(self.path)
        self.write(lambda new: write_json(new / RECIPE, self.recipe))
        if config is not None:
            self.write(lambda new: (new / "config.yaml").write_text(config))

    def write(self, write: Callable[[Path], object]) -> None:
        """Keep what is none of the shards, and note the names for the certificate.

        Args:
            write: Writes files to the folder that it is given.
        """
        self._others += write_together(self.path, write)

    @property
    def recipe_sha256(self) -> str:
        """Of the recipe, the calibration tokens among it."""
        return hashlib.sha256(json_text(self.recipe).encode()).hexdigest()

    def write_block(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Keep a finished block: its tensors by full name, and its numbers."""
        path = self.path / block_shard(index)
        with replacing(path) as partial:  # the shard gets its name last, which says that the block is finished
            save_tensors(partial, tensors)
            write_json(_record(path), {**record, "sha256": sha256(partial), "tensors": tensor_checksums(tensors)})
        for running in (RUNNING, running_of(index)):
            (self.path / running).unlink(missing_ok=True)

    def has_block(self, index: int) -> bool:
        """Whether a block is finished, and is what was written."""
        return (self.path / block_shard(index)).exists() and not self._damaged(index)

    def write_rest(self, tensors: Mapping[str, Tensor]) -> int:
        """Keep all tensors outside the blocks; returns the bytes of all files of tensors."""
        with replacing(self.path / REST) as partial:
            save_tensors(partial, tensors)
            self._rest = {"sha256": sha256(partial), "tensors": tensor_checksums(tensors)}
        return sum(path.stat().st_size for path in self.path.glob("*.safetensors"))

    def read_block(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What ``write_block`` kept."""
        from safetensors.torch import load_file

        path = self.path / block_shard(index)
        return load_file(path), json.loads(_record(path).read_text())

    def read_layer(self, index: int, prefix: str) -> dict[str, Tensor]:
        """Those tensors of a finished block whose names begin so, by the rest of their names."""
        from safetensors import safe_open

        with safe_open(self.path / block_shard(index), "pt") as file:
            return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}

    def finish(self, num_blocks: int, made: Mapping[str, Any]) -> None:
        """Write the certificate and the index, which makes the folder a model: the last thing, all else is in place.

        Args:
            num_blocks: Number of shards of blocks.
            made: What the run was made with, for the certificate.
        """
        records = {block_shard(index): _record(self.path / block_shard(index)) for index in range(num_blocks)}
        shards = {shard: json.loads(path.read_text()) for shard, path in records.items()} | {REST: self._rest}
        index = index_of(self.path, list(shards))
        files = {shard: found["sha256"] for shard, found in shards.items()}
        files |= {name: sha256(self.path / name) for name in self._others}
        files[INDEX] = hashlib.sha256(json_text(index).encode()).hexdigest()
        write_manifest(self.path, made, files, {shard: found["tensors"] for shard, found in shards.items()})
        write_json(self.path / INDEX, index)
        for record in records.values():
            record.unlink(missing_ok=True)

    def _damaged(self, index: int) -> str:
        """What is wrong with a block's files, or nothing."""
        path = self.path / block_shard(index)
        try:
            written = json.loads(_record(path).read_text())["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return f"{_record(path).name} is missing or damaged"
        return "" if written == sha256(path) else f"{path.name} is not what was written, its sha256 differs"

    def _require_same_recipe(self, flag: str) -> None:
        try:
            theirs = _flat(json.loads((self.path / RECIPE).read_text()))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{flag}: {RECIPE} is damaged, what the blocks there are of is lost; remove it") from error
        ours = _flat(self.recipe)
        unknown_yet = {f"data.{DATA_SHA256}", f"model.{WEIGHTS_SHA256}"} - ours.keys()
        differing = [key for key in sorted({*theirs, *ours} - unknown_yet) if theirs.get(key) != ours.get(key)]
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


def _of_a_block(name: str) -> bool:
    """A file is a finished block's, or a checkpoint of one."""
    return name.startswith("model-block-") and not name.endswith(PARTIAL)


def running_of(index: int) -> str:
    """In the place of ``RUNNING``, where several blocks are fitted at a time."""
    return f"model-block-{index:03}-running.ckpt"


def _record(shard: Path) -> Path:
    """Beside a block's shard until the run is finished: its numbers and checksums."""
    return shard.with_name(f"{shard.name}.json")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
