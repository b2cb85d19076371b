"""The text sources: which windows they draw, how the evaluation text is cut, what users are told when it cannot be."""
# ruff: noqa: D103 (the names of tests say what they test)

import ast
import hashlib
import inspect
import itertools
import json
import random
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from safetensors.torch import save_file

import plquant.data
from plquant.data import BuiltinText, FileText, HubText, SelfGenerated, TextData, TokenIds
from tests.families import BOS, EOS, VOCABULARY, byte_tokenizer


class GivenText(TextData):
    """Both splits are the text given."""

    def __init__(self, text: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.given = text

    def text(self, split: str) -> str:
        """The text given."""
        return self.given

    def text_name(self, split: str) -> str:
        """A fixed name."""
        return "the given text"


MODEL = SimpleNamespace(tokenizer=byte_tokenizer())


def decode(ids: torch.Tensor) -> str:
    return MODEL.tokenizer.decode(ids.tolist())


def fails(*parts: str, error: type[Exception] = ValueError) -> Any:
    """The error has all of these parts in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))


@pytest.fixture(autouse=True)
def global_random_state_is_untouched() -> Any:
    states: Any = [torch.get_rng_state, lambda: torch.from_numpy(np.random.get_state(legacy=False)["state"]["key"])]
    before, python_before = [state() for state in states], random.getstate()
    yield
    assert all(torch.equal(state(), old) for state, old in zip(states, before, strict=True))
    assert random.getstate() == python_before


# calibration windows


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=12, max_size=200),
    num_samples=st.integers(1, 4),
    seq_len=st.integers(1, 3),
    seed=st.integers(0, 2**62),
)
def test_calibration_windows_are_substrings_of_the_text(text: str, num_samples: int, seq_len: int, seed: int) -> None:
    ids = GivenText(text, num_samples=num_samples, seq_len=seq_len, seed=seed).calibration_ids(MODEL)
    assert ids.shape == (num_samples, seq_len) and ids.dtype == torch.int64
    assert all(decode(window) in text for window in ids)


def test_every_start_can_be_drawn_up_to_the_last_token() -> None:
    few = [GivenText("abcd", num_samples=1, seq_len=2, seed=seed).calibration_ids(MODEL)[0] for seed in range(40)]
    assert {decode(window) for window in few} == {"ab", "bc", "cd"}


def test_seed_decides_the_windows() -> None:
    first, again, other = (
        BuiltinText(num_samples=4, seq_len=64, seed=seed).calibration_ids(MODEL) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bos_stands_once_at_the_start_of_the_whole_text() -> None:
    model = SimpleNamespace(tokenizer=byte_tokenizer(bos=True, bos_token="<s>"))
    windows = GivenText("abcdefg", eval_seq_len=4).evaluation_text(model).windows
    assert (windows == BOS).nonzero().tolist() == [[0, 0]]
    assert windows.shape == (2, 4)


def test_long_text_raises_no_length_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import logging

    warned: list[Any] = []
    monkeypatch.setattr(logging.get_logger("transformers.tokenization_utils_base"), "warning", warned.append)
    tokenizer = byte_tokenizer()  # a fresh one: each warns once only
    data = GivenText("x" * 100, num_samples=1, seq_len=4)
    data.calibration_ids(SimpleNamespace(tokenizer=tokenizer))
    assert warned == []
    tokenizer("x" * 100)  # control: without our silencing it does warn
    assert len(warned) == 1


def test_too_short_calibration_text_says_what_would_do() -> None:
    data = GivenText("x" * 100, num_samples=12, seq_len=10)
    with fails("--data.num_samples=12", "--data.seq_len=10", "120 tokens", "the given text has 100"):
        data.calibration_ids(MODEL)
    with fails("use --data.num_samples=10 or --data.seq_len=8 or a longer text"):
        data.calibration_ids(MODEL)
    for fitting in ({"num_samples": 10, "seq_len": 10}, {"num_samples": 12, "seq_len": 8}):
        GivenText("x" * 100, **fitting).calibration_ids(MODEL)
    with fails("use a longer text"):
        GivenText("x", num_samples=12, seq_len=10).calibration_ids(MODEL)


# evaluation windows and protocol


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=7, max_size=99), length=st.integers(2, 7)
)
def test_evaluation_windows_are_consecutive_and_drop_only_the_tail(text: str, length: int) -> None:
    windows = GivenText(text, eval_seq_len=length).evaluation_text(MODEL).windows
    assert windows.dtype == torch.int64
    assert decode(windows.flatten()) == text[: len(text) // length * length]


def test_protocol_says_what_was_evaluated() -> None:
    evaluation = GivenText("one two  three\nfour five", eval_seq_len=8, eval_windows=2).evaluation_text(MODEL)
    ids = MODEL.tokenizer("one two  three\nf")["input_ids"]
    assert evaluation.protocol == {
        "text": "the given text",
        "text_sha256": hashlib.sha256(b"".join(value.to_bytes(8, "little") for value in ids)).hexdigest(),
        "tokens": 16,
        "window_length": 8,
        "windows": 2,
        "words": 4,  # "one two ", " three\nf"
    }


def test_words_leave_special_tokens_out() -> None:
    model = SimpleNamespace(tokenizer=byte_tokenizer(bos=True, bos_token="<s>"))
    assert GivenText(" do n't", eval_seq_len=8).evaluation_text(model).protocol["words"] == 2


def test_evaluation_text_is_tokenized_once_for_each_tokenizer() -> None:
    calls: list[str] = []

    class Counting:
        def __call__(self, text: str, **options: Any) -> Any:
            calls.append(text)
            return MODEL.tokenizer(text, **options)

        def decode(self, *args: Any, **kwargs: Any) -> str:
            return MODEL.tokenizer.decode(*args, **kwargs)

    data, tokenizer = GivenText("abcdef", eval_seq_len=3), Counting()
    first = data.evaluation_text(SimpleNamespace(tokenizer=tokenizer))
    assert data.evaluation_text(SimpleNamespace(tokenizer=tokenizer)) is first and len(calls) == 1
    data.evaluation_text(SimpleNamespace(tokenizer=Counting()))
    assert len(calls) == 2


def test_evaluation_refuses_a_text_shorter_than_asked_for() -> None:
    with fails("--data.eval_seq_len=8", "at least 8", "the given text has 5", "--data.eval_seq_len=5"):
        GivenText("abcde", eval_seq_len=8).evaluation_text(MODEL)
    with fails("--data.eval_seq_len=8", "has 1; use a longer text"):
        GivenText("a", eval_seq_len=8).evaluation_text(MODEL)
    with fails("--data.eval_windows=3", "gives 2", "--data.eval_windows=2"):
        GivenText("abcde", eval_seq_len=2, eval_windows=3).evaluation_text(MODEL)


def test_trainer_gets_the_windows_one_by_one() -> None:
    class Module(L.LightningModule):
        tokenizer = MODEL.tokenizer

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[torch.Tensor] = []

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.seen.append(batch)

    module, data = Module(), GivenText("abcdefgh", eval_seq_len=3)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(accelerator="cpu", devices=1, **quiet).validate(module, data, verbose=False)
    assert [batch.shape for batch in module.seen] == [(1, 3), (1, 3)]
    assert torch.equal(torch.cat(module.seen), data.evaluation_text(module).windows)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_samples", 0), ("seq_len", 0), ("seq_len", 1.5), ("batch_size", -1), ("seed", -1)]
    + [("eval_seq_len", 1), ("eval_windows", 0)],
)
def test_numbers_out_of_range_are_refused_at_once(name: str, value: Any) -> None:
    with fails(f"--data.{name}={value}", "at least"):
        BuiltinText(**{name: value})


# built-in text


def test_builtin_splits_are_disjoint_and_complete() -> None:
    from pydoc_data.topics import topics

    calibration, validation = (BuiltinText().text(split) for split in ("calibration", "validation"))
    assert calibration + validation == "\n\n".join(text for _, text in sorted(topics.items()))
    assert len(calibration) / len(validation) == pytest.approx(4, rel=1e-3)


def test_builtin_text_does_not_depend_on_the_order_of_the_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pydoc_data.topics.topics", {"b": "later", "a": "first"})
    assert BuiltinText().text("calibration") + BuiltinText().text("validation") == "first\n\nlater"


def test_builtin_protocol_names_the_part() -> None:
    data = BuiltinText(eval_windows=1, eval_seq_len=32)
    protocol = data.evaluation_text(MODEL).protocol
    assert protocol["text"] == "pydoc_data.topics (last fifth)"
    assert decode(data.evaluation_text(MODEL).windows[0]) in data.text("validation")


# files


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


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


@pytest.fixture
def ids_file(tmp_path: Path) -> str:
    tensors = {
        "calibration_ids": torch.arange(12, dtype=torch.int32).view(4, 3),
        "evaluation_ids": torch.arange(100, 110).view(2, 5),
        "floats": torch.zeros(2, 2),
        "flat": torch.arange(3),
        "empty": torch.zeros(0, 3, dtype=torch.int64),
        "foreign": torch.tensor([[5, 300]]),
        "negative": torch.tensor([[5, -100]]),
    }
    save_file(tensors, tmp_path / "ids.safetensors")
    return str(tmp_path / "ids.safetensors")


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
    wider = SimpleNamespace(
        tokenizer=MODEL.tokenizer, config=tiny_llama(vocab_size=301).config
    )  # an embedding padded with rows
    assert TokenIds(ids_file, calibration_key="foreign").calibration_ids(wider).max() == 300


def test_ids_file_must_be_safetensors(tmp_path: Path) -> None:
    with fails("--data.file=", "gone.safetensors does not exist"):
        TokenIds(str(tmp_path / "gone.safetensors"))
    with fails("--data.file=", "plain.safetensors is not a safetensors file"):
        TokenIds(write(tmp_path / "plain.safetensors", "plain text, long enough for a header"))


# self-generated text


def tiny_llama(vocab_size: int = VOCABULARY, **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = LlamaForCausalLM(
            LlamaConfig(vocab_size=vocab_size, bos_token_id=BOS, eos_token_id=EOS, **sizes, **options)
        )
        lm.get_output_embeddings().weight.data.normal_()  # logits with some preference
    return lm


def llama_model(bos: bool = True, **options: Any) -> Any:
    tokenizer = byte_tokenizer(bos_token="<s>") if bos else byte_tokenizer()
    return SimpleNamespace(tokenizer=tokenizer, lm=tiny_llama(**options))


def sampled(model: Any, num_samples: int = 5, seq_len: int = 6, generation_batch_size: int = 2, **options: Any) -> Any:
    sizes = {"num_samples": num_samples, "seq_len": seq_len, "generation_batch_size": generation_batch_size}
    return SelfGenerated(**sizes, **options).calibration_ids(model)


def test_model_samples_from_bos_and_the_seed_decides() -> None:
    model = llama_model()
    ids = sampled(model)
    assert ids.shape == (5, 6) and ids.dtype == torch.int64
    assert (ids[:, 0] == BOS).all() and (ids[:, 1:] < VOCABULARY).all()
    assert len(ids.unique(dim=0)) == 5
    assert torch.equal(ids, sampled(model))
    assert not torch.equal(ids, sampled(model, seed=1))


def test_without_bos_windows_start_with_random_tokens() -> None:
    starts = sampled(llama_model(bos=False), num_samples=12)[:, 0]
    assert len(starts.unique()) > 6 and starts.max() < VOCABULARY


def test_sampling_goes_on_where_the_model_would_stop() -> None:
    model = llama_model()
    model.lm.generation_config.eos_token_id = [EOS, 7]

    def prefer_to_stop(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        stop = torch.zeros_like(logits)
        stop[..., [EOS, 7]] = 1e4
        return logits + stop

    model.lm.get_output_embeddings().register_forward_hook(prefer_to_stop)
    ids = sampled(model)
    assert ids.shape == (5, 6) and not torch.isin(ids, torch.tensor([EOS, 7])).any()


def test_sampling_ignores_the_checkpoints_generation_settings() -> None:
    plain, opinionated = llama_model(), llama_model()
    opinionated.lm.generation_config.update(do_sample=True, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=9.0)
    assert torch.equal(sampled(opinionated, seq_len=48), sampled(plain, seq_len=48))


def test_low_temperature_is_greedy() -> None:
    model = llama_model()
    ids = sampled(model, temperature=1e-4)
    with torch.no_grad():
        logits = model.lm(ids).logits[:, :-1]
    logits[..., EOS] = -torch.inf
    assert torch.equal(logits.argmax(-1), ids[:, 1:])


def test_sampling_is_without_dropout_and_restores_the_mode() -> None:
    model = llama_model(attention_dropout=0.9, initializer_range=1.0)
    model.lm.eval()
    evaluated = sampled(model)
    assert not model.lm.training
    model.lm.train()
    assert torch.equal(sampled(model), evaluated)
    assert model.lm.training


def test_self_generated_validates_on_the_builtin_text() -> None:
    data = SelfGenerated(eval_windows=2, eval_seq_len=64)
    expected = BuiltinText(eval_windows=2, eval_seq_len=64).evaluation_text(MODEL)
    assert data.evaluation_text(MODEL).protocol == expected.protocol
    with pytest.raises(NotImplementedError, match="calibration_ids"):
        data.text("calibration")


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0.0), ("temperature", float("nan")), ("seq_len", 1), ("generation_batch_size", 0)],
)
def test_sampling_arguments_are_checked_at_once(name: str, value: Any) -> None:
    with fails(f"--data.{name}={value}", "needed"):
        SelfGenerated(**{name: value})


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


# the command line


@pytest.mark.parametrize("name", ["BuiltinText", "FileText", "HubText", "SelfGenerated"])
def test_every_source_is_built_from_flags_and_recorded(name: str, tmp_path: Path) -> None:
    own = [f"--data.files=['{write(tmp_path / 'a.txt', 'a')}']"] if name == "FileText" else []
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TextData, "data")
    config = parser.parse_args([f"--data={name}", "--data.seq_len=7", "--data.eval_windows=2", *own])
    data = parser.instantiate(config).data
    assert isinstance(data, getattr(plquant.data, name)) and (data.seq_len, data.eval_windows) == (7, 2)
    assert data.hparams.seq_len == 7 and data.hparams.num_samples == 128


def test_own_and_shared_arguments_are_recorded(ids_file: str) -> None:
    data = TokenIds(ids_file, num_samples=2, batch_size=4)
    assert dict(data.hparams) | {"file": ids_file, "num_samples": 2, "batch_size": 4} == dict(data.hparams)
    assert SelfGenerated(temperature=0.5, seed=9).hparams["temperature"] == 0.5
    assert GivenText("x", seed=9).hparams["seed"] == 9  # also where a subclass does not record itself


@pytest.mark.parametrize("source", [TextData, FileText, HubText, SelfGenerated, TokenIds])
def test_every_argument_is_documented(source: type[TextData]) -> None:
    arguments = set(inspect.signature(source.__init__).parameters) - {"self", "kwargs"}
    assert arguments and all(re.search(rf"^ +{name}: ", source.__doc__ or "", re.M) for name in arguments)


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    allowed = {"torch", "lightning", "plquant"}
    standard = sys.stdlib_module_names
    for path in Path(plquant.data.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
                assert {name.split(".")[0] for name in names} <= allowed | standard, f"{path.name} imports {names}"
