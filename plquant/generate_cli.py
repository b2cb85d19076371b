"""``plquant generate``: text from a quantized model."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="plquant generate", description="Continue a text with a quantized model.")
    parser.add_argument("folder", help="output folder of `plquant calibrate`")
    parser.add_argument("--prompt", nargs="+", required=True, help="texts to continue; several run as one batch")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens at most (default: %(default)s)")
    parser.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template first")
    parser.add_argument(
        "--compile", action="store_true", help="compile the step: about a minute before the second token, then faster"
    )
    parser.add_argument(
        "--kv_cache",
        choices=["float", "integer"],
        help="how keys and values are kept: rounded whenever they are read, or as integers of the run's bits, for the "
        "same text in less memory and time (default: integer where the run quantizes them)",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda where there is a GPU, else cpu)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    return parser


def run(args: list[str]) -> None:
    """Parse and run; errors a user can mend end in a message, not in a traceback."""
    options = _parser().parse_args(args)
    try:
        if options.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens={options.max_new_tokens} generates nothing; choose 1 or more")
        _generate(options)
    except (ValueError, OSError) as error:
        if os.environ.get("PLQUANT_DEBUG"):
            raise
        sys.exit(f"plquant: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _generate(options: argparse.Namespace) -> None:
    import torch
    from transformers import AutoTokenizer

    from plquant.generation import end_tokens, generate
    from plquant.kv_cache import quantizes_keys
    from plquant.packed_model import load

    device = _device(options.device)
    if options.kv_cache == "integer":
        _check_keys_are_quantized(options)
    lm = load(options.folder, trust_remote_code=options.trust_remote_code).to(device)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.folder, trust_remote_code=options.trust_remote_code)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = [_in_template(tokenizer, text) if options.chat else text for text in options.prompt]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not options.chat).to(device)
    integers = options.kv_cache != "float" and quantizes_keys(lm)
    ends, found, shown = end_tokens(lm), torch.empty(len(texts), 0, dtype=torch.long), ""
    start = time.perf_counter()
    room = options.max_new_tokens
    for token in generate(lm, batch.input_ids, batch.attention_mask, room, options.compile, integers):
        if not found.shape[1]:
            first = time.perf_counter()
        found = torch.cat([found, token[:, None].cpu()], 1)
        if len(texts) == 1:  # streams; what may become another letter with the next token waits
            text = tokenizer.decode(found[0], skip_special_tokens=True)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                print(text[len(shown) :], end="", flush=True)
                shown = text
    end = time.perf_counter()
    if len(texts) == 1:
        print(tokenizer.decode(found[0], skip_special_tokens=True)[len(shown) :])
    else:
        for prompt, row in zip(options.prompt, found, strict=True):
            stop = next((i for i, token in enumerate(row.tolist()) if token in ends), len(row))
            print(f"{prompt}{tokenizer.decode(row[:stop], skip_special_tokens=True)}\n")
    steps = found.shape[1] - 1
    rate = f", then {steps * len(texts) / (end - first):.1f} tokens/s" if steps else ""
    prompt_rate = batch.attention_mask.sum().item() / (first - start)
    print(f"[prompt {prompt_rate:.1f} tokens/s{rate}]", file=sys.stderr)


def _device(name: str | None) -> Any:
    import torch

    there = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda" if there else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= there):
        possible = ", ".join(["cpu", *(f"cuda:{index}" for index in range(there))])
        raise ValueError(f"--device={name} is not here; choose among {possible}")
    return device


def _check_keys_are_quantized(options: argparse.Namespace) -> None:
    from transformers import AutoConfig

    from plquant.formats.quantization_config import activations_of
    from plquant.packed_model import DAMAGED

    config = AutoConfig.from_pretrained(options.folder, trust_remote_code=options.trust_remote_code)
    stored = getattr(config, "quantization_config", None)
    try:
        activations = None if stored is None else activations_of(stored)
    except (ValueError, *DAMAGED):
        return  # opening the folder says what is wrong with it
    if activations is None or activations.kv_bits is None:
        raise ValueError(
            f"--kv_cache=integer: {options.folder} keeps keys and values in floating point; choose float, or calibrate "
            "with --model.activations.kv 2 to 8"
        )


def _in_template(tokenizer: Any, text: str) -> Any:
    if not tokenizer.chat_template:
        raise ValueError("--chat needs a chat template, which this model does not have")
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
