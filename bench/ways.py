"""One packed model in every way that bench/generate.py and bench/memory.py compare.

    bf16          its dequantized weights in plain linears
    NF4, int8     these through bitsandbytes
    torchao       these in torchao's int4, groups of 64: the prototype whose CPU product is torch's own
    quanto        these in optimum-quanto's int4, whose unpacking it compiles at first use, for some minutes

Peers are opened by transformers, which has each leave the embedding and the head as they are.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

import plquant
from plquant.nn.packed_linear import PackedLinear

PEERS = {"NF4": "bitsandbytes", "int8": "bitsandbytes", "torchao": "torchao", "quanto": "optimum.quanto"}


class CannotRun(Exception):
    """Why a way is left out, in one line."""


def dequantized_(lm: nn.Module) -> None:
    """Put plain linears in the place of packed ones; inputs are rounded as before."""
    for name, packed in [(n, m) for n, m in lm.named_modules() if isinstance(m, PackedLinear)]:
        weight = packed.quantized().dequantize()
        linear = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None, dtype=weight.dtype)
        linear.weight.data = weight
        if packed.bias is not None:
            linear.bias.data = packed.bias
        steps = [step for step in (packed.online, packed.inputs) if step is not None]
        lm.set_submodule(name, nn.Sequential(*steps, linear) if steps else linear)


def write_plain(folder: Path, plain: Path) -> None:
    """The dequantized model as a folder of its own.

    Raises:
        CannotRun: No plain model computes what this one does.
    """
    lm = plquant.load(folder, kernels=False)
    if any(getattr(m, "inputs", None) is not None or getattr(m, "online", None) is not None for m in lm.modules()):
        raise CannotRun(f"{folder} has quantized activations or run-time operations, which no plain model has")
    dequantized_(lm)
    config = type(lm.config)(**{k: v for k, v in lm.config.to_dict().items() if k != "quantization_config"})
    fresh: Any = type(lm)(config)
    fresh.to(lm.dtype)
    fresh.load_state_dict(lm.state_dict())
    fresh.save_pretrained(plain)


def opened(way: str, plain: Path) -> Any:
    """The model of a plain folder, in bf16 or as a peer has it.

    Raises:
        CannotRun: The peer is not installed.
    """
    if way in PEERS and not _installed(PEERS[way]):
        raise CannotRun(f"{PEERS[way]} is not installed")
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if way == "NF4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    elif way == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif way == "torchao":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        config = PrototypeInt4WeightOnlyConfig(group_size=64, set_inductor_config=False)
        options["quantization_config"] = TorchAoConfig(config)
    elif way == "quanto":
        options["quantization_config"] = QuantoConfig(weights="int4")
    return AutoModelForCausalLM.from_pretrained(plain, **options).eval()


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # what it is a part of
        return False


def mebibytes(lm: nn.Module) -> float:
    """Of all parameters and buffers, each counted once."""
    tensors = {t.data_ptr(): t for whole in (*lm.parameters(), *lm.buffers()) for t in _parts(whole)}
    return sum(t.nbytes for t in tensors.values()) / 2**20


def _parts(tensor: Tensor) -> list[Tensor]:
    """The tensors that one of a peer's is made of, scales included."""
    if is_traceable_wrapper_subclass(tensor):
        names = tensor.__tensor_flatten__()[0]
        return [part for name in names for part in _parts(getattr(tensor, name))]
    state = getattr(tensor, "quant_state", None)  # of bitsandbytes
    return [tensor] if state is None else [tensor, state.absmax]
