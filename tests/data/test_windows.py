"""Which windows a text source draws, how the evaluation text is cut, and what its protocol says."""

import hashlib
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plquant.data import BuiltinText
from tests.data.given import MODEL, GivenText, decode, fails
from tests.families import BOS, byte_tokenizer

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
