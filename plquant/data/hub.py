"""The usual data sets of the quantization papers, from the Hugging Face Hub."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from plquant.data.base import Split, TextData

CHARACTERS_PER_TOKEN = 16  # about four times English's: enough text for windows at random places
VALIDATION_ROWS = 1100  # GPTQ's number of C4 documents (its get_c4_new)
CONNECT_SECONDS = 10


@dataclass(frozen=True)
class HubSource:
    """Where a data set is and how its rows become one text.

    Args:
        repo: Repository on the hub.
        options: Further arguments of ``datasets.load_dataset``, apart from those that differ by split.
        calibration: ``load_dataset`` arguments of the calibration split.
        validation: The same for the validation split.
        column: Column of the text.
        separator: Put between rows, as in GPTQ's released code.
        row_limit: The validation text is the first ``VALIDATION_ROWS`` rows; calibration takes only as many as needed.
        one_split: Both texts are in one split, calibration after the rows of validation.
    """

    repo: str
    calibration: dict[str, Any]
    validation: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    column: str = "text"
    separator: str = "\n\n"
    row_limit: bool = False
    one_split: bool = False


def _file(path: str) -> dict[str, Any]:
    return {"data_files": {"rows": path}, "split": "rows"}


SOURCES = {
    "wikitext2": HubSource(
        "Salesforce/wikitext", {"split": "train"}, {"split": "test"}, options={"name": "wikitext-2-raw-v1"}
    ),
    "c4": HubSource(
        "allenai/c4",
        _file("en/c4-train.00000-of-01024.json.gz"),
        _file("en/c4-validation.00000-of-00008.json.gz"),
        options={"streaming": True},  # one file has 356,000 documents, some thousand are needed
        separator=" ",
        row_limit=True,
    ),
    "ptb": HubSource(
        "ptb-text-only/ptb_text_only",
        _file("penn_treebank/train/0000.parquet"),
        _file("penn_treebank/test/0000.parquet"),
        options={"revision": "refs/convert/parquet"},  # main has only a loading script, which datasets 4 dropped
        column="sentence",
        separator=" ",
    ),
    "pile": HubSource("NeelNanda/pile-10k", {"split": "train"}, {"split": "train"}, row_limit=True, one_split=True),
}


class HubText(TextData):
    """A data set of the quantization papers, downloaded from the Hugging Face Hub (then cached in ~/.cache).

    wikitext2 is all of its train and test rows, ptb likewise. c4 and pile take the first 1100 documents of validation
    and as many calibration documents as the windows need; pile has 10,000 documents in one split, and calibration
    starts after those of validation.

    Args:
        name: The data set. wikitext2 is what most papers report, c4 what most of them calibrate on.
    """

    def __init__(self, name: Literal["wikitext2", "c4", "ptb", "pile"] = "wikitext2", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if name not in SOURCES:
            raise ValueError(f"--data.name={name} is not a known data set; use one of {', '.join(SOURCES)}.")
        self._source = SOURCES[name]
        self.save_hyperparameters()

    def text(self, split: Split) -> str:
        """The rows of a split in the data set's order, joined as GPTQ joins them."""
        return self._source.separator.join(self._rows(self._source, split))

    def text_name(self, split: Split) -> str:
        """The repository and the part taken."""
        source = self._source
        arguments = source.calibration if split == "calibration" else source.validation
        part = arguments["data_files"]["rows"] if "data_files" in arguments else arguments["split"]
        first = f" (first {VALIDATION_ROWS} rows)" if source.row_limit and split == "validation" else ""
        return f"{source.repo} {part}{first}"

    def _rows(self, source: HubSource, split: Split) -> list[str]:
        rows = hub_column(source, split)
        if not source.row_limit:
            return list(rows)
        if split == "validation":
            return list(islice(rows, VALIDATION_ROWS))
        skipped = VALIDATION_ROWS if source.one_split else 0
        characters = self.num_samples * self.seq_len * CHARACTERS_PER_TOKEN
        return list(until_characters(islice(rows, skipped, None), characters))


def until_characters(rows: Iterable[str], characters: int) -> Iterator[str]:
    """Rows until they hold so many characters together."""
    for row in rows:
        yield row
        characters -= len(row)
        if characters <= 0:
            return


def hub_column(source: HubSource, split: Split) -> Iterator[str]:
    """The text column row by row.

    Raises:
        ConnectionError: The hub does not answer or breaks off; or, offline, the local cache lacks the data set (which
            datasets reports as ValueError when it has another part of it).
    """
    import datasets
    from huggingface_hub.errors import HTTPError  # httpx's, of whichever version huggingface_hub talks with

    arguments = source.calibration if split == "calibration" else source.validation
    try:
        if not datasets.config.HF_HUB_OFFLINE:  # offline: straight to the local cache
            _knock(source.repo)
        for row in datasets.load_dataset(source.repo, **source.options, **arguments):
            yield row[source.column]
    except (OSError, ValueError, HTTPError, datasets.exceptions.DatasetsError) as error:
        raise ConnectionError(_unreachable(source.repo, error)) from error


def _knock(repo: str) -> None:
    """One request without retries: load_dataset would try an absent hub for 23 seconds and log each attempt."""
    from huggingface_hub import HfApi

    HfApi().dataset_info(repo, timeout=CONNECT_SECONDS)


def _unreachable(repo: str, error: Exception) -> str:
    reason = (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")
    return (
        f"The data set {repo} could not be had from the Hugging Face Hub ({type(error).__name__}: {reason}); connect "
        "to it, or set HF_HUB_OFFLINE=1 to use a copy that an earlier run cached, or use text that needs no network: "
        "--data BuiltinText, --data FileText --data.files=PATH, or --data SelfGenerated."
    )
