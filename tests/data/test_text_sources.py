"""Text from files, token ids and the hub: what is read, and what users are told when it cannot be."""

import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from plquant.data import FileText, HubText, TokenIds
from tests.data.given import MODEL, fails, tiny_llama, write

# files


def parquet(path: Path, **columns: Any) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return str(path)


def test_rows_and_files_are_joined_by_blank_lines(tmp_path: Path) -> None:
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in ("é\u2028d", "e")]
    files = [
        write(tmp_path / "a.raw", "\ufeffa\r\nb"),
        write(tmp_path / "b.txt", "c"),
        write(tmp_path / "c.jsonl", "\n".join(rows) + "\n\n"),
        parquet(tmp_path / "d.parquet", text=["f", "g"], other=[1, 2]),
    ]
    assert FileText(files).text("calibration") == "a\r\nb\n\nc\n\né\u2028d\n\ne\n\nf\n\ng"


def test_column_names_the_text(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", '{"body": "x", "text": "y"}'), parquet(tmp_path / "b.parquet", body=["z"])]
    assert FileText(files, column="body").text("calibration") == "x\n\nz"


def test_glob_is_sorted_and_a_literal_name_wins(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.txt", "[ab].txt"):
        write(tmp_path / name, name)
    (tmp_path / "d.txt").mkdir()
    assert FileText(str(tmp_path / "?.txt")).text("validation") == "a.txt\n\nb.txt\n\nc.txt"
    assert FileText(str(tmp_path / "[ab].txt")).text("calibration") == "[ab].txt"


def test_validation_files_are_the_files_unless_given(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.txt", "one"), write(tmp_path / "2.txt", "two")
    assert FileText(one).text("validation") == "one"
    both = FileText(one, validation_files=[two])
    assert (both.text("calibration"), both.text("validation")) == ("one", "two")
    assert (both.text_name("calibration"), both.text_name("validation")) == ("1.txt", "2.txt")


def test_lines_as_rows_follows_the_hub(tmp_path: Path) -> None:
    raw = write(tmp_path / "wiki.raw", " \n = Title = \n \n A line . \x0b \n\nLast")
    data = FileText(raw, lines_as_rows=True)
    assert data.text("validation") == "\n\n".join(["", " = Title = \n", "", " A line . \x0b \n", "", "Last"])
    assert data.text_name("validation") == "wiki.raw (lines as rows)"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"text": "a"}\nnot json', ["a.jsonl line 2", "not valid JSON"]),
        ("[1]", ["a.jsonl line 1", "a list", "JSON object"]),
        ('{"body": "a", "title": "b"}', ["--data.column=text", "a.jsonl line 1", "body, title"]),
        ('{"text": null}', ["--data.column=text", "NoneType", "a.jsonl line 1"]),
        (b"ab\xff", ["a.jsonl", "not UTF-8", "byte 2 is 0xff", "--data.files"]),
    ],
)
def test_bad_json_lines_are_named(tmp_path: Path, content: str | bytes, parts: list[str]) -> None:
    with fails(*parts):
        FileText(write(tmp_path / "a.jsonl", content)).text("calibration")


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    with fails("--data.column=text", "a.parquet", "body, title"):
        FileText(parquet(tmp_path / "a.parquet", body=["x"], title=["y"])).text("calibration")
    with fails("--data.column=text holds NoneType", "b.parquet row 1"):
        FileText(parquet(tmp_path / "b.parquet", text=["x", None])).text("calibration")
    with fails("c.parquet is not a parquet file"):
        FileText(write(tmp_path / "c.parquet", "plain")).text("calibration")


def test_file_arguments_are_checked_at_once(tmp_path: Path) -> None:
    there = write(tmp_path / "a.txt", "a")
    with fails("--data.files=", "none*.txt, ", "gone.txt", "matches no file"):
        FileText([str(tmp_path / "none*.txt"), there, str(tmp_path / "gone.txt")])
    with fails("--data.files=[]"):
        FileText([])
    with fails("--data.validation_files=", "gone.txt"):
        FileText(there, validation_files=str(tmp_path / "gone.txt"))
    with fails("--data.lines_as_rows=true", "b.jsonl"):
        FileText([there, write(tmp_path / "b.jsonl", "{}")], lines_as_rows=True)


def test_empty_text_names_the_files(tmp_path: Path) -> None:
    data = FileText([write(tmp_path / "a.txt", ""), write(tmp_path / "b.txt", " \n")])
    with fails("calibration text is empty", "a.txt, b.txt"):
        data.calibration_ids(MODEL)
    with fails("validation text is empty", "a.txt, b.txt"):
        data.evaluation_text(MODEL)


# token ids


def test_ids_are_used_as_they_are(ids_file: str) -> None:
    data = TokenIds(ids_file)
    assert (data.num_samples, data.seq_len, data.eval_seq_len) == (4, 3, 5)
    ids = data.calibration_ids(MODEL)
    assert torch.equal(ids, torch.arange(12).view(4, 3)) and ids.dtype == torch.int64
    assert torch.equal(TokenIds(ids_file, num_samples=2, seq_len=3).calibration_ids(MODEL), torch.arange(6).view(2, 3))
    evaluation = TokenIds(ids_file, eval_windows=1).evaluation_text(MODEL)
    assert evaluation.windows.tolist() == [list(range(100, 105))]
    assert evaluation.protocol["text"] == "ids.safetensors[evaluation_ids]"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"num_samples": 5}, ["--data.num_samples=5", "has 4", "--data.num_samples=4"]),
        ({"seq_len": 2}, ["--data.seq_len=2", "calibration_ids", "3 tokens", "--data.seq_len=3"]),
        ({"eval_seq_len": 4}, ["--data.eval_seq_len=4", "evaluation_ids", "5 tokens"]),
        ({"calibration_key": "ids"}, ["--data.calibration_key=ids", "calibration_ids", "evaluation_ids"]),
        ({"validation_key": "ids"}, ["--data.validation_key=ids", "calibration_ids", "evaluation_ids"]),
        ({"validation_key": "floats"}, ["--data.validation_key=floats", "F32 [2, 2]", "integer"]),
        ({"calibration_key": "flat"}, ["--data.calibration_key=flat", "I64 [3]"]),
        ({"calibration_key": "empty"}, ["--data.calibration_key=empty", "I64 [0, 3]"]),
    ],
)
def test_ids_that_do_not_fit_the_arguments_are_refused_at_once(ids_file: str, options: Any, parts: list[str]) -> None:
    with fails(*parts):
        TokenIds(ids_file, **options)


def test_ids_outside_the_vocabulary_are_refused(ids_file: str) -> None:
    with fails("foreign", "--data.file=", "5 to 300", "0 to 257"):
        TokenIds(ids_file, calibration_key="foreign").calibration_ids(MODEL)
    with fails("negative", "-100 to 5"):
        TokenIds(ids_file, validation_key="negative").evaluation_text(MODEL)
    wider = SimpleNamespace(tokenizer=MODEL.tokenizer, config=tiny_llama(vocab_size=301).config)  # padded with rows
    assert TokenIds(ids_file, calibration_key="foreign").calibration_ids(wider).max() == 300


def test_ids_file_must_be_safetensors(tmp_path: Path) -> None:
    with fails("--data.file=", "gone.safetensors does not exist"):
        TokenIds(str(tmp_path / "gone.safetensors"))
    with fails("--data.file=", "plain.safetensors is not a safetensors file"):
        TokenIds(write(tmp_path / "plain.safetensors", "plain text, long enough for a header"))


# the hub, imitated


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of ``load_dataset``, which gives endless rows."""
    import datasets

    calls: list[Any] = []

    def load_dataset(repo: str, **options: Any) -> Any:
        calls.append((repo, options))
        column = "sentence" if "ptb" in repo else "text"
        endless = itertools.count() if "wikitext" not in repo and "ptb" not in repo else range(3)
        return ({column: f"row {number}"} for number in endless)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("plquant.data.hub._knock", lambda repo: None)
    return calls


def test_small_hub_sets_are_taken_whole(loads: list[Any]) -> None:
    assert HubText().text("validation") == "row 0\n\nrow 1\n\nrow 2"
    assert HubText("ptb").text("calibration") == "row 0 row 1 row 2"
    assert loads[0] == ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "test"})
    assert loads[1][1]["data_files"] == {"rows": "penn_treebank/train/0000.parquet"}


def test_large_hub_sets_are_taken_as_far_as_needed(loads: list[Any]) -> None:
    c4 = HubText("c4", num_samples=2, seq_len=100).text("calibration")
    assert c4.startswith("row 0 row 1 ") and 3200 <= len(c4) < 4800
    assert loads[0][1]["streaming"] is True
    assert HubText("c4").text("validation").endswith("row 1098 row 1099")


def test_pile_splits_are_disjoint(loads: list[Any]) -> None:
    data = HubText("pile", num_samples=2, seq_len=100)
    calibration, validation = (data.text(split).split("\n\n") for split in ("calibration", "validation"))
    assert validation[-1] == "row 1099" and calibration[0] == "row 1100"
    assert data.text_name("validation") == "NeelNanda/pile-10k train (first 1100 rows)"


ALTERNATIVES = ["--data BuiltinText", "--data FileText --data.files=", "--data SelfGenerated"]


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb", "pile"])
@pytest.mark.parametrize("offline", [False, True], ids=["refused", "offline"])
def test_absent_hub_is_one_sentence_at_once(
    name: Any, offline: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", offline)
    start = time.monotonic()
    with fails("Hugging Face Hub", *ALTERNATIVES, error=ConnectionError) as caught:
        HubText(name).text("calibration")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 15  # measured 0.03 s; datasets alone retries for 23 s


def test_only_the_first_line_of_a_long_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def break_off(repo: str) -> None:
        raise OSError("403 Forbidden.\nA page of details")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("plquant.data.hub._knock", break_off)
    with fails("(OSError: 403 Forbidden); connect", error=ConnectionError):
        HubText().text("calibration")


def test_unknown_hub_set_is_refused_at_once() -> None:
    with fails("--data.name=wikitext3", "wikitext2, c4, ptb, pile"):
        HubText("wikitext3")  # type: ignore[arg-type]
