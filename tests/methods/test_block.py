"""One block of every family: transforms are equivalences, what is trained is what is folded, and fitting helps."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import lightning as L
import pytest
import torch
from torch import Tensor

from plquant.architectures.moe import unfuse_experts_
from plquant.block_module import BlockModule
from plquant.blocks.activations import Activations
from plquant.blocks.capture import capture_inputs
from plquant.blocks.errors import token_error
from plquant.blocks.prepare import prepare_blocks
from plquant.blocks.proof import _AllDouble
from plquant.blocks.quant_block import QuantBlock
from plquant.methods import GPTQ, QLLM, RTN, AffineQuant, Composed, OmniQuant
from plquant.nn.attention import AttentionQuantizer
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.nn.online import Online
from plquant.nn.packed_linear import PackedLinear
from plquant.nn.transformed_norm import TransformedNorm
from plquant.parts.affine import Affine
from plquant.parts.clipping import LWC
from plquant.parts.learned_rounding import LearnedRounding
from plquant.parts.rotation import Rotation
from plquant.parts.scale_shift import LET
from plquant.quant.affine import QTensor, to_groups
from plquant.quant.grid import ActivationGrid, IntGrid
from plquant.transforms.dominant_matrix import DominantMatrix
from plquant.transforms.scale_shift import ScaleShift
from tests.families import FAMILIES, VOCAB, tiny_model

GRID = IntGrid(3, 16)


def make_block(
    family: str,
    dtype: torch.dtype = torch.float32,
    grid: IntGrid = GRID,
    activations: ActivationGrid | None = None,
) -> tuple[QuantBlock, Tensor]:
    lm = tiny_model(family).to(dtype)
    unfuse_experts_(lm)
    ids = torch.randint(3, VOCAB, (6, 24), generator=torch.Generator().manual_seed(0))
    blocks = prepare_blocks(lm, grid, ids, activations)
    return blocks[0], capture_inputs(lm, list(blocks[0].layers.values()), ids)


def randomize_(module: BlockModule, seed: int = 0) -> None:
    """Random values for all that is learned, every matrix open."""
    generator = torch.Generator().manual_seed(seed)
    for m in module.modules():
        if isinstance(m, DominantMatrix):
            m.progress_(1)
    with torch.no_grad():
        for parameters in module.learnables().values():
            for p in parameters:
                p.add_(torch.empty_like(p).uniform_(-1, 1, generator=generator))


def without_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the transforms, take the rounding away."""

    def scaled(weight: Tensor, grid: IntGrid, clip: Any, in_scale: Any, out_scale: Any, **dtypes: Any) -> Tensor:
        weight = weight if in_scale is None else weight * in_scale
        weight = weight if out_scale is None else weight * out_scale[:, None]
        return weight.to(dtypes["dtype"])

    monkeypatch.setattr("plquant.nn.fake_quant_linear.fake_quantize", scaled)


def fit(module: BlockModule, x: Tensor, target: Tensor, epochs: int = 15, **options: Any) -> L.Trainer:
    module.activations = Activations((x, target), 2, 0)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, module.activations.shuffled())
    return trainer


METHODS: dict[str, Callable[[QuantBlock], BlockModule]] = {
    "OmniQuant": OmniQuant,
    "AffineQuant": AffineQuant,
    "AffineQuant, dense": partial(AffineQuant, online="dense"),
    "AffineQuant, kronecker": partial(AffineQuant, online="kronecker"),
    "rotated": partial(Composed, parts=[LET, Rotation, LWC]),
    "rotated and learned": partial(
        Composed,
        parts=[
            LET,
            partial(Affine, online="kronecker", start="rotation"),
            LWC,
            partial(LearnedRounding, start="nearest"),
        ],
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_random_transforms_leave_the_block_as_it_was(family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between queries and keys too, which are transformed where attention is quantized; without any rounding."""
    block, x = make_block(family, torch.float64, activations=ActivationGrid(4))
    module = METHODS[method](block).double()
    randomize_(module)
    without_rounding(monkeypatch)
    for m in block.modules():
        if isinstance(m, FakeQuantLinear):
            m.inputs = None
        elif isinstance(m, AttentionQuantizer):
            m.enabled = False
    with torch.no_grad(), _AllDouble():
        with block.full_precision():
            reference = block(x)
        for m in block.modules():
            if isinstance(m, AttentionQuantizer):
                m.enabled = False
        added = (reference - x).norm()
        assert (block(x) - reference).norm() / added < 1e-9
        norm = next(m for m in block.modules() if isinstance(m, TransformedNorm))
        norm.enabled = False  # negative control: one side of one site left out
        assert (block(x) - reference).norm() / added > 1e-2


def lies_on_its_grid(q: QTensor) -> None:
    """w / scale + zero-point is a code, a whole number in the range of its bits; the zero-point is one too."""
    assert q.zero_point is not None and q.grid.axis == "in"
    codes = to_groups(q.in_steps(q.dequantize().double()), q.grid) + q.zero_point.double().unsqueeze(-1)
    assert (codes - codes.round()).abs().max() < 1e-5
    for whole in (codes.round(), q.zero_point):
        assert q.grid.qmin <= whole.min() and whole.max() <= q.grid.qmax


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_block_is_the_trained_block(family: str, method: str) -> None:
    block, x = make_block(family)
    module = METHODS[method](block)
    randomize_(module)
    with torch.no_grad():
        trained = block(x)
        codes = {name: linear.quantize().codes for name, linear in block.linears.items()}
        module.fold()
        packed = block(x)
    assert not any(isinstance(m, FakeQuantLinear | TransformedNorm) for m in block.modules())
    for name, expected in codes.items():
        linear = block.layers.get_submodule(name)
        assert isinstance(linear, PackedLinear)
        assert torch.equal(linear.quantized().codes, expected)
        lies_on_its_grid(linear.quantized())
    torch.testing.assert_close(packed, trained, rtol=1e-4, atol=1e-4 * float(trained.abs().max()))


def test_packed_bf16_weights_are_the_trained_ones_bit_for_bit() -> None:
    block, _ = make_block("llama", torch.bfloat16)
    module = OmniQuant(block)
    randomize_(module)
    inputs = {name: torch.eye(linear.in_features, dtype=torch.bfloat16) for name, linear in block.linears.items()}
    trained = {name: linear(inputs[name]) for name, linear in block.linears.items()}
    module.fold()
    for name, expected in trained.items():
        assert torch.equal(block.layers.get_submodule(name)(inputs[name]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("online", "places"), [("dense", 2), ("kronecker", 3)])
def test_matrices_that_run_are_stored_as_they_are_multiplied(
    online: Literal["dense", "kronecker"], places: int, dtype: torch.dtype
) -> None:
    """After the norms, the factored ones in front of down_proj too; in the model's dtype, and counted so."""
    block, _ = make_block("llama", dtype)
    module = AffineQuant(block, online=online)
    randomize_(module)
    running = {
        name: [t for t in (m.transforms if isinstance(m, TransformedNorm) else m.online) if t.is_online]
        for name, m in block.layers.named_modules()
        if isinstance(m, TransformedNorm | FakeQuantLinear)
    }
    inputs = {
        name: torch.randn(2, 7, 96 if "down" in name else 64).to(dtype) for name, found in running.items() if found
    }
    with torch.no_grad():
        trained = {name: running[name][0].online(x) for name, x in inputs.items()}
        module.fold()
    assert len(inputs) == places and sum(isinstance(m, Online) for m in block.modules()) == places
    for name, x in inputs.items():
        (op,) = block.layers.get_submodule(name).online
        assert torch.equal(op(x), trained[name])
        assert op.stored_bits == torch.finfo(dtype).bits * sum(buffer.numel() for buffer in op.buffers())


@pytest.mark.parametrize("online", ["dense", "kronecker"])
def test_a_scale_that_nothing_sees_is_not_learned(online: Literal["dense", "kronecker"]) -> None:
    """Groups along the output have a scale for each input channel, and see one only in the linear that writes them."""
    block, _ = make_block("llama", grid=IntGrid(3, 16, axis="out"))
    seen = [site for site in block.sites if block.sees_scale(site)]
    assert {site.kind for site in seen} == {"linear"} and len(seen) == 2
    assert not any(block.sees_scale(site, folds=False) for site in block.sites)
    assert LET(block).sites == seen

    def scales(axis: Literal["in", "out"]) -> int:
        part = Affine(make_block("llama", grid=IntGrid(3, 16, axis=axis))[0], online=online)
        named = [pair for transform in part.transforms for pair in transform.named_parameters()]
        return sum(name.endswith("log_scale") and p.requires_grad for name, p in named)

    assert scales("in") == (1 + 2 if online == "dense" else 1 + 2 * 3)
    assert scales("out") == 1  # between v and o


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(OmniQuant, lwc_lr=-1.0), r"LWC's lr=-1.0 \(--model.method.lwc_lr\).*such as 0.1"),
        (partial(OmniQuant, let_lr=-1.0), r"LET's lr=-1.0 \(--model.method.let_lr\)"),
        (partial(OmniQuant, alpha=1.5), r"LET's alpha=1.5 \(--model.method.alpha\).*from 0 to 1"),
        (partial(Affine, lr=float("nan")), r"Affine's lr=nan"),
        (partial(AffineQuant, stability=-0.1), r"stability=-0.1 \(--model.method.stability\).*more than 0"),
        (partial(GPTQ, damp=1.0), r"--model.method.damp=1.0.*less than 1"),
    ],
)
def test_nonsense_is_refused(make: Callable[[QuantBlock], object], message: str) -> None:
    block, _ = make_block("llama")
    with pytest.raises(ValueError, match=message):
        make(block)


FITTED: dict[str, tuple[Callable[[QuantBlock], BlockModule], ActivationGrid | None]] = {
    "OmniQuant": (partial(OmniQuant, alpha=None, lwc_lr=3e-2), None),
    "OmniQuant A4": (partial(OmniQuant, alpha=None, lwc_lr=3e-2), ActivationGrid(4)),
    "AffineQuant A4": (partial(AffineQuant, alpha=None, lwc_lr=3e-2), ActivationGrid(4)),
    "AffineQuant, kronecker": (partial(AffineQuant, alpha=None, lwc_lr=3e-2, online="kronecker"), None),
    "QLLM A4": (partial(QLLM, lr=1e-2), ActivationGrid(4)),
    "learned rounding": (partial(Composed, parts=[partial(LWC, lr=1e-2), LearnedRounding]), None),
}


@pytest.mark.parametrize("method", FITTED)
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "qwen3", "phi3"])
def test_fitting_beats_rounding_and_moves_every_parameter(family: str, method: str) -> None:
    make, activations = FITTED[method]
    block, x = make_block(family, activations=activations)
    with torch.no_grad():
        with block.full_precision():
            target = block(x)
        before = float(token_error(block(x), target))
    frozen = {name: p.clone() for name, p in block.named_parameters()}
    module = make(block)
    start = [p.detach().clone() for ps in module.learnables().values() for p in ps]
    module.error_before = before
    fit(module, x, target)
    trained = [p for ps in module.learnables().values() for p in ps]
    assert all((p != s).any() for p, s in zip(trained, start, strict=True))
    assert {id(p) for p in module.parameters() if p.requires_grad} == {id(p) for p in trained}
    parameters = dict(block.named_parameters())
    for name, p in frozen.items():
        kept = parameters.get(
            name, parameters.get(name.replace("norm.weight", "norm.norm.weight").replace("norm.bias", "norm.norm.bias"))
        )
        assert kept is not None and torch.equal(kept, p)
    with torch.no_grad():
        module.fold()
        after = float(token_error(block(x), target))
    assert after < 0.95 * before  # 0.91 at most, OmniQuant A4 on phi3


def test_the_best_epoch_is_kept() -> None:
    block, x = make_block("llama")
    with torch.no_grad(), block.full_precision():
        target = block(x)
    module = OmniQuant(block, alpha=None, schedule="constant")
    states: list[tuple[float, list[Tensor]]] = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert isinstance(pl_module, OmniQuant)
            loss = float(pl_module._epoch_loss.compute())
            states.append((loss, [p.detach().clone() for p in pl_module._trained()]))
            if len(states) == 3:  # from here on it gets worse
                for group in trainer.optimizers[0].param_groups:
                    group["lr"] = 30.0

    fit(module, x, target, epochs=6, callbacks=[Watch()])
    best = min(states, key=lambda state: state[0])[1]
    assert all(torch.equal(p, b) for p, b in zip(module._trained(), best, strict=True))
    assert any((p != last).any() for p, last in zip(module._trained(), states[-1][1], strict=True))


def test_a_fit_that_only_harms_ends_where_it_started() -> None:
    block, x = make_block("llama")
    with torch.no_grad(), block.full_precision():
        target = block(x)
    module = OmniQuant(block, alpha=None, lwc_lr=30.0, let_lr=3.0, schedule="constant")
    start = [p.detach().clone() for p in module._trained()]
    fit(module, x, target, epochs=2)
    assert all(torch.equal(p, s) for p, s in zip(module._trained(), start, strict=True))


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0), ("constant", 0.1)])
def test_learning_rates_follow_the_schedule(schedule: Any, last: float) -> None:
    block, x = make_block("llama")
    trainer = fit(OmniQuant(block, alpha=None, schedule=schedule), x, x, epochs=2)
    assert max(group["lr"] for group in trainer.optimizers[0].param_groups) == pytest.approx(last)


def test_augmented_loss_adds_the_second_target() -> None:
    block, x = make_block("llama")
    module = OmniQuant(block, aug_loss=True)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    assert module.aug_loss
    target, other = torch.randn_like(x), torch.randn_like(x)
    with torch.no_grad():
        both = module.training_step([x, target, other], 0)
        apart = module.training_step([x, target], 0) + module.training_step([x, other], 0)
    torch.testing.assert_close(both, apart)


def test_transforms_start_at_smoothquants_scale() -> None:
    block, x = make_block("llama_mqa")
    module = OmniQuant(block, alpha=0.5)
    module.activations = Activations((x, x), 2, 0)
    module.configure_model()
    linear = block.linears["0.self_attn.o_proj"]
    seen: list[Tensor] = []
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), block.full_precision():
        block(x)
    ratio = seen[0].abs().amax((0, 1)).sqrt() / linear.weight.abs().amax(0).sqrt()
    expected = ratio.view(4, -1).amax(0).log()  # one key-value head, read by four query heads
    (transform,) = block.linears["0.self_attn.v_proj"].writes
    assert isinstance(transform, ScaleShift)
    torch.testing.assert_close(transform.log_scale.detach(), expected - expected.mean())


@pytest.mark.parametrize("shift", [True, False])
def test_shifts_may_be_left_out(shift: bool) -> None:
    """OmniQuant's weight-only settings for OPT learn scales only."""
    block, _ = make_block("opt")
    names = {name.rpartition(".")[2] for name, _ in OmniQuant(block, shift=shift).named_parameters()}
    assert "log_scale" in names and ("shift" in names) == shift


def test_shifts_start_in_the_middle_of_the_range() -> None:
    """Of OPT, whose biases take them up; scales start from what is left."""
    block, x = make_block("opt")
    module = OmniQuant(block, alpha=0.5)
    module.activations = Activations((x, x), 2, 0)
    module.configure_model()
    linears = [block.linears[f"0.self_attn.{name}_proj"] for name in "qkv"]
    seen: list[Tensor] = []
    linears[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), block.full_precision():
        block(x)
    low, high = seen[0].amin((0, 1)), seen[0].amax((0, 1))
    (transform,) = linears[0].reads
    assert isinstance(transform, ScaleShift) and transform.shift is not None
    torch.testing.assert_close(transform.shift.detach(), (low + high) / 2)
    weight = torch.stack([linear.weight.abs().amax(0) for linear in linears]).amax(0)
    expected = (((high - low) / 2).sqrt() / weight.sqrt()).log()
    torch.testing.assert_close(transform.log_scale.detach(), expected - expected.mean())


@pytest.mark.parametrize("method", [RTN, lambda block: OmniQuant(block, let=False)])
def test_parts_are_only_those_asked_for(method: Callable[[QuantBlock], BlockModule]) -> None:
    block, _ = make_block("llama")
    module = method(block)
    assert bool(module.learnables()) == (method is not RTN)
    assert not any(isinstance(m, TransformedNorm) for m in block.modules())


def test_nothing_to_learn_is_refused() -> None:
    block, _ = make_block("llama")
    with pytest.raises(ValueError, match="leaves nothing to learn; use RTN"):
        OmniQuant(block, lwc=False, let=False)


def test_a_token_with_a_massive_activation_counts_like_any_other() -> None:
    target = torch.randn(1, 8, 16)
    target[0, 0] *= 1e4
    output = target * 1.1
    torch.testing.assert_close(token_error(output, target), torch.tensor(0.01), rtol=1e-3, atol=0)
    output[0, 0] = target[0, 0]
    torch.testing.assert_close(token_error(output, target), torch.tensor(0.01 * 7 / 8), rtol=1e-3, atol=0)


def test_two_sources_of_one_input_give_one_site() -> None:
    lm = tiny_model("llama", hidden_act="relu")  # ReLU passes positive scales: gate and up are both sources of down
    ids = torch.randint(3, VOCAB, (2, 24))
    block = prepare_blocks(lm, GRID, ids)[0]
    OmniQuant(block)
    consumers = [name for site in block.sites for name in site.consumers]
    assert sorted(consumers) == sorted(set(consumers)) and "0.mlp.down_proj" in consumers


def test_nothing_left_to_learn_is_no_optimizer() -> None:
    block, _ = make_block("llama")
    block.sites = ()
    assert OmniQuant(block, lwc=False).learnables() == {}


def test_the_start_is_measured_in_the_precision_of_the_steps() -> None:
    """With nothing learned the start and every epoch are one and the same block, in fp32 under bf16 autocast too."""
    block, x = make_block("llama", grid=IntGrid(8, 16))
    with torch.no_grad(), block.full_precision():
        target = block(x)
    module, losses = OmniQuant(block, alpha=None, lwc_lr=0.0, let_lr=0.0), []
    compare = module.on_train_epoch_end

    def note() -> None:
        losses.append((module._best_loss, float(module._epoch_loss.compute())))
        compare()

    module.on_train_epoch_end = note  # type: ignore[method-assign]
    fit(module, x, target, 1, precision="bf16-mixed")
    ((start, epoch),) = losses
    assert epoch == pytest.approx(start, rel=1e-3)
