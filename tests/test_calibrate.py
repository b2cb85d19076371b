"""The whole pipeline on a tiny model: what is written, who can open it, and that a run can be repeated and resumed."""

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

import plquant as pq
from plquant.bfloat16 import quick_products
from plquant.cli import main
from plquant.formats.checkpoint import predicted_bytes
from plquant.kernels import native
from plquant.nn.packed_linear import PackedLinear
from plquant.perplexity import TokenNLL
from plquant.report import Report
from plquant.run_folder import RunFolder
from tests.families import stock, tiny_model

IDS = torch.arange(3, 67)[None]


def run(
    checkpoint: Path,
    out: Path,
    method: Any = None,
    seed: int = 0,
    callbacks: Any = None,
    evaluate: bool = True,
    activations: int | None = None,
    **grid: Any,
) -> Report:
    L.seed_everything(seed, verbose=False)
    method = partial(pq.methods.OmniQuant, lwc_lr=3e-2, alpha=None) if method is None else method
    weights = pq.IntGrid(**({"bits": 3, "group_size": 16} | grid))
    model = pq.QuantizedLM(
        str(checkpoint), method, weights, None if activations is None else pq.ActivationGrid(activations)
    )
    data = pq.data.BuiltinText(num_samples=6, seq_len=48, batch_size=2, eval_seq_len=64, eval_windows=2)
    trainer = pq.BlockwiseTrainer(max_epochs=6, enable_progress_bar=False, accelerator="cpu", callbacks=callbacks)
    return trainer.calibrate(model, data, output_dir=str(out), evaluate=evaluate)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for shard in sorted(folder.glob("*.safetensors")) for k, v in load_file(shard).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("finished") / "out"
    return out, run(checkpoint, out)


@pytest.mark.parametrize(
    "grid",
    [
        {"bits": 4, "group_size": 16},
        {"bits": 3, "group_size": None},
        {"bits": 2, "group_size": 32, "symmetric": True},
        {"bits": 5, "group_size": None, "symmetric": True},
        {"bits": 8, "group_size": 16},
        {"bits": 3, "group_size": 16, "axis": "out"},
        {"bits": 4, "group_size": 16, "axis": "out", "symmetric": True},
    ],
    ids=str,
)
def test_stock_transformers_gives_our_logits_to_the_last_bit(
    checkpoint: Path, tmp_path: Path, grid: dict[str, Any]
) -> None:
    run(checkpoint, tmp_path / "out", pq.methods.RTN, **grid)
    ours, theirs = (
        pq.load(tmp_path / "out", kernels=False),
        stock(tmp_path / "out"),
    )
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    assert theirs.dtype == ours.dtype == torch.bfloat16


def test_opens_without_plquant_and_keeps_all_that_came_with_the_model(
    finished: tuple[Path, Report], checkpoint: Path
) -> None:
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
lm = AutoModelForCausalLM.from_pretrained({str(finished[0])!r}).eval()
assert not any(name.startswith("plquant") for name in sys.modules)
torch.save(lm(torch.arange(3, 67)[None]).logits.detach(), sys.argv[1])
"""
    logits = finished[0].parent / "logits.pt"
    subprocess.run([sys.executable, "-c", code, str(logits)], check=True, cwd=finished[0].parent)
    lm = pq.load(finished[0], kernels=native.vectors() != "AVX2")  # whose kernels round no weight to bf16
    with torch.no_grad():
        assert torch.equal(torch.load(logits), lm(IDS).logits)
    assert lm.lm_head.weight.data_ptr() == lm.model.embed_tokens.weight.data_ptr()
    tokenizer, original = (AutoTokenizer.from_pretrained(folder) for folder in (finished[0], checkpoint))
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer("some text").input_ids == original("some text").input_ids
    assert lm.generation_config.eos_token_id == 2


def test_memory_holds_packed_words_only(finished: tuple[Path, Report]) -> None:
    lm = pq.load(finished[0])
    packed = [m for m in lm.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 21 and not any(isinstance(m, torch.nn.Linear) for m in lm.model.layers.modules())
    for module in packed:
        held = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        weights = module.in_features * module.out_features
        assert held < weights * (3.2 + 16 / 16 + 3.2 / 16) / 8 * 1.1 + 64
        assert not list(module.parameters())


def test_size_is_the_predicted_one(finished: tuple[Path, Report], checkpoint: Path) -> None:
    model = pq.QuantizedLM(str(checkpoint), pq.methods.RTN)
    shapes, total = model.linear_shapes()
    rest = total - sum(o * i for o, i in shapes.values())
    stored = sum(t.numel() * t.element_size() for t in tensors(finished[0]).values())
    assert predicted_bytes(shapes, dict.fromkeys(shapes, pq.IntGrid(3, 16)), rest, torch.bfloat16) == stored


def test_report_measures_what_the_folder_holds(finished: tuple[Path, Report]) -> None:
    out, report = finished
    assert list(report.perplexities) == ["full precision", "RTN", "OmniQuant W3A16 g16"]
    model = pq.QuantizedLM(str(out), pq.methods.RTN)
    data = pq.data.BuiltinText(eval_seq_len=64, eval_windows=2)
    again = pq.BlockwiseTrainer(enable_progress_bar=False, accelerator="cpu").validate(
        model, data, str(out.parent / "p.json")
    )
    assert again.nll == report.perplexities[report.title].nll
    written = json.loads((out / "report.json").read_text())
    assert [block["error_after"] for block in written["blocks"]] == [block.error_after for block in report.blocks]
    assert (out / "blocks.csv").read_text().count("\n") == 4
    assert (out / "blocks.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert all(f"{result.perplexity:,.3f}" in card for result in report.perplexities.values())


def test_perplexity_of_four_bit_activations_is_that_of_the_loaded_model(checkpoint: Path, tmp_path: Path) -> None:
    report = run(checkpoint, tmp_path / "out", pq.methods.Light, bits=4, group_size=None, activations=4)
    windows = (
        pq.data.BuiltinText(eval_seq_len=64, eval_windows=2)
        .evaluation_text(pq.QuantizedLM(str(tmp_path / "out"), pq.methods.RTN))
        .windows
    )
    nll = {}
    for kernels in (True, False):
        lm, metric = pq.load(tmp_path / "out", kernels=kernels), TokenNLL()
        with torch.no_grad(), quick_products(windows.device):
            for ids in windows:
                metric.update(lm(ids[None], use_cache=False).logits, ids[None])
        nll[kernels] = float(metric.compute())
    evaluated = report.perplexities[report.title].nll
    assert evaluated == nll[True]
    if native.available():
        assert evaluated != nll[False]  # kernels do not round code times scale


def test_every_block_is_fitted(finished: tuple[Path, Report], checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "rtn", pq.methods.RTN)
    fitted, rounded = tensors(finished[0]), tensors(tmp_path / "rtn")
    for name in fitted:
        if name.endswith(".weight_packed"):
            assert not torch.equal(fitted[name], rounded[name]), name
    assert all(block.error_after < block.error_before for block in finished[1].blocks)


def test_same_seed_same_bits_other_seed_other_bits(
    finished: tuple[Path, Report], checkpoint: Path, tmp_path: Path
) -> None:
    again = run(checkpoint, tmp_path / "again")
    run(checkpoint, tmp_path / "other", seed=1)
    assert same(tensors(finished[0]), tensors(tmp_path / "again"))
    assert not same(tensors(finished[0]), tensors(tmp_path / "other"))
    assert again.perplexities[again.title].nll == finished[1].perplexities[again.title].nll


def test_command_line_gives_the_bits_of_the_script(
    finished: tuple[Path, Report], checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cli"
    main(
        f"calibrate --model.checkpoint {checkpoint} --output_dir {out} --model.method OmniQuant "
        "--model.method.lwc_lr 3e-2 --model.method.alpha null "
        "--model.weights.bits 3 --model.weights.group_size 16 --data BuiltinText "
        "--data.num_samples 6 --data.seq_len 48 --data.batch_size 2 --data.eval_seq_len 64 --data.eval_windows 2 "
        "--trainer.max_epochs 6 --trainer.enable_progress_bar false --trainer.accelerator cpu".split()
    )
    assert same(tensors(finished[0]), tensors(out))
    second = tmp_path / "from_config"
    main(["calibrate", "-c", str(out / "config.yaml"), "--output_dir", str(second)])
    assert same(tensors(out), tensors(second))


@pytest.mark.parametrize(
    ("family", "dtype"), [("opt", "float32"), ("qwen2", "bfloat16"), ("gemma2", "float32"), ("phi3", "float16")]
)
def test_biases_untied_heads_and_other_dtypes_survive(
    family: str, dtype: str, checkpoint: Path, tmp_path: Path
) -> None:
    lm = tiny_model(family, vocab_size=258, tie_word_embeddings=False, max_position_embeddings=256)
    lm.to(getattr(torch, dtype)).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", evaluate=False)
    ours, theirs = (
        pq.load(tmp_path / "out", kernels=False),
        stock(tmp_path / "out"),
    )
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    assert ours.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
    before, after = lm.lm_head.weight, ours.lm_head.weight
    assert torch.equal(after, before.to(after.dtype))


def test_a_hopeless_learning_rate_ends_where_it_started(checkpoint: Path, tmp_path: Path) -> None:
    method = partial(pq.methods.OmniQuant, let_lr=1e30, lwc_lr=1e30, schedule="constant", alpha=None)
    report = run(checkpoint, tmp_path / "out", method, evaluate=False)
    assert all(block.error_after < 2 * block.error_before for block in report.blocks)
    assert pq.load(tmp_path / "out")(IDS).logits.isfinite().all()


def test_interrupted_evaluation_loses_nothing(
    finished: tuple[Path, Report], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = pq.BlockwiseTrainer._perplexity
    calls: list[int] = []

    def third_fails(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(pq.BlockwiseTrainer, "_perplexity", third_fails)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path / "out")
    report = run(checkpoint, tmp_path / "out")
    assert same(tensors(finished[0]), tensors(tmp_path / "out")) and (tmp_path / "out" / "report.json").exists()
    assert [b.error_after for b in report.blocks] == [b.error_after for b in finished[1].blocks]


class Interrupt(L.Callback):
    """Stops the process's run at a block, as Ctrl-C would."""

    def __init__(self, block: int, error: type[BaseException] = RuntimeError) -> None:
        self.block, self.error = block, error

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if pl_module.block.index == self.block:
            raise self.error("stop here")


@pytest.mark.parametrize("block", [0, 2])
def test_interrupted_run_goes_on_to_the_same_bits(
    finished: tuple[Path, Report], checkpoint: Path, tmp_path: Path, block: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="stop here"):
        run(checkpoint, out, callbacks=[Interrupt(block)])
    assert len(list(out.glob("*.safetensors"))) == block and not list(out.glob("*.partial"))
    report = run(checkpoint, out, callbacks=[Interrupt(9)])
    assert same(tensors(finished[0]), tensors(out))
    assert [r.error_after for r in report.blocks] == [r.error_after for r in finished[1].blocks]
    assert ("going on with block 3" in capsys.readouterr().out) == (block == 2)


def test_ctrl_c_ends_the_run_and_leaves_nothing_half_written(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path, callbacks=[Interrupt(1, KeyboardInterrupt)])
    assert {p.name for p in tmp_path.iterdir()} == {
        "recipe.json",
        "model-block-000.safetensors",
        "model-block-000.safetensors.json",
    }


def test_another_recipe_does_not_go_on(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop here"):
        run(checkpoint, tmp_path, callbacks=[Interrupt(1)])
    with pytest.raises(
        ValueError, match=r"(?s)holds another run.*trainer.callbacks: \['Interrupt'\] there, \[\] asked for"
    ):
        run(checkpoint, tmp_path)
    with pytest.raises(ValueError, match=r"(?s)holds another run.*model.weights.bits: 3 there, 4 asked for"):
        run(checkpoint, tmp_path, bits=4)


def test_the_model_writes_its_own_text_on_the_trainers_device(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []
    model = pq.QuantizedLM(str(checkpoint), pq.methods.RTN, pq.IntGrid(4, 16))
    move = model.lm.to
    monkeypatch.setattr(model.lm, "to", lambda device: (devices.append(str(device)), move(device)))
    data = pq.data.SelfGenerated(num_samples=2, seq_len=8)
    trainer = pq.BlockwiseTrainer(accelerator="cpu", enable_progress_bar=False)
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("cpu:0"))
    trainer.calibrate(model, data, output_dir=str(tmp_path / "out"), evaluate=False)
    assert devices[:2] == ["cpu:0", "cpu"]


def test_fast_dev_run_takes_one_step_per_block(checkpoint: Path, tmp_path: Path) -> None:
    steps: list[int] = []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            steps.append(pl_module.block.index)

    model = pq.QuantizedLM(str(checkpoint), pq.methods.OmniQuant, pq.IntGrid(4, 16))
    data = pq.data.BuiltinText(num_samples=6, seq_len=48, eval_seq_len=64, eval_windows=2)
    Count.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
    trainer = pq.BlockwiseTrainer(fast_dev_run=True, accelerator="cpu", callbacks=[Count()], enable_progress_bar=False)
    trainer.calibrate(model, data, output_dir=str(tmp_path / "out"))
    assert steps == [0, 1, 2]
    assert pq.load(tmp_path / "out")(IDS).logits.isfinite().all()


@pytest.mark.parametrize(
    "make", [lambda p: p.write_text("x"), lambda p: (p.mkdir(), (p / "thesis.tex").write_text("x"))]
)
def test_folders_of_others_are_left_alone(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "out")
    with pytest.raises(ValueError, match="--output_dir=.*(is a file|thesis.tex)"):
        RunFolder(tmp_path / "out", {}).check(0)


def test_finished_run_is_not_overwritten(finished: tuple[Path, Report], checkpoint: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished[0].iterdir()}
    with pytest.raises(ValueError, match="holds the finished run"):
        run(checkpoint, finished[0])
    assert before == {p: p.stat().st_mtime_ns for p in finished[0].iterdir()}


def test_no_room_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"--output_dir=.* needs 1024000.00 GiB, but .* has .* GiB free"):
        RunFolder(tmp_path / "a" / "b", {}).check(1000 * 2**40)
    assert not (tmp_path / "a").exists()


METHODS: dict[str, Any] = {
    "RTN": pq.methods.RTN,
    "GPTQ": pq.methods.GPTQ,
    "AdaDim": pq.methods.AdaDim,
    "OmniQuant": pq.methods.OmniQuant,
    "AffineQuant": pq.methods.AffineQuant,
    "Best": pq.methods.Best,
    "QLLM": pq.methods.QLLM,
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_repeated_gives_the_same_bytes_by_algorithms_that_promise_it(
    name: str, checkpoint: Path, tmp_path: Path
) -> None:
    activations = pq.ActivationGrid(4) if name == "QLLM" else None
    written = []
    for out in (tmp_path / "one", tmp_path / "two"):
        torch.use_deterministic_algorithms(False)
        torch.rand(7)  # a state of its own
        L.seed_everything(1, verbose=False)
        model = pq.QuantizedLM(str(checkpoint), METHODS[name], pq.IntGrid(3, 16), activations)
        trainer = pq.BlockwiseTrainer(max_epochs=2, deterministic=True, enable_progress_bar=False, accelerator="cpu")
        trainer.calibrate(model, pq.data.BuiltinText(num_samples=4, seq_len=32), str(out), evaluate=False)
        assert torch.are_deterministic_algorithms_enabled()
        written.append({path.name: path.read_bytes() for path in out.glob("*.safetensors")})
    assert written[0] == written[1]


def test_a_run_uses_them_without_being_asked() -> None:
    torch.use_deterministic_algorithms(False)
    pq.BlockwiseTrainer(accelerator="cpu")
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()


def test_what_blocks_were_fitted_with_does_not_add_up(checkpoint: Path, tmp_path: Path) -> None:
    optimizers: list[Any] = []
    alive: list[int] = []

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            alive.append(sum(optimizer() is not None for optimizer in optimizers))
            optimizers.append(weakref.ref(trainer.optimizers[0]))

    Look.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
    model = pq.QuantizedLM(str(checkpoint), pq.methods.OmniQuant, pq.IntGrid(4, 16))
    trainer = pq.BlockwiseTrainer(max_epochs=1, accelerator="cpu", callbacks=[Look()], enable_progress_bar=False)
    gc.disable()
    try:
        data = pq.data.BuiltinText(num_samples=2, seq_len=32)
        trainer.calibrate(model, data, output_dir=str(tmp_path / "out"), evaluate=False)
    finally:
        gc.enable()
    assert alive == [0, 0, 0]
