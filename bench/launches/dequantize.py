"""The launches of the dequantization whose machine code is watched."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from bench.aot import Case
from plquant.kernels import dequantize_kernel as code
from plquant.kernels import pairs
from plquant.kernels.dequantize import constants, unit
from plquant.kernels.layout import PLANES


def cases(target: str) -> Iterator[Case]:
    """Every width, dtype and axis: groups of 128 inputs or 64 outputs, asymmetric."""
    for bits, dtype, axis in product((2, 3, 4, 5, 6, 8), ("fp16", "bf16"), ("in", "out")):
        along_out = axis == "out"
        options = constants(bits, along_out, False, 16, torch.float16 if dtype == "fp16" else torch.bfloat16)
        compiler = {"num_warps": options.pop("num_warps"), "num_stages": 1}
        registers = options.pop("maxnreg")
        if target.startswith("sm_"):
            compiler["maxnreg"] = registers
        kind = "*i32:16" if along_out else f"*{dtype}:16"
        signature = dict.fromkeys(("words_ptr", "high_ptr", "out_ptr"), "*i32:16") | {
            "units": "i32:16",
            "in_features": "i32:16",
        }
        yield Case(
            name=f"dequantize W{bits} {dtype} {axis}",
            kernel=code.dequantize_kernel,
            signature=signature | {"scale_ptr": kind, "zero_ptr": kind},
            constants=options | {"GROUP": 64 if along_out else 128, "PTX": target.startswith("sm_")},
            options=compiler,
            weights=32 * options["UNITS"] * unit(bits),
            weight_bytes=4 * options["UNITS"] * unit(bits) * sum(PLANES[bits]),
            loading=(code._load_words,),
            dequantizing=(pairs.fma, pairs.code_pairs, pairs.less, pairs._fields, pairs._byte, pairs._with_exponent),
            bits_per_weight=bits + 16 + 32 / 128,
            limits={"atomics": 0.0, "narrow": 0.0, "total": 6.5},
        )
