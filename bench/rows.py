"""Rows of results: the commit they belong to, and the CSV files in which they are kept."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def commit() -> str:
    """Short hash of the commit that is checked out; empty outside of a repository."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows, all of the same columns, to a file of such rows, or begin one.

    Raises:
        ValueError: The file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        file.seek(0)
        columns = next(csv.reader(file), None)
        if columns not in (None, [*rows[0]]):
            raise ValueError(f"{path} has the columns {columns}, these rows {[*rows[0]]}; give another file")
        writer = csv.DictWriter(file, [*rows[0]])
        if columns is None:
            writer.writeheader()
        writer.writerows(rows)
