"""y = x W^T for at most 16 rows of x and a packed weight: the launcher of ``decode_kernel``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from plquant.kernels.decode_kernel import decode_kernel, sum_splits_kernel
from plquant.kernels.layout import LAYOUT, PLANES, PackedWeight, pack

MAX_ROWS = 16


@dataclass(frozen=True)
class Config:
    """How a product is split.

    Attributes:
        outputs: Of a program, 32 or 64.
        inputs: Of a tile, what a warp takes at a time: 32, 64 or 128.
        warps: Of a program; they share the inputs.
        splits: Programs that share the inputs; a second kernel adds their sums.
    """

    outputs: int
    inputs: int
    warps: int
    splits: int


def configure(packed: PackedWeight, rows: int, processors: int) -> Config:
    """A configuration for a device with this many multiprocessors.

    Warps of one program share the inputs at no cost, so they come first; programs that share them cost their sums in
    memory, written and read, which are kept below 3% of the weight.
    """
    low, high = PLANES[packed.bits]
    columns = packed.padded_in_features
    inputs = max(
        size
        for size in (32, 64, 128)
        if size * low <= 512  # registers for a warp's words
        and size * (high or low) >= 128  # a whole word of the last plane
        and columns % size == 0
    )
    straddled = packed.axis == "out" and packed.group_size != packed.out_features and packed.group_size % 64
    outputs = 32 if rows > 8 or straddled or packed.padded_out_features % 64 else 64
    programs, tiles = packed.padded_out_features // outputs, columns // inputs
    warps = 4 if programs >= 3 * processors or tiles < 16 else 8
    affordable = packed.nbytes * 3 // (100 * 8 * rows * packed.out_features)
    splits = max(1, min(2 * processors // programs, tiles // warps, affordable, 8))
    return Config(outputs, inputs, warps, splits)


def linear(x: Tensor, packed: PackedWeight, *, config: Config | None = None, subnormal: bool | None = None) -> Tensor:
    """The product x W^T.

    Args:
        x: [M, I], M from 1 to 16, fp16 or bf16, on the weight's device.
        packed: The weight.
        config: Instead of ``configure``'s.
        subnormal: Whether matrix instructions may take subnormal fp16 operands; ``None`` tests the device, once.

    Returns:
        [M, O] in the dtype of x. The same operands give the same bits.

    Raises:
        ValueError: The shape or dtype of x, or the layout of the weight, is not what this kernel reads.
    """
    if x.dim() != 2 or x.shape[1] != packed.in_features or not 1 <= x.shape[0] <= MAX_ROWS:
        raise ValueError(f"x is {tuple(x.shape)}, not (1 to {MAX_ROWS}, {packed.in_features})")
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"x is {x.dtype}, not torch.float16 or torch.bfloat16")
    if packed.layout != LAYOUT:
        raise ValueError(f"the weight's layout is {packed.layout!r}, this kernel reads {LAYOUT!r}")
    if x.stride(1) != 1:
        x = x.contiguous()
    rows = x.shape[0]
    config = configure(packed, rows, _processors(x.device)) if config is None else config
    if subnormal is None:
        subnormal = x.dtype == torch.float16 and subnormals_survive(x.device)
    out = x.new_empty(rows, packed.out_features)
    parts = out if config.splits == 1 else x.new_empty(config.splits, *out.shape, dtype=torch.float32)
    grid = (packed.padded_out_features // config.outputs, config.splits)
    fixed = constants(packed, rows, config, subnormal)
    with torch.cuda.device_of(x):  # triton launches on the current device
        decode_kernel[grid](*arguments(x, packed, parts, config), **fixed, **compiler_options(fixed))
        if config.splits > 1:
            blocks = (triton.cdiv(out.numel(), 1024),)
            sum_splits_kernel[blocks](parts, out, out.numel(), SPLIT=config.splits, BLOCK=1024, num_warps=4)
    return out


def arguments(x: Tensor, packed: PackedWeight, out: Tensor, config: Config) -> tuple[Any, ...]:
    """The tensors and sizes that ``decode_kernel`` is called with."""
    high = packed.words if packed.high is None else packed.high
    zeros = packed.scale if packed.zero_point is None else packed.zero_point
    tiles = packed.padded_in_features // config.inputs
    sizes = (x.shape[0], packed.in_features, packed.out_features, x.stride(0), tiles, packed.gain)
    return (packed.words, high, packed.scale, zeros, x, out, *sizes)


def constants(packed: PackedWeight, rows: int, config: Config, subnormal: bool) -> dict[str, Any]:
    """The constants that ``decode_kernel`` is compiled with."""
    nvidia = torch.version.hip is None
    low, high = PLANES[packed.bits]
    columns = packed.padded_in_features
    along_out = packed.axis == "out"
    group = 0 if packed.group_size == packed.in_features and not along_out else packed.group_size
    return {
        "BITS": packed.bits,
        "LOW_BITS": low,
        "HIGH_BITS": high,
        "GROUP": group,
        "SPAN": config.inputs if along_out else math.gcd(group, config.inputs),
        "ALONG_OUT": along_out,
        "SYMMETRIC": packed.zero_point is None,
        "SUBNORMAL": subnormal,
        "MASKED": packed.in_features != columns or columns // config.inputs % (config.warps * config.splits) != 0,
        "N": config.outputs,
        "M": 8 if rows <= 8 and nvidia else 16,  # AMD's matrix instructions have 16 columns at least
        "K": config.inputs,
        "W": config.warps,
        "SPLIT": config.splits,
        "PTX": nvidia,
    }


def compiler_options(constants: dict[str, Any]) -> dict[str, int]:
    """Warps and a bound on registers; without one, ptxas would spill rather than miss a round occupancy."""
    options = {"num_warps": constants["W"], "num_stages": 1}
    if constants["PTX"]:
        spilling = constants["ALONG_OUT"] and not constants["SUBNORMAL"]  # on sm_100
        few = constants["BITS"] == 2 and constants["M"] == 16 and not spilling  # to have enough warps
        options["maxnreg"] = 255 if constants["BITS"] == 3 else (128 if few else 168)
    return options


@cache
def subnormals_survive(device: torch.device) -> bool:
    """Whether matrix instructions of a device take subnormal fp16 operands as they are; some flush them to zero.

    Waits for the device the first time: call it before a CUDA graph is captured.
    """
    codes = torch.arange(32 * 32, device=device).view(32, 32).remainder(16).to(torch.uint8)
    packed = pack(codes, codes.new_ones(32, 1, dtype=torch.float16), None, bits=4, group_size=32)
    x = torch.eye(16, 32, dtype=torch.float16, device=device)
    out = linear(x, packed, config=Config(32, 32, 1, 1), subnormal=True)
    return torch.equal(out, codes.T[:16].to(torch.float16) - 8)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
