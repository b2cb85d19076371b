"""Everything a checkpoint can say: saved, loaded, and the same logits; and what stock transformers makes of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import plquant as pq
from plquant.blocks.discovery import find_blocks
from plquant.files import write_json
from plquant.formats.checkpoint import INDEX, REST, index_of, save_tensors
from plquant.kernels import native
from plquant.nn.activation_quantizer import ActivationQuantizer
from plquant.nn.attention import AttentionQuantizer, quantize_attention_
from plquant.nn.online import attach_online_
from plquant.nn.output_layer import OutputLayer
from plquant.nn.packed_linear import PackedLinear
from plquant.packed_model import stored_config
from plquant.quant.fake_quantize import quantize_weight
from plquant.quant.grid import ActivationGrid, IntGrid
from tests.families import VOCAB, attention_names, prepare_linears_, stock, tiny_model
from tests.online_op import Mix

IDS = torch.arange(3, 67)[None] % VOCAB
OUT, IN, CHANNEL = IntGrid(4, 16, axis="out"), IntGrid(3, 16), IntGrid(4, None, symmetric=True)


def logits(lm: nn.Module) -> Tensor:
    with torch.no_grad():
        return lm(IDS, use_cache=False).logits


def packed(
    family: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    grid_of: Callable[[str], IntGrid] = lambda name: IN,
    activations: ActivationGrid | None = None,
    offsets: bool = False,
    online: bool = False,
) -> PreTrainedModel:
    """A tiny model as a run leaves it: every linear in its blocks packed, everything else put in."""
    lm = tiny_model(family)
    for parameter in lm.parameters():  # but not the buffers of RoPE, which stay in fp32
        parameter.data = parameter.data.to(dtype)
    prefix, blocks = find_blocks(lm)
    norms = [name for name, m in blocks.named_modules() if name.endswith("input_layernorm")]
    for seed, (name, linear) in enumerate([(n, m) for n, m in blocks.named_modules() if isinstance(m, nn.Linear)]):
        new = PackedLinear(quantize_weight(linear.weight.detach(), grid_of(name)), linear.bias)
        if activations is not None and activations.bits is not None:
            offset = torch.linspace(-0.4, 0.3, linear.in_features) if offsets and "down" in name else None
            new.inputs = ActivationQuantizer(activations.bits, activations.symmetric, offset)
        blocks.set_submodule(name, new)
        if online and "down" in name:
            attach_online_(new, [Mix.random(new.in_features, seed), Mix.random(new.in_features, seed + 1)])
    if activations is not None:
        quantize_attention_(lm, attention_names(lm), activations)
    if online:
        for name in norms:
            width = blocks.get_submodule(name).get_parameter("weight").shape[0]
            attach_online_(blocks.get_submodule(name), [Mix.random(width, 0)])
    return lm.requires_grad_(False)


def save(lm: PreTrainedModel, folder: Path, activations: ActivationGrid | None = None) -> Path:
    folder.mkdir()
    config = type(lm.config)(**lm.config.to_dict())
    config.quantization_config = stored_config(lm, activations)
    config.save_pretrained(folder)
    tied = lm.all_tied_weights_keys
    save_tensors(folder / REST, {name: t for name, t in lm.state_dict().items() if name not in tied})
    write_json(folder / INDEX, index_of(folder, [REST]))
    return folder


def prepare_(lm: PreTrainedModel) -> None:
    """The products that a loaded model has; with AVX2 its output layer has another order of sums than torch's bf16."""
    prepare_linears_(lm)
    if native.vectors() != "AVX2":
        return
    head = lm.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    lm.set_output_embeddings(OutputLayer.of(head))


def by_name(name: str) -> IntGrid:
    return OUT if "down" in name or "fc2" in name else CHANNEL if "o_proj" in name or "v_proj" in name else IN


CASES: dict[str, dict[str, Any]] = {
    "one grid": {},
    "mixed axes": {"grid_of": by_name},
    "W4A4": {"activations": ActivationGrid(4)},
    "W3A8KV4 symmetric, mixed axes": {"grid_of": by_name, "activations": ActivationGrid(8, kv=4, symmetric=True)},
    "W3A16KV4": {"activations": ActivationGrid(None, kv=4)},
    "W3A6KV16P8": {"activations": ActivationGrid(6, kv=None, probabilities=8)},
    "offsets": {"activations": ActivationGrid(4), "offsets": True},
    "run-time operations": {"online": True},
    "all": {
        **{"grid_of": by_name, "activations": ActivationGrid(4, kv=8, probabilities=8)},
        **{"offsets": True, "online": True},
    },
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_loaded_gives_the_logits_of_what_was_saved(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    options = CASES[case]
    lm = packed(dtype=dtype, **options)
    folder = save(lm, tmp_path / "out", options.get("activations"))
    loaded, unpacking = pq.load(folder), pq.load(folder, kernels=False)
    assert torch.equal(logits(unpacking), logits(lm))
    plain = logits(lm)
    prepare_(lm)
    assert torch.equal(logits(loaded), logits(lm))
    if dtype == torch.float32:  # rounding may move an activation to another code, which tokens from there on see
        errors = (logits(loaded) - plain).norm(dim=-1) / plain.norm(dim=-1)
        assert errors.median() < 1e-5 and errors.max() < 5e-2
    assert loaded.dtype == dtype and not any(p.requires_grad for p in loaded.parameters())
    ours, theirs = lm.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("family", ["opt", "qwen2", "gemma2", "phi3", "mistral"])
def test_other_families_are_loaded_alike(family: str, tmp_path: Path) -> None:
    activations = ActivationGrid(4, kv=8)
    lm = packed(family, grid_of=by_name, activations=activations, online=True)
    loaded = pq.load(save(lm, tmp_path / "out", activations))
    prepare_(lm)
    assert torch.equal(logits(loaded), logits(lm))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_was_laid_out_for_kernels_is_not_kept_twice(tmp_path: Path) -> None:
    folder = save(packed(), tmp_path / "out")
    loaded = pq.load(folder)
    mapped = str(folder) in Path("/proc/self/maps").read_text()
    assert mapped == any(m.prepared is None for m in loaded.modules() if isinstance(m, PackedLinear))


def test_loading_does_not_import_what_it_can_do_without(tmp_path: Path) -> None:
    """compressed-tensors takes as much memory as the weights of a small model."""
    folder = save(packed(), tmp_path / "out")
    code = f"import sys, plquant; plquant.load({str(folder)!r}); print('compressed_tensors' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_kernels_in_bf16_are_as_near_to_the_packed_weights_as_plain_products_are(tmp_path: Path) -> None:
    """Two orders of adding the same bf16 products differ too, so equal logits are nothing to ask for in bf16."""
    folder = save(packed(grid_of=by_name), tmp_path / "out")
    exact = pq.load(folder, dtype=torch.float32, kernels=False)
    errors = []
    for kernels in (True, False):
        lm = pq.load(folder, kernels=kernels)
        with torch.no_grad():
            for ids in torch.arange(VOCAB).roll(17).view(6, 16):  # few rows, and many at once
                errors.append((lm(ids[None]).logits - exact(ids[None]).logits).norm())
            errors.append((logits(lm) - logits(exact)).norm())
    ours, theirs = torch.stack(errors).view(2, -1).square().mean(1).sqrt()
    assert ours <= 1.1 * theirs
    in_fp32 = logits(pq.load(folder, dtype=torch.float32))
    assert (in_fp32 - logits(exact)).norm() <= 1e-5 * in_fp32.norm()


@pytest.mark.parametrize("part", ["activations", "offsets", "online"])
def test_every_part_shows_in_the_logits(part: str, tmp_path: Path) -> None:
    everything = CASES["all"]
    without = everything | ({"activations": None} if part == "activations" else {part: False})
    assert not torch.equal(logits(packed(**everything)), logits(packed(**without)))


@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "qwen3"])
def test_stock_transformers_gives_our_logits_with_mixed_axes(family: str, tmp_path: Path) -> None:
    lm = packed(family, grid_of=by_name)
    assert torch.equal(logits(stock(save(lm, tmp_path / "out"))), logits(lm))


@pytest.mark.parametrize("bits", [4, 8])
def test_stock_transformers_quantizes_the_inputs_of_linears_and_leaves_attention_alone(
    bits: int, tmp_path: Path
) -> None:
    activations = ActivationGrid(bits)
    lm = packed(dtype=torch.float32, grid_of=by_name, activations=activations)
    theirs = logits(stock(save(lm, tmp_path / "out", activations)))
    assert not torch.equal(theirs, logits(lm))
    for module in lm.modules():
        if isinstance(module, AttentionQuantizer):
            module.enabled = False
    assert torch.equal(theirs, logits(lm))


def test_stock_transformers_refuses_what_it_would_run_wrongly(tmp_path: Path) -> None:
    folder = save(packed(online=True), tmp_path / "out")
    code = f"""
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(folder)!r})
finally:
    assert not any(name.startswith("plquant") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "'needs plquant: open with plquant.load(folder)'" in done.stderr


def test_operations_of_a_later_version_are_refused(tmp_path: Path) -> None:
    folder = save(packed(online=True), tmp_path / "out")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("test-mix", "later"))
    with pytest.raises(ValueError, match="needs a run-time operation 'later', but this plquant has .*test-mix"):
        pq.load(folder)


def test_codes_that_a_kernel_would_take_give_the_same_products() -> None:
    lm = packed(dtype=torch.float32, activations=ActivationGrid(4), offsets=True)
    linear = lm.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(linear, PackedLinear) and linear.inputs is not None
    x = torch.randn(2, 5, linear.in_features, generator=torch.Generator().manual_seed(0))
    codes, weight = linear.inputs.codes(x), linear.quantized()
    assert codes.zero_point is not None
    steps = codes.codes.double() - codes.zero_point.double()
    products = codes.scale.double() * (steps @ weight.dequantize().double().t())
    torch.testing.assert_close(linear(x).double(), products, rtol=1e-5, atol=1e-5)
