"""A norm that quantizes for its readers: on a GPU, which a CPU plays, it and they compute what they would apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

pytest.importorskip("triton")
import plquant as pq
from plquant.blocks.prepare import prepare_blocks
from plquant.kernels import token_ops
from plquant.nn.activation_quantizer import ActivationQuantizer
from plquant.nn.online import attach_online_
from plquant.nn.packed_linear import PackedLinear
from plquant.nn.packed_structure import PackedStructure
from plquant.nn.token_norm import TokenNorm
from plquant.quant.fake_quantize import quantize_weight
from plquant.quant.grid import ActivationGrid, IntGrid
from plquant.transforms.gather_op import GatherOp
from plquant.transforms.online import KroneckerOp
from tests.families import tiny_model
from tests.test_methods import QUANTIZED_ACTIVATIONS, calibrate
from tests.test_packed_model import logits, save

C, EPS = 48, 1e-5


def linear(
    out: int = 32,
    width: int = C,
    bits: int = 4,
    symmetric: bool = False,
    offset: Tensor | None = None,
    clip: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> PackedLinear:
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(out)).to(dtype)
    made = PackedLinear(quantize_weight(weight, IntGrid(4, None)), torch.linspace(-1, 1, out).to(dtype))
    made.inputs = ActivationQuantizer(bits, symmetric, offset, clip)
    return made


def norm_of(dtype: torch.dtype = torch.bfloat16, kind: Callable[..., nn.Module] = LlamaRMSNorm) -> nn.Module:
    norm = kind(C, eps=EPS)
    nn.init.uniform_(norm.get_parameter("weight"), 0.5, 1.5)
    return norm.to(dtype).requires_grad_(False)


def inputs(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = torch.randn(*shape, C, generator=torch.Generator().manual_seed(sum(shape)))
    x[..., ::7] *= 20
    return x.to(dtype)


def test_only_rms_norms_whose_readers_quantize_alike_are_taken() -> None:
    norm, readers = norm_of(), [linear(32), linear(40)]
    own = TokenNorm.of(norm, readers)
    assert own is not None and own.readers == (*readers,) and own.weight is norm.weight
    for shape in ((), (3,), (2, 0), (2, 5)):
        assert torch.equal(own(inputs(*shape)), norm(inputs(*shape)))
    assert set(own.state_dict()) == {"weight"} and not list(own.children())
    layer_norm = nn.LayerNorm(C, EPS, bias=False).bfloat16()
    rounded_once = norm_of(torch.float32, nn.RMSNorm)  # the same in this dtype, not in others that it may be loaded in
    for other in (layer_norm, norm_of(kind=GemmaRMSNorm), rounded_once, nn.Identity()):
        assert TokenNorm.of(other, readers) is None
    offset, clip = torch.linspace(-0.4, 0.3, C), torch.tensor([0.7, 0.9])
    assert TokenNorm.of(norm, [linear(offset=offset), linear(offset=offset.clone())]) is not None
    rotated, plain = linear(), linear()
    attach_online_(rotated, [KroneckerOp(torch.eye(6), torch.eye(8))])
    plain.inputs = None
    others = [linear(bits=8), linear(symmetric=True), linear(offset=offset), linear(clip=clip), rotated, plain]
    for reader in (*others, nn.Linear(C, 32)):
        assert TokenNorm.of(norm, [linear(), reader]) is None
    assert TokenNorm.of(norm, []) is None


def online(name: str, dtype: torch.dtype) -> list[nn.Module]:
    """Operations on 48 channels; the gather makes 56 of them."""
    rotation = KroneckerOp(torch.eye(6).flip(0).to(dtype), torch.eye(8).to(dtype), 0.5)
    index = torch.arange(56) % C
    gather = GatherOp(index, torch.tensor([[3, 50], [40, 50], [7, 1]]))
    after = KroneckerOp(torch.eye(7).to(dtype), torch.eye(8).to(dtype))
    return {"": [], "gather": [gather], "rotation": [rotation], "two": [gather, after]}[name]


def with_readers(name: str, symmetric: bool, dtype: torch.dtype) -> tuple[TokenNorm, list[PackedLinear]]:
    """A norm with these operations, and what reads it, laid out."""
    width = 56 if name in ("gather", "two") else C
    offset = torch.linspace(-0.4, 0.3, width) if name == "gather" else None
    readers = [linear(n, width, 4, symmetric, offset, dtype=dtype) for n in (32, 40)]
    norm = TokenNorm.of(norm_of(dtype=dtype), readers)
    assert norm is not None
    attach_online_(norm, online(name, dtype))
    for reader in readers:
        reader.prepare_()
    norm.prepare_()
    return norm, readers


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("name", ["", "gather", "rotation", "two"])
def test_tokens_give_what_activations_give(name: str, symmetric: bool, dtype: torch.dtype) -> None:
    norm, readers = with_readers(name, symmetric, dtype)
    for shape in ((), (1,), (2, 20), (2, 0)):
        x = inputs(*shape, dtype=dtype)
        tokens = norm(x)
        assert tokens.dtype == torch.int8 and tokens.shape[:-1] == x.shape[:-1]
        y = norm.normed(x)
        for op in norm.online or ():
            y = op(y)
        for reader in readers:
            found = reader(tokens)
            assert found.dtype == dtype and torch.equal(found, reader(y))
    x = inputs(3, 4, dtype=dtype)

    def both(x: Tensor) -> Tensor:
        tokens = norm(x + 1)
        return torch.cat([reader(tokens) for reader in readers], -1)

    torch.compiler.reset()  # it has seen this function with other norms
    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))
    # where a linear takes activations, or these are others, it is a norm
    assert norm(x.clone().requires_grad_()).requires_grad
    wide = norm(x.float())
    assert wide.dtype == torch.float32 and wide.shape == (3, 4, readers[0].in_features)
    readers[1].prepared = None
    assert norm(x).dtype == dtype


@pytest.mark.parametrize(
    ("index", "adds"),
    [([0, C], [[0, 1]]), ([0, -1], [[0, 1]]), ([0, 1], [[C, 1]]), ([0, 1], [[0, 2]]), ([0, 1], [[0, -1]])],
)
def test_a_gather_of_other_channels_is_refused(index: list[int], adds: list[list[int]]) -> None:
    norm = TokenNorm.of(norm_of(), [linear(), linear(40)])
    assert norm is not None
    attach_online_(norm, [GatherOp(torch.tensor(index), torch.tensor(adds))])
    with pytest.raises(ValueError, match="the folder is damaged"):
        norm.prepare_()


def test_readers_that_changed_are_refused() -> None:
    norm = TokenNorm.of(norm_of(), [linear(), linear(40)])
    assert norm is not None and norm.readers[1].inputs is not None
    norm.prepare_()
    norm.readers[1].inputs.offset = torch.zeros(C)
    with pytest.raises(ValueError, match="do not quantize alike"):
        norm.prepare_()


@pytest.mark.parametrize("entry", [{"readers": ["other"]}, {"readers": []}, {"eps": "1e-5"}], ids=str)
def test_a_folder_that_names_others_is_refused(entry: dict[str, Any]) -> None:
    def model() -> nn.ModuleDict:
        return nn.ModuleDict({"norm": norm_of(), "linear": nn.Linear(C, 32), "other": nn.Linear(C, 32)})

    own = {"norm": {"eps": EPS, "readers": ["linear"]} | entry}
    structure = PackedStructure({"linear": IntGrid(4, None)}, ActivationGrid(4), norms=own)
    with pytest.raises(ValueError, match="norm is no norm of quantized linears"):
        structure.build_(model(), set())
    earlier, built = structure.as_dict(), model()
    del earlier["norms"]  # as blocks of an interrupted run of an earlier version
    PackedStructure.from_dict(earlier).build_(built, set())
    assert isinstance(built["norm"], LlamaRMSNorm)


@pytest.mark.usefixtures("pretended")
def test_wrong_arguments_are_named() -> None:
    x, reader = inputs(2), linear()
    reader.prepare_()
    weight = (*[reader.get_buffer(name) for name in ("codes", "scale", "zero_point", "sums")], None, 32, C, 4, C, False)
    tokens = token_ops.norm_tokens(x, torch.ones(C).bfloat16(), EPS, None, 4, False, None)
    with pytest.raises(ValueError, match=r"argument `tokens` to be of shape \[..., 64\]"):
        token_ops.token_linear(tokens[:, :-16], *weight, torch.bfloat16, False)
    with pytest.raises(ValueError, match="argument `tokens` to be int8"):
        token_ops.token_linear(tokens.int(), *weight, torch.bfloat16, False)
    with pytest.raises(ValueError, match="argument `gain` to be torch.bfloat16"):
        token_ops.norm_tokens(x, torch.ones(C), EPS, None, 4, False, None)
    with pytest.raises(ValueError, match="argument `bits` to be 2 to 8"):
        token_ops.norm_tokens(x, torch.ones(C).bfloat16(), EPS, None, 9, False, None)
    with pytest.raises(ValueError, match="argument `offset` to be of shape"):
        token_ops.norm_tokens(x, torch.ones(C).bfloat16(), EPS, None, 4, False, torch.ones(3))
    with pytest.raises(ValueError, match="argument `left` to be"):
        token_ops.kronecker_tokens(x, torch.eye(6), torch.eye(8), 1.0, 4, False, None)


def calibrated(family: str, folder: Path) -> tuple[nn.Module, Path]:
    """A tiny model rounded to nearest, W4A4, and its folder."""
    lm = tiny_model(family).to(torch.bfloat16)
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    for block in prepare_blocks(lm, IntGrid(4, None), ids, ActivationGrid(4)):
        block.pack_()
    return lm, save(lm, folder, ActivationGrid(4))


NORMS = {"llama": 4, "qwen3": 4, "mistral": 4, "phi3": 4, "mixtral": 2, "gemma3": 0, "opt": 0}


@pytest.mark.parametrize("family", NORMS)
def test_a_run_makes_them_and_a_folder_keeps_them(family: str, tmp_path: Path) -> None:
    lm, folder = calibrated(family, tmp_path / "quantized")
    found = {name for name, module in lm.named_modules() if isinstance(module, TokenNorm)}
    assert len(found) == NORMS[family]
    again = pq.load(folder)
    assert {name for name, module in again.named_modules() if isinstance(module, TokenNorm)} == found
    for name in found:
        one, other = lm.get_submodule(name), again.get_submodule(name)
        names = [{linear: n for n, linear in model.named_modules()} for model in (lm, again)]
        assert isinstance(one, TokenNorm) and isinstance(other, TokenNorm) and one.eps == other.eps
        assert [names[0][linear] for linear in one.readers] == [names[1][linear] for linear in other.readers]
        assert torch.equal(one.weight, other.weight)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("name", ["QLLM merging", "Light"])
def test_what_methods_make_is_the_same_from_tokens(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate(checkpoint, tmp_path / "out", QUANTIZED_ACTIVATIONS[name], group_size=None, activations=ActivationGrid(4))
    lm = pq.load(tmp_path / "out")
    norms = [module for module in lm.modules() if isinstance(module, TokenNorm)]
    gathers = sum(norm.gather is not None for norm in norms)
    rotated = sum(norm.online is not None for norm in norms) - gathers
    assert len(norms) == 6 and bool(gathers) == ("QLLM" in name) and bool(rotated) == ("QLLM" not in name)
    made: list[str] = []
    for op in ("norm_tokens", "kronecker_tokens"):
        own = getattr(token_ops, op)
        monkeypatch.setattr(token_ops, op, lambda *given, op=op, own=own: made.append(op) or own(*given))
    found = logits(lm)
    assert (made.count("norm_tokens"), made.count("kronecker_tokens")) == (6 - rotated, rotated)
    monkeypatch.setattr(TokenNorm, "hands_tokens_on", lambda self, x: False)
    assert torch.equal(found, logits(lm)) and len(made) == 6


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_a_model_gives_the_same_logits(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = pq.load(calibrated(family, tmp_path / "quantized")[1])
    norm_tokens, made = token_ops.norm_tokens, []
    monkeypatch.setattr(token_ops, "norm_tokens", lambda *given: made.append(given) or norm_tokens(*given))
    found = logits(lm)
    assert len(made) == NORMS[family]
    monkeypatch.setattr(TokenNorm, "hands_tokens_on", lambda self, x: False)
    assert torch.equal(found, logits(lm)) and len(made) == NORMS[family]
