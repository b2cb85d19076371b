"""The streams of activations between blocks: in memory, or in files of which only what is in use is in memory."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

_MAPPING = "_mapping"  # attribute of a tensor in a file


def empty_on_disk(folder: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor whose memory is a file without a name: it is gone with the tensor, and with the process.

    Raises:
        OSError: No room for it.
    """
    size = math.prod(shape) * dtype.itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # what is not there later ends the process, with no error
        except OSError as error:
            raise OSError(
                f"--trainer.activations=disk needs {size / 2**30:.2f} GiB more in {folder}: {error.strerror}"
            ) from error
        mapping = mmap.mmap(file.fileno(), size)
    tensor = torch.frombuffer(mapping, dtype=dtype).view(*shape)
    setattr(tensor, _MAPPING, (mapping, folder))
    return tensor


def copy_of(x: Tensor) -> Tensor:
    """A copy, in a file if that is where ``x`` is."""
    mapped = getattr(x, _MAPPING, None)
    if mapped is None:
        return x.clone()
    copy = empty_on_disk(mapped[1], x.shape, x.dtype)
    for into, piece in zip(pieces(copy, 1), pieces(x, 1), strict=True):
        into.copy_(piece)
    return copy


def pieces(x: Tensor, size: int) -> Iterator[Tensor]:
    """``x`` [N, ...] in pieces of so many; of a file each leaves memory as the next is asked for."""
    for piece in x.split(size):
        yield piece
        release(x)


def release(x: Tensor) -> None:
    """What is in a file may leave memory; it comes back when it is used."""
    mapped = getattr(x, _MAPPING, None)
    if mapped is not None:
        mapped[0].madvise(mmap.MADV_DONTNEED)
