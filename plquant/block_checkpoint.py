"""The block being fitted, kept every so many steps, so that a run that was interrupted goes on inside it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from plquant.files import replacing


class SealedCheckpoints(TorchCheckpointIO):
    """Writes one checkpoint, whole or not at all, under a first line that says what it is of, with its sha256.

    Args:
        path: The file.
        seal: What it must be of: the run and the block.
    """

    def __init__(self, path: Path, seal: dict[str, Any]) -> None:
        super().__init__()
        self.path, self.seal = path, seal

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write it."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        content = buffer.getbuffer()
        head = json.dumps(self.seal | {"sha256": hashlib.sha256(content).hexdigest()})
        with replacing(Path(path)) as partial, open(partial, "wb") as file:
            file.write(head.encode() + b"\n")
            file.write(content)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read it, with the unpickler that makes nothing but tensors, numbers, strings, lists and dictionaries."""
        content, wrong = self._read()
        assert not wrong, wrong
        return torch.load(io.BytesIO(content), map_location=map_location, weights_only=True)

    def wrong(self) -> str:
        """Why the file is not to be loaded; empty if it is."""
        return self._read()[1]

    def found(self) -> str | None:
        """``wrong``, or ``None`` if there is no file."""
        return self.wrong() if self.path.exists() else None

    def _read(self) -> tuple[bytes, str]:
        head, _, content = self.path.read_bytes().partition(b"\n")
        try:
            found = json.loads(head)
            expected = found.pop("sha256")
        except (ValueError, KeyError, AttributeError, TypeError):
            return b"", "it does not begin as a checkpoint of plquant does"
        if expected != hashlib.sha256(content).hexdigest():
            return b"", "its sha256 differs from the one it was written with"
        differing = [key for key in self.seal if found.get(key) != self.seal[key]]
        return content, f"it is of another {' and '.join(differing)}" if differing else ""


class KeepSteps(L.Callback):
    """Takes a checkpoint every so many steps, but none at the end of an epoch: the next one's first step is as good.

    Args:
        path: The file.
        every: Steps.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self._kept = self._before = 0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """See where the step begins."""
        self._before = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Take one if it is time, and no gradients are being accumulated."""
        stepped = trainer.global_step > self._before
        if stepped and not trainer.is_last_batch and trainer.global_step // self.every > self._kept:
            self._kept = trainer.global_step // self.every
            trainer.save_checkpoint(self.path, weights_only=False)


def keeping_steps(arguments: Mapping[str, Any], sealed: SealedCheckpoints, every: int) -> dict[str, Any]:
    """Arguments of a Trainer with which it keeps its steps.

    Args:
        arguments: Those it has.
        sealed: Where to.
        every: Steps.
    """
    plugins = arguments.get("plugins") or []
    plugins = plugins if isinstance(plugins, list | tuple) else [plugins]
    return {"plugins": [*plugins, sealed], "callbacks": [*arguments["callbacks"], KeepSteps(sealed.path, every)]}
