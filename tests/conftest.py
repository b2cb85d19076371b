"""Settings of the whole suite."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a network

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# Timings of a shared machine prove nothing; the same examples every time, so that a red run is red again.
settings.register_profile("plquant", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("plquant")
torch.set_num_threads(max(1, (os.cpu_count() or 2) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama in bf16, tied embeddings and a tokenizer of bytes."""
    from tests.families import byte_tokenizer, tiny_model

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    lm = tiny_model("llama", vocab_size=258, num_hidden_layers=3, tie_word_embeddings=True, max_position_embeddings=256)
    lm.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_seed_left() -> Iterator[None]:
    """Lightning keeps the seed of a command in the environment, where the next test's run would find it."""
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
