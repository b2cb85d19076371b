"""Files that are either whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL, TOGETHER = ".partial", "plquant-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; it gets the real name at the end, or is removed on an error.

    Raises:
        OSError: It could not be written, a full disk above all.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with _as_os_error(path):
            yield partial
            _rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_together(folder: Path, write: Callable[[Path], object]) -> list[str]:
    """Files that others write, under names of theirs; none is there unless all could be written.

    Args:
        folder: Where they go.
        write: Writes them to the folder that it is given.

    Returns:
        Their names in ``folder``.

    Raises:
        OSError: They could not be written.
    """
    with _as_os_error(folder), tempfile.TemporaryDirectory(PARTIAL, TOGETHER, folder) as temporary:
        write(Path(temporary))
        names = [path.relative_to(temporary) for path in sorted(Path(temporary).rglob("*")) if path.is_file()]
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _rename(temporary / name, folder / name)
    return [name.as_posix() for name in names]


def is_left_over(name: str) -> bool:
    """Whether this is what ``write_together`` left where its process was killed."""
    return name.startswith(TOGETHER) and name.endswith(PARTIAL)


def clear_partial(folder: Path) -> None:
    """Remove what a process that was killed left half written."""
    for leftover in folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _rename(partial: Path, path: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o666 & ~umask)  # safetensors makes its files private
    os.replace(partial, path)


@contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """What the system says, also through libraries that have errors of their own, with what the user may do."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _os_error(str(error))
        if number is None:
            raise
        raise OSError(
            f"{path} could not be written: {os.strerror(number)}. What was finished before is kept: see to it, and run "
            "the same command again"
        ) from error


def _os_error(said: str) -> int | None:
    found = re.search(r"\(os error (\d+)\)", said)  # as Rust puts it
    return None if found is None else int(found[1])


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people: indented, ending in a newline."""
    with replacing(path) as partial:
        partial.write_text(json_text(content))


def json_text(content: Any) -> str:
    """What ``write_json`` writes."""
    return json.dumps(content, indent=2) + "\n"


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
