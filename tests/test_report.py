"""What a run tells at its end."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import plquant as pq
from plquant.report import COLUMNS, duration


def test_every_row_says_what_it_costs(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = pq.QuantizedLM(str(checkpoint), partial(pq.methods.AffineQuant, online="dense"), pq.IntGrid(3, 16))
    data = pq.data.BuiltinText(num_samples=4, seq_len=32, eval_seq_len=64, eval_windows=2)
    trainer = pq.BlockwiseTrainer(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    report = trainer.calibrate(model, data, output_dir=str(tmp_path / "out"))
    full, nearest, ours = ([row[COLUMNS.index(c)] for c in ("bits", "run-time MACs")] for row in report.rows())
    assert report.cost is not None and report.nearest_cost is not None
    assert full == ["16.000", "+0.0%"] and nearest == ["4.188", "+0.0%"]
    # One matrix of 64 x 64 after each of two norms, in bf16, beside the weights of a block.
    weights = report.cost.macs / 3
    assert report.cost.online_macs == 3 * 2 * 64 * 64 and report.cost.online_bits == 3 * 2 * 16 * 64 * 64
    assert ours == [f"{4.1875 + 2 * 16 * 64 * 64 / weights:.3f}", f"+{2 * 64 * 64 / weights:.1%}"]
    said, card = capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()
    assert all(cell in said for cell in ours)
    header, line, *rows = [text for text in card.splitlines() if text.startswith("|")]
    assert header == "| model | perplexity | word perplexity | bits | run-time MACs | size |"
    assert line.count("|") == 7 and [row.split(" | ")[3:5] for row in rows] == [full, nearest, ours]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system's own figure is used")
def test_the_memory_of_a_process_is_not_that_of_the_one_that_started_it() -> None:
    held = bytearray(2**30)  # which the system's figure would begin with
    found = subprocess.run(
        [sys.executable, "-c", "from plquant.report import peak_bytes; print(peak_bytes())"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert 0 < int(found.stdout) < len(held)


def test_long_times_are_hours() -> None:
    assert [duration(s) for s in (90, 7199, 7200)] == ["1.5 minutes", "120.0 minutes", "2.0 hours"]
