"""No block ends worse than rounded to nearest, whatever is asked for, and a model with NaN in it is refused by name."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import plquant as pq
from plquant import ActivationGrid
from plquant.block_module import BlockModule
from plquant.blocks.quant_block import QuantBlock
from plquant.finite import require_finite_stream
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.parts.base import Rounding
from plquant.parts.clipping import LWC
from plquant.quant.affine import QTensor
from plquant.report import Report
from plquant.trainer import SAME
from plquant.verify import verify
from tests.families import tiny_model

IDS = torch.arange(3, 67)[None]


def run(checkpoint: Path, out: Path, method: Any, **options: Any) -> Report:
    L.seed_everything(0, verbose=False)
    model = pq.QuantizedLM(str(checkpoint), method, pq.IntGrid(3, 16), **options)
    data = pq.data.BuiltinText(num_samples=4, seq_len=48)
    trainer = pq.BlockwiseTrainer(max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    return trainer.calibrate(model, data, output_dir=str(out), evaluate=False)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for shard in folder.glob("*.safetensors") for k, v in load_file(shard).items()}


def saved(lm: PreTrainedModel, checkpoint: Path, folder: Path) -> Path:
    lm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


def tiny(change: Callable[[PreTrainedModel], Any], dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    lm = tiny_model("llama", vocab_size=258, num_hidden_layers=2, max_position_embeddings=256).to(dtype)
    with torch.no_grad():
        change(lm)
    return lm


def require_a_good_end(report: Report, out: Path) -> None:
    assert all(block.error_after <= block.error_before * (1 + SAME) for block in report.blocks)
    assert all(check.passed for check in verify(out))
    assert pq.load(out)(IDS).logits.isfinite().all()


HOPELESS: dict[str, tuple[Any, dict[str, Any]]] = {
    "OmniQuant": (partial(pq.methods.OmniQuant, let_lr=5.0, lwc_lr=100.0, schedule="constant"), {}),
    "AffineQuant": (partial(pq.methods.AffineQuant, let_lr=5.0, schedule="constant"), {}),
    "QLLM": (partial(pq.methods.QLLM, lr=1.0), {"activations": ActivationGrid(4)}),
    "Best": (
        partial(pq.methods.Best, rounding_lr=10.0, lwc_lr=3.0, let_lr=10.0, schedule="constant"),
        {"activations": ActivationGrid(4)},
    ),
}


@pytest.mark.parametrize("name", HOPELESS)
def test_learning_rates_a_thousand_times_too_high(name: str, checkpoint: Path, tmp_path: Path) -> None:
    method, options = HOPELESS[name]
    require_a_good_end(run(checkpoint, tmp_path / "out", method, **options), tmp_path / "out")


class ZeroRounding(Rounding):
    """Makes every weight zero."""

    def round(self, linear: FakeQuantLinear, hessian: Tensor | None) -> QTensor:
        weight = linear.quantize()
        assert weight.zero_point is not None
        return QTensor(torch.zeros_like(weight.codes), weight.scale, torch.zeros_like(weight.zero_point), weight.grid)


class NotANumber(LWC):
    """Starts where everything is NaN."""

    def __init__(self, block: QuantBlock) -> None:
        super().__init__(block, init=float("nan"))


class Unsolvable(Rounding):
    """Meets a matrix that has no factorization."""

    def round(self, linear: FakeQuantLinear, hessian: Tensor | None) -> QTensor:
        torch.linalg.cholesky(-torch.eye(2))
        raise AssertionError


class WithPart(BlockModule):
    def __init__(self, block: QuantBlock, part: Any) -> None:
        super().__init__(block, [part(block)])


class FailsInTheLastEpoch(pq.methods.OmniQuant):
    """Meets a matrix without factorization when it is nearly done."""

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.trainer.current_epoch == 1:
            with torch.no_grad():
                for parameter in self._trained():
                    parameter.fill_(torch.nan)
            torch.linalg.cholesky(-torch.eye(2))


def test_what_was_good_before_a_failure_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    report = run(checkpoint, tmp_path / "out", FailsInTheLastEpoch)
    assert all(block.error_after < block.error_before and not block.rolled_back for block in report.blocks)
    require_a_good_end(report, tmp_path / "out")


@pytest.mark.parametrize("activations", [None, ActivationGrid(6)], ids=str)
@pytest.mark.parametrize(
    ("part", "reason"),
    [(ZeroRounding, "had an error of"), (NotANumber, "had an error of nan"), (Unsolvable, "cannot solve")],
)
def test_a_part_that_fails_leaves_rounding_to_nearest_to_the_bit(
    part: Any, reason: str, activations: ActivationGrid | None, checkpoint: Path, tmp_path: Path
) -> None:
    report = run(checkpoint, tmp_path / "out", partial(WithPart, part=part), activations=activations)
    rtn = run(checkpoint, tmp_path / "rtn", pq.methods.RTN, activations=activations)
    ours, theirs = tensors(tmp_path / "out"), tensors(tmp_path / "rtn")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    require_a_good_end(report, tmp_path / "out")
    assert all(reason in block.rolled_back for block in report.blocks) and not any(b.rolled_back for b in rtn.blocks)
    said = [line for line in report.summary() if "is rounded to nearest: WithPart" in line]
    assert len(said) == 3 and said[0] in report.card()
    assert reason in report.blocks[0].line(3)
    assert [block.error_after for block in report.blocks] == [block.error_after for block in rtn.blocks]


@pytest.mark.parametrize("method", [pq.methods.OmniQuant, pq.methods.GPTQ, pq.methods.AdaDim, pq.methods.AffineQuant])
def test_weights_that_are_all_zero(method: Any, checkpoint: Path, tmp_path: Path) -> None:
    def zero(lm: PreTrainedModel) -> None:
        for linear in (lm.model.layers[0].self_attn.v_proj, lm.model.layers[1].mlp.down_proj):
            linear.weight.zero_()

    model = saved(tiny(zero), checkpoint, tmp_path / "model")
    require_a_good_end(run(model, tmp_path / "out", method), tmp_path / "out")


def test_a_half_precision_model_with_activations_beyond_its_range(checkpoint: Path, tmp_path: Path) -> None:
    def heavy(lm: PreTrainedModel) -> None:
        lm.model.layers[0].mlp.down_proj.weight[5] *= 5e4

    model = saved(tiny(heavy, torch.float16), checkpoint, tmp_path / "model")
    lm = pq.QuantizedLM(str(model), pq.methods.RTN).lm
    with torch.no_grad():
        assert lm.model(IDS, output_hidden_states=True).hidden_states[1].abs().max() > 1e5  # float16 ends at 65,504
    require_a_good_end(run(model, tmp_path / "out", pq.methods.OmniQuant), tmp_path / "out")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused_by_name(number: float, checkpoint: Path, tmp_path: Path) -> None:
    def spoil(lm: PreTrainedModel) -> None:
        lm.model.layers[1].mlp.up_proj.weight[3, 4] = number

    model = saved(tiny(spoil), checkpoint, tmp_path / "model")
    with pytest.raises(ValueError, match="NaN or infinite weights: model.layers.1.mlp.up_proj.weight; give a sound"):
        run(model, tmp_path / "out", pq.methods.RTN)
    assert not (tmp_path / "out").exists()


def test_activations_that_overflow_are_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    def overflow(lm: PreTrainedModel) -> None:
        lm.model.layers[1].mlp.up_proj.weight.fill_(3e37)

    model = saved(tiny(overflow), checkpoint, tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"what model.layers.1.mlp.up_proj gives on the calibration text.*dtype=float32"
    ):
        run(model, tmp_path / "out", pq.methods.RTN)
    assert not (tmp_path / "out").exists()


def test_one_number_of_one_sequence_is_seen() -> None:
    stream = torch.zeros(3, 4, 5)
    require_finite_stream(stream, "model.layers.3")
    stream[2, 1, 0] = torch.inf
    with pytest.raises(ValueError, match=r"what model.layers.3 gives"):
        require_finite_stream(stream, "model.layers.3")
