"""Calibration text that the model writes itself."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from plquant.data import BuiltinText, SelfGenerated
from tests.data.given import MODEL, fails, tiny_llama
from tests.families import BOS, EOS, VOCABULARY, byte_tokenizer


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
    model.lm.model.layers[0].mlp.eval()
    assert torch.equal(sampled(model), evaluated)
    assert model.lm.training and not model.lm.model.layers[0].mlp.training


def test_sampling_is_on_the_trainers_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, happened = llama_model(), []
    move, generate = model.lm.to, model.lm.generate
    monkeypatch.setattr(model.lm, "to", lambda device: (happened.append(str(device)), move(device)))
    monkeypatch.setattr(model.lm, "generate", lambda *a, **k: (happened.append("generate"), generate(*a, **k))[1])
    data = SelfGenerated(num_samples=2, seq_len=4)
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu:0")))  # type: ignore[assignment]
    ids = data.calibration_ids(model)
    assert happened == ["cpu:0", "generate", "cpu"]  # and back
    data.trainer = None
    assert torch.equal(data.calibration_ids(model), ids)


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
