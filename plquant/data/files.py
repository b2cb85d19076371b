"""Text from local files: plain text, JSON lines and parquet."""

import glob
import json
import os
from typing import Any

from plquant.data.base import Split, TextData


class FileText(TextData):
    """Text from local files: .jsonl, .parquet, and anything else as UTF-8 plain text.

    Files, documents and rows are joined by a blank line.

    Args:
        files: Path or glob of the calibration text, or a list of them. The matches of a glob are taken in sorted order.
        validation_files: The same for the validation text; null measures perplexity on ``files``.
        column: Key of the text in .jsonl objects and name of the text column in .parquet; plain text has none.
        lines_as_rows: Treat each line of a plain text file as one row, the way the Hugging Face Hub stores WikiText: a
            line of only whitespace becomes an empty row, other lines keep their newline, and rows are joined by a blank
            line. Needed for perplexities of raw WikiText files to be comparable with published ones.
    """

    def __init__(
        self,
        files: str | list[str],
        validation_files: str | list[str] | None = None,
        column: str = "text",
        lines_as_rows: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.column, self.lines_as_rows = column, lines_as_rows
        calibration = matching_files(files, "files")
        validation = calibration if validation_files is None else matching_files(validation_files, "validation_files")
        self.paths: dict[str, list[str]] = {"calibration": calibration, "validation": validation}
        self._refuse_rows_of_tables([*calibration, *validation])
        self.save_hyperparameters()

    def text(self, split: Split) -> str:
        """Every row of every file, joined by blank lines."""
        return "\n\n".join(row for path in self.paths[split] for row in self._rows(path))

    def text_name(self, split: Split) -> str:
        """The file names, and whether their lines are rows."""
        names = ", ".join(os.path.basename(path) for path in self.paths[split])
        return f"{names} (lines as rows)" if self.lines_as_rows else names

    def _rows(self, path: str) -> list[str]:
        if path.endswith(".jsonl"):
            return jsonl_rows(path, self.column)
        if path.endswith(".parquet"):
            return parquet_rows(path, self.column)
        return hub_rows(read_utf8(path)) if self.lines_as_rows else [read_utf8(path)]

    def _refuse_rows_of_tables(self, paths: list[str]) -> None:
        tables = sorted({path for path in paths if path.endswith((".jsonl", ".parquet"))})
        if self.lines_as_rows and tables:
            raise ValueError(
                f"--data.lines_as_rows=true is for plain text, but {', '.join(tables)} already has rows; "
                "leave --data.lines_as_rows out."
            )


def matching_files(patterns: str | list[str], flag: str) -> list[str]:
    """Paths of all patterns, in the order given, the matches of each glob sorted."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = [_matches(pattern) for pattern in patterns]
    missing = [pattern for pattern, paths in zip(patterns, found, strict=True) if not paths]
    if missing or not patterns:
        raise ValueError(
            f"--data.{flag}={', '.join(missing) or '[]'} matches no file, at least one is needed; "
            f"check the path (relative to {os.getcwd()})."
        )
    return [path for paths in found for path in paths]


def _matches(pattern: str) -> list[str]:
    pattern = os.path.expanduser(pattern)
    if os.path.isfile(pattern):  # before globbing: "[" and "*" may be part of a name
        return [pattern]
    return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))


def read_utf8(path: str) -> str:
    """The file's text as it is, line ends included, without a byte order mark."""
    with open(path, "rb") as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}. UTF-8 is needed; convert it, "
            "for example with iconv, or take it out of --data.files."
        ) from error


def hub_rows(text: str) -> list[str]:
    """Lines as the hub's WikiText has them: blank ones become "", the others keep their newline."""
    lines = text.split("\n")
    last = lines.pop()  # "" when the text ends with a newline: no row
    rows = [f"{line}\n" if line.strip() else "" for line in lines]
    return [*rows, last] if last else rows


def jsonl_rows(path: str, column: str) -> list[str]:
    """The ``column`` of each line's object; empty lines are skipped."""
    lines = enumerate(read_utf8(path).split("\n"), start=1)
    return [_json_text(line, column, f"{path} line {number}") for number, line in lines if line.strip()]


def _json_text(line: str, column: str, place: str) -> str:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON ({error}); each line must be one JSON object.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} is a {type(row).__name__}; each line must be one JSON object with the text in it.")
    _require_column(column, list(row), place)
    return _require_text(row[column], column, place)


def parquet_rows(path: str, column: str) -> list[str]:
    """The ``column`` of every row of a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        _require_column(column, pq.read_schema(path).names, path)
        values = pq.read_table(path, columns=[column])[column].to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet file ({error}); give plain text another suffix.") from error
    return [_require_text(value, column, f"{path} row {number}") for number, value in enumerate(values)]


def _require_column(column: str, columns: list[str], place: str) -> None:
    if column not in columns:
        raise ValueError(
            f"--data.column={column} is not in {place}, which has {', '.join(columns) or 'no columns'}; "
            "name the one with the text."
        )


def _require_text(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"--data.column={column} holds {type(value).__name__} in {place}, but text is needed; "
            "name the column with the text, or fix that row."
        )
    return value
