"""The metric against transformers' own loss, and the refusal to compare what does not compare."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plquant.perplexity import PerplexityResult, TokenNLL
from tests.families import VOCAB, tiny_model

PROTOCOL = {"text": "t", "text_sha256": "0", "tokens": 20, "window_length": 10, "windows": 2, "words": 5}


def result(nll: float = 2.0, **protocol: Any) -> PerplexityResult:
    return PerplexityResult("m", nll, "float32", PROTOCOL | protocol)


def test_mean_over_windows_is_the_mean_of_transformers_losses() -> None:
    lm = tiny_model("llama")
    windows = torch.randint(3, VOCAB, (5, 1, 32), generator=torch.Generator().manual_seed(0))
    metric = TokenNLL()
    with torch.no_grad():
        for ids in windows:
            metric.update(lm(ids).logits, ids)
        expected = torch.stack([lm(ids, labels=ids).loss for ids in windows]).double().mean()
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-6, atol=0)
    assert metric.tokens == 5 * 31
    assert sum(metric.windows()) / 5 == pytest.approx(float(expected), rel=1e-6) and len(set(metric.windows())) == 5


def test_uniform_logits_have_the_perplexity_of_the_vocabulary() -> None:
    metric = TokenNLL()
    metric.update(torch.zeros(1, 300, 7, dtype=torch.bfloat16), torch.randint(7, (1, 300)))
    assert math.exp(metric.compute()) == pytest.approx(7)


def test_a_hopeless_model_has_a_finite_perplexity() -> None:
    metric, logits = TokenNLL(), torch.zeros(1, 4, 3)
    logits[..., 0] = 1e4
    metric.update(logits, torch.ones(1, 4, dtype=torch.int64))
    assert metric.compute() == 1e4 and math.isfinite(result(1e4).perplexity)


def test_word_perplexity_spreads_the_nats_over_words() -> None:
    assert result().word_perplexity == pytest.approx(math.exp(2.0 * 20 / 5))


def test_what_is_hard_for_both_is_no_noise_between_them() -> None:
    """Windows differ by whole nats, the models by a tenth in each."""
    better, worse = ([hard + gap for hard in (1.0, 2.0, 4.0)] for gap in (0.0, 0.1))
    compared = replace(result(7 / 3), windows=better).compare(replace(result(7 / 3 + 0.1), windows=worse))
    assert compared.difference == pytest.approx(-0.1) and compared.standard_error == pytest.approx(0, abs=1e-12)
    worse[0] += 0.3
    noisy = replace(result(7 / 3), windows=better).compare(replace(result(7 / 3 + 0.2), windows=worse))
    assert noisy.standard_error == pytest.approx(0.3 / 3**0.5 / 3**0.5)
    assert replace(result(), windows=[1.0]).compare(replace(result(), windows=[2.0])).standard_error is None


def test_comparison_is_a_ratio_and_needs_one_protocol(tmp_path: Path) -> None:
    assert result(2.0).compare(result(1.0)).ratio == pytest.approx(math.e)
    with pytest.raises(ValueError, match=r"(?s)different protocols.*window_length: 10 against 20"):
        result().compare(result(window_length=20))
    (tmp_path / "x.json").write_text('{"model": "m"}')
    with pytest.raises(ValueError, match="x.json is not a result written by `plquant validate`"):
        PerplexityResult.read(tmp_path / "x.json")
